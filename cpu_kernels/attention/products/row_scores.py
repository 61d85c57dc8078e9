"""Dot products of queries with rows of plain numbers, lane by lane: no key is transposed, and sums are folded at last.

A tile is as many sums as a register has lanes: 8 queries and 2 keys, say, of 16 lanes. A line of a key is loaded and
widened once for all queries of a tile, a line of a query loaded once for all of its keys, so that an instruction that
multiplies needs half of one that does not. Folding a tile costs a blend, a shuffle and an addition a sum, and leaves
the sums in the lanes of one register.

Four heads or more are woven in memory: woven query i has in every lane the number of that head which differs from i by
the lane's own, so that the sums of all heads have their parts where folding adds them up, and no blend is needed.

Where the CPU cannot multiply bf16, a line of a query lies in memory as its even numbers, then its odd ones.
"""

from llvmlite import ir
from numba import types

from cpu_kernels.attention.parameters import HEAD_SCORES, JOINED_SCORES, LANES, LINE_BYTES, RowShape, q_line_bytes
from cpu_kernels.attention.products.row_vectors import key_rows
from cpu_kernels.vectors.compiler import helper
from cpu_kernels.vectors.dot import line_products
from cpu_kernels.vectors.isa import Isa
from cpu_kernels.vectors.tiles import masked_line, zeros
from cpu_kernels.vectors.vector import I32, I64, emits, float_vector, intp, load_as, picked, prefetch_value, store_as


def is_woven(heads: int) -> bool:
    """Whether so many queries of a tile are woven: fewer are read by tiles of several rows too, which take more."""
    return heads >= JOINED_SCORES


def woven(b, vectors, keys: int):
    """The same words of so many queries, a power of two -> of the woven ones, `keys` lanes a head."""
    step = 1
    while step < len(vectors):
        count = vectors[0].type.count
        lanes = [lane + count if lane // keys & step else lane for lane in range(count)]
        vectors = [picked(b, own, vectors[index ^ step], lanes) for index, own in enumerate(vectors)]
        step *= 2
    return vectors


def exchanged(b, vectors, width: int):
    """Vectors of runs of `width` lanes, as many as a vector has runs -> run i of vector j is run j of vector i."""
    count, step = len(vectors), 1
    lanes = range(count * width)
    while step < count:
        low = [lane + (count - step) * width if lane // width & step else lane for lane in lanes]
        high = [lane + count * width if lane // width & step else lane + step * width for lane in lanes]
        turned = list(vectors)
        for index in (index for index in range(count) if not index & step):
            pair = vectors[index], vectors[index + step]
            turned[index], turned[index + step] = picked(b, *pair, low), picked(b, *pair, high)
        vectors, step = turned, 2 * step
    return vectors


def folded(b, vectors, keys: int):
    """As many vectors as they have lanes, [head][key] -> one, whose lane i is the sum of the lanes of the i-th.

    keys: of a head whose queries are woven, 0 where they are not. Lanes are added in the same order either way.
    """
    lanes, stride = len(vectors), len(vectors) // 2
    while stride:
        pairs = list(zip(vectors[: len(vectors) // 2], vectors[len(vectors) // 2 :]))
        beside = [lane ^ stride for lane in range(lanes)]
        if 0 < keys <= stride:
            vectors = [b.fadd(first, picked(b, second, second, beside)) for first, second in pairs]
        else:
            own = [lane + lanes if lane & stride else lane for lane in range(lanes)]
            other = [lane ^ stride for lane in own]
            vectors = [b.fadd(picked(b, *pair, own), picked(b, *pair, other)) for pair in pairs]
        stride //= 2
    return vectors[0]


def query_weaver(isa: Isa, heads: int):
    """Function: weave so many queries, `q bytes` apart, in place; None where they lie as they are."""
    if not is_woven(heads):
        return None
    words, step = ir.VectorType(I32, isa.lanes), 4 * isa.lanes

    @emits(types.void, intp, intp)
    def weave_words(b, q, q_bytes):
        queries = [b.add(q, b.mul(q_bytes, ir.Constant(I64, head))) for head in range(heads)]
        vectors = [load_as(b, query, words) for query in queries]
        for query, vector in zip(queries, woven(b, vectors, isa.lanes // heads)):
            store_as(b, vector, query)

    @helper
    def weave(q, q_bytes):
        for i in range(0, q_bytes, step):
            weave_words(q + i, q_bytes)

    return weave


def row_dots(isa: Isa, kv_dtype: str, heads: int, has_woven: bool):
    """Functions on the sums of a tile of `heads` queries: zeros, a line of its keys added, a part of a line added, and
    the sums to the scores. With a line as much memory is asked for `ahead`.

    Queries are `q bytes` apart, woven or not, keys `row bytes`; keys beyond `last` repeat it.
    """
    lanes = isa.lanes
    keys, pieces, piece_bytes = lanes // heads, LANES // lanes, 4 * lanes
    words, products = ir.VectorType(I32, lanes), line_products(isa, kv_dtype)
    item_bytes = 4 // RowShape.of(kv_dtype).word_items
    tile = types.UniTuple(float_vector(lanes), lanes)

    def add_products(b, sums, lines, q, q_bytes):
        """lines: [piece][key], words of the keys' lines."""
        values = [b.extract_value(sums, index) for index in range(lanes)]
        queries = [b.add(q, b.mul(q_bytes, ir.Constant(I64, head))) for head in range(heads)]
        for piece, line in enumerate(lines):
            for half, (select, add_product) in enumerate(products):
                numbers = [select(b, word) for word in line]
                for head, query in enumerate(queries):
                    x = load_as(b, query, words, LINE_BYTES * half + piece_bytes * piece)
                    for key, number in enumerate(numbers):
                        index = keys * head + key
                        values[index] = add_product(b, values[index], number, x)
        for index, value in enumerate(values):
            sums = b.insert_value(sums, value, index)
        return sums

    @emits(tile, tile, intp, intp, intp, intp, intp, intp)
    def add_line(b, sums, base, row_bytes, last, q, q_bytes, ahead):
        for key in range(keys):
            prefetch_value(b, ahead, LINE_BYTES * key)
        rows = list(key_rows(b, base, row_bytes, last, keys))
        lines = [[load_as(b, row, words, piece_bytes * piece) for row in rows] for piece in range(pieces)]
        return add_products(b, sums, lines, q, q_bytes)

    @emits(tile, tile, intp, intp, intp, intp, intp, intp)
    def add_part(b, sums, base, row_bytes, last, q, q_bytes, items):
        whole = [masked_line(b, row, items, item_bytes) for row in key_rows(b, base, row_bytes, last, keys)]
        firsts = range(0, LANES, lanes)
        lines = [[picked(b, line, line, list(range(first, first + lanes))) for line in whole] for first in firsts]
        return add_products(b, sums, lines, q, q_bytes)

    @emits(types.void, tile, intp, intp)
    def store(b, sums, to, key):
        scores = folded(b, [b.extract_value(sums, index) for index in range(lanes)], keys if has_woven else 0)
        if has_woven:
            block, tile_of_block = (ir.Constant(I64, number) for number in (lanes, keys))
            inside = b.mul(b.udiv(b.urem(key, block), tile_of_block), ir.Constant(I64, HEAD_SCORES))
            store_as(b, scores, b.add(b.add(to, inside), b.mul(b.udiv(key, block), ir.Constant(I64, piece_bytes))))
            return
        to = b.add(to, b.mul(key, ir.Constant(I64, 4)))
        for head in range(heads):
            store_as(b, picked(b, scores, scores, list(range(keys * head, keys * head + keys))), to, HEAD_SCORES * head)

    @emits(types.void, intp)
    def turn(b, block):
        vectors = [load_as(b, block, words, HEAD_SCORES * index) for index in range(heads)]
        for head, vector in enumerate(exchanged(b, vectors, keys)):
            store_as(b, vector, block, HEAD_SCORES * head)

    return zeros(lanes, lanes), add_line, add_part, store, turn


def row_scores(isa: Isa, kv_dtype: str, heads: int, has_woven: bool):
    """Function: scores[head][key] of a tile of keys, `heads` of the item's heads at a time.

    `ahead` is where the K of the tile to ask for begins.
    """
    zero_tile, add_line, add_part, store, turn = row_dots(isa, kv_dtype, heads, has_woven)
    block_keys, keys_at_once, line_items = isa.lanes, isa.lanes // heads, RowShape.of(kv_dtype).line_items
    q_line = q_line_bytes(kv_dtype, isa.has_bf16)

    @helper
    def scores(rows, row_bytes, keys, ahead, q, lines, head_dim, all_heads, to):
        whole, q_bytes = head_dim // line_items, q_line * lines
        for key in range(0, keys, keys_at_once):
            row, last = rows + key * row_bytes, keys - 1 - key
            for head in range(0, all_heads, heads):
                at, sums, asked = q + q_bytes * head, zero_tile(), ahead
                for line in range(whole):
                    line_at = at + q_line * line
                    sums = add_line(sums, row + LINE_BYTES * line, row_bytes, last, line_at, q_bytes, asked)
                    asked += LINE_BYTES * keys_at_once
                if whole < lines:
                    left, line_at = head_dim - line_items * whole, at + q_line * whole
                    sums = add_part(sums, row + LINE_BYTES * whole, row_bytes, last, line_at, q_bytes, left)
                store(sums, to + HEAD_SCORES * head, key)
            ahead += LINE_BYTES * keys_at_once * lines
        if has_woven:
            for head in range(0, all_heads, heads):
                for key in range(0, keys, block_keys):
                    turn(to + HEAD_SCORES * head + 4 * key)

    return scores
