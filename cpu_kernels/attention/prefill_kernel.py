"""prefill_attention: causal attention of many rows of one sequence, tiled over queries and keys.

An item is (KV head, block of rows): its rows x heads are up to 64 query vectors that share one pass over the
keys. A tile of 64 keys is transposed once, so that 16 keys are the lanes of a register and 4 queries x 64 keys fill 16
of them without sums across lanes; then softmax and the weighted sum of V as in vectors/tiles.py. Pages of codes are
widened to bf16 first, a tile at a time. Causal and window masks become a visible range of lanes per row. Items are
handed out from the end, where rows see most keys, so that the last ones to finish are short.
"""

import numpy as np
from llvmlite import ir
from numba import types

from cpu_kernels.attention.codes import tile_widener
from cpu_kernels.attention.parameters import (
    HEAD_SCALARS,
    HEAD_SCORES,
    KEY_TILE,
    LINE_BYTES,
    NARROW_VALUES,
    PREFILL_SCORES,
    PREFILL_VALUES,
    PREFILL_VECTORS,
    RowShape,
    q_line_bytes,
    wide_dtype,
)
from cpu_kernels.attention.scores import part_block, store_block, whole_block
from cpu_kernels.attention.soft_cap import cap_scores
from cpu_kernels.attention.tiles import (
    LOG2_E,
    MINUS_INFINITY,
    page_at,
    q_line_writer,
    raise_maximum,
    softmax_tile,
    tile_at,
    tile_rows,
    write_lse,
)
from cpu_kernels.attention.values import head_writer, value_strip
from cpu_kernels.team.arguments import PREFILL
from cpu_kernels.team.chunks import fail, parameter, real_parameter, take
from cpu_kernels.vectors.compiler import helper
from cpu_kernels.vectors.dot import line_products
from cpu_kernels.vectors.isa import Isa
from cpu_kernels.vectors.scalar import least, most, store_scalar
from cpu_kernels.vectors.tiles import zeros
from cpu_kernels.vectors.vector import (
    I32,
    I64,
    LANES,
    VI32,
    F32x16,
    emits,
    intp,
    load_as,
    splat,
    splat_value,
    store_as,
    store_f32,
)

ZERO = np.float32(0.0)
KEY_VECTORS = KEY_TILE // LANES


def scores_of_tile(isa: Isa, kv_dtype: str):
    """Function: scores[query][64 keys] of PREFILL_SCORES queries and a transposed tile of K of `words` 4-byte rows."""
    tile = types.UniTuple(F32x16, PREFILL_SCORES * KEY_VECTORS)
    products = line_products(isa, kv_dtype)
    word_bytes = 4 * len(products)

    @emits(tile, tile, intp, intp, intp)
    def add_words(b, sums, q, q_bytes, keys):
        rows = [b.add(q, b.mul(q_bytes, ir.Constant(I64, query))) for query in range(PREFILL_SCORES)]
        for half, (select, add_product) in enumerate(products):
            ks = [select(b, load_as(b, keys, VI32, LINE_BYTES * part)) for part in range(KEY_VECTORS)]
            for query, row in enumerate(rows):
                x = splat_value(b, load_as(b, row, I32, 4 * half))
                for part, k in enumerate(ks):
                    index = query * KEY_VECTORS + part
                    sums = b.insert_value(sums, add_product(b, b.extract_value(sums, index), k, x), index)
        return sums

    @emits(types.void, tile, intp)
    def store(b, sums, to):
        for index in range(PREFILL_SCORES * KEY_VECTORS):
            store_as(b, b.extract_value(sums, index), to, LINE_BYTES * index)

    start = zeros(PREFILL_SCORES * KEY_VECTORS)

    @helper
    def scores(q, q_bytes, keys, words, to):
        sums = start()
        for word in range(words):
            sums = add_words(sums, q + word_bytes * word, q_bytes, keys + 4 * KEY_TILE * word)
        store(sums, to)

    return scores


@helper
def visible(arguments, row, position, keys):
    """Visible keys [first, last) of the tile at `position` for this row of q."""
    at = parameter(arguments, PREFILL.q_start) + row
    window = parameter(arguments, PREFILL.window)
    first = most(0, at - window + 1 - position) if window else 0
    return first, least(keys, at + 1 - position)


def rows_of_tile(kv_dtype: str):
    """Function: (K rows, bytes from one to the next, V rows, bytes likewise) of a tile; codes are widened to `work`."""
    has_codes, group_lines = RowShape.of(kv_dtype).has_codes, RowShape.of(kv_dtype).line_items // 32
    widen = tile_widener(kv_dtype) if has_codes else None

    @helper
    def rows(arguments, k_page, v_page, offset, keys, lines, work):
        k_row, v_row = parameter(arguments, PREFILL.k_row), parameter(arguments, PREFILL.v_row)
        k_rows, k_numbers, v_rows, v_numbers = tile_rows(arguments, k_page, v_page, offset)
        if has_codes:
            stride, groups, wide = 2 * parameter(arguments, PREFILL.page_size), lines // group_lines, LINE_BYTES * lines
            widen(k_rows, k_row, k_numbers, stride, keys, groups, work)
            widen(v_rows, v_row, v_numbers, stride, keys, groups, work + KEY_TILE * wide)
            return work, wide, work + KEY_TILE * wide, wide
        return k_rows, k_row, v_rows, v_row

    return rows


def attend_tile(isa: Isa, kv_dtype: str, capped: bool):
    """Function: one tile of keys, K transposed, for all query vectors of an item. kv_dtype: of the rows multiplied."""
    values = PREFILL_VALUES if isa.has_avx512 else NARROW_VALUES
    scores_of, strip_of = scores_of_tile(isa, kv_dtype), value_strip(isa, kv_dtype, values)
    soften_one, shape = softmax_tile(isa, kv_dtype), RowShape.of(kv_dtype)
    line_items, acc_line, q_line = shape.line_items, shape.acc_bytes, q_line_bytes(kv_dtype, isa.has_bf16)

    @helper
    def soften(arguments, first_row, queries_per_kv, count, vector, position, keys, scores, running):
        """Scores -> weights of one pass of query vectors."""
        scale = splat(types.float32(real_parameter(arguments, PREFILL.scale) * LOG2_E))
        if capped:
            cap = types.float32(real_parameter(arguments, PREFILL.cap))
            factor = types.float32(real_parameter(arguments, PREFILL.scale) / cap)
            for part in range(PREFILL_VALUES):
                cap_scores(scores + HEAD_SCORES * part, factor, cap)
            scale = splat(types.float32(LOG2_E))
        scalars = scores + HEAD_SCORES * PREFILL_VALUES
        for part in range(PREFILL_VALUES):
            row = first_row + least(count - 1, vector + part) // queries_per_kv
            low, high = visible(arguments, row, position, keys)
            at, scalar_at = scores + HEAD_SCORES * part, scalars + HEAD_SCALARS * part
            raise_maximum(at, low, high, scale, running + 8 * (vector + part), scalar_at)
        for part in range(PREFILL_VALUES):
            row = first_row + least(count - 1, vector + part) // queries_per_kv
            low, high = visible(arguments, row, position, keys)
            at, scalar_at = scores + HEAD_SCORES * part, scalars + HEAD_SCALARS * part
            soften_one(at, low, high, scale, running + 8 * (vector + part), scalar_at)

    @helper
    def add_values(head_dim, lines, last, v_rows, v_row, scores, acc):
        scalars, acc_bytes = scores + HEAD_SCORES * PREFILL_VALUES, acc_line * lines
        for line in range(lines):
            at, left = v_rows + LINE_BYTES * line, head_dim - line_items * line
            for part in range(0, PREFILL_VALUES, values):
                to, factors = acc + acc_bytes * part + acc_line * line, scalars + HEAD_SCALARS * part
                strip_of(to, acc_bytes, factors, at, v_row, last, scores + HEAD_SCORES * part, left, at)

    @helper
    def attend(
        arguments, first_row, queries_per_kv, count, position, keys, lines, v_rows, v_row, k_t, scores, q, acc, running
    ):
        q_bytes, acc_bytes = q_line * lines, acc_line * lines
        for vector in range(0, count, PREFILL_VALUES):
            last_row = first_row + least(count - 1, vector + PREFILL_VALUES - 1) // queries_per_kv
            last = visible(arguments, last_row, position, keys)[1]
            if last <= 0 or visible(arguments, first_row + vector // queries_per_kv, position, keys)[0] >= keys:
                continue
            for part in range(0, PREFILL_VALUES, PREFILL_SCORES):
                at = q + (vector + part) * q_bytes
                scores_of(at, q_bytes, k_t, LANES * lines, scores + HEAD_SCORES * part)
            soften(arguments, first_row, queries_per_kv, count, vector, position, keys, scores, running)
            head_dim = parameter(arguments, PREFILL.head_dim)
            add_values(head_dim, lines, last, v_rows, v_row, scores, acc + vector * acc_bytes)

    return attend


def attend_block(isa: Isa, kv_dtype: str, capped: bool):
    """Function: one item: load its queries, pass over its keys, write its rows. False: a page is invalid."""
    shape, wide = RowShape.of(kv_dtype), wide_dtype(kv_dtype)
    load_q, write, q_line = q_line_writer(isa, wide), head_writer(wide), q_line_bytes(wide, isa.has_bf16)
    load, load_part = whole_block(LANES), part_block(wide)
    rows_of, attend = rows_of_tile(kv_dtype), attend_tile(isa, wide, capped)
    row_items, has_codes = shape.line_items, shape.has_codes
    line_items, acc_line = RowShape.of(wide).line_items, RowShape.of(wide).acc_bytes

    @helper
    def transpose_tile(rows, row_bytes, keys, items, lines, to):
        """The tile's K rows -> [words][64 keys]."""
        for line in range(lines):
            left = items - line_items * line
            for key in range(0, keys, LANES):
                at, last = rows + key * row_bytes + LINE_BYTES * line, keys - 1 - key
                if left >= line_items:
                    block = load(at, row_bytes, last, at)
                else:
                    block = load_part(at, row_bytes, last, left)
                store_block(block, to + 4 * KEY_TILE * LANES * line + 4 * key, 4 * KEY_TILE)

    @helper
    def start_vectors(arguments, kv_head, first_row, count, padded, lines, q, acc, running):
        """Load the item's queries, the last one repeated as padding; acc and (m, l) of nothing."""
        queries_per_kv, head_dim = parameter(arguments, PREFILL.queries_per_kv), parameter(arguments, PREFILL.head_dim)
        for vector in range(padded):
            real = least(count - 1, vector)
            head, row = kv_head * queries_per_kv + real % queries_per_kv, first_row + real // queries_per_kv
            source = parameter(arguments, PREFILL.q) + row * parameter(arguments, PREFILL.q_row)
            source += head * parameter(arguments, PREFILL.q_head)
            load_q(source, head_dim, lines, q + vector * q_line * lines)
            store_scalar(MINUS_INFINITY, running + 8 * vector)
            store_scalar(ZERO, running + 8 * vector + 4)
        for i in range(0, padded * acc_line * lines, 64):
            store_f32(splat(ZERO), acc + i)

    @helper
    def write_vectors(arguments, kv_head, first_row, count, lines, acc, running):
        queries_per_kv, head_dim = parameter(arguments, PREFILL.queries_per_kv), parameter(arguments, PREFILL.head_dim)
        for vector in range(count):
            head, row = kv_head * queries_per_kv + vector % queries_per_kv, first_row + vector // queries_per_kv
            to = parameter(arguments, PREFILL.out) + row * parameter(arguments, PREFILL.out_row)
            lse = parameter(arguments, PREFILL.lse) + row * parameter(arguments, PREFILL.lse_row) + 4 * head
            weight = write_lse(running + 8 * vector, lse)
            write(acc + vector * acc_line * lines, weight, to + head * parameter(arguments, PREFILL.out_head), head_dim)

    @helper
    def key_range(arguments, first_row, rows):
        """The keys that any of these rows may see."""
        q_start, window = parameter(arguments, PREFILL.q_start), parameter(arguments, PREFILL.window)
        start, stop = (
            parameter(arguments, PREFILL.start),
            least(parameter(arguments, PREFILL.stop), q_start + first_row + rows),
        )
        return most(start, q_start + first_row - window + 1) if window else start, stop

    @helper
    def block(arguments, kv_head, first_row, rows, work):
        queries_per_kv, head_dim = parameter(arguments, PREFILL.queries_per_kv), parameter(arguments, PREFILL.head_dim)
        lines = ((head_dim + row_items - 1) // row_items * row_items + line_items - 1) // line_items
        row_size, count = LINE_BYTES * lines, rows * queries_per_kv
        padded = (count + PREFILL_VALUES - 1) // PREFILL_VALUES * PREFILL_VALUES
        widened = work + row_size * KEY_TILE
        scores = widened + (2 * row_size * KEY_TILE if has_codes else 0)
        q = scores + PREFILL_VALUES * (HEAD_SCORES + HEAD_SCALARS)
        acc = q + padded * q_line * lines
        running = acc + padded * acc_line * lines
        start_vectors(arguments, kv_head, first_row, count, padded, lines, q, acc, running)
        position, stop = key_range(arguments, first_row, rows)
        table = parameter(arguments, PREFILL.table) + kv_head * parameter(arguments, PREFILL.table_head)
        items = line_items * lines if has_codes else head_dim
        while position < stop:
            page = page_at(arguments, table, position)
            if page < 0:
                return False
            k_page, v_page, offset, keys = tile_at(arguments, page, position, stop)
            k_rows, k_row, v_rows, v_row = rows_of(arguments, k_page, v_page, offset, keys, lines, widened)
            transpose_tile(k_rows, k_row, keys, items, lines, work)
            attend(
                arguments,
                first_row,
                queries_per_kv,
                count,
                position,
                keys,
                lines,
                v_rows,
                v_row,
                work,
                scores,
                q,
                acc,
                running,
            )
            position += keys
        write_vectors(arguments, kv_head, first_row, count, lines, acc, running)
        return True

    return block


def prefill(isa: Isa, kv_dtype: str, capped: bool = False):
    """Kernel of prefill_attention; parameters in parameters.py. capped: whether scores are."""
    attend = attend_block(isa, kv_dtype, capped)

    def kernel(arguments, thread):
        q_len, kv_heads = parameter(arguments, PREFILL.rows), parameter(arguments, PREFILL.kv_heads)
        work = parameter(arguments, PREFILL.scratch) + thread * parameter(arguments, PREFILL.thread_bytes)
        block_rows = most(1, PREFILL_VECTORS // parameter(arguments, PREFILL.queries_per_kv))
        blocks = (q_len + block_rows - 1) // block_rows
        limit = parameter(arguments, PREFILL.page_size) * parameter(arguments, PREFILL.max_pages)
        if parameter(arguments, PREFILL.start) < 0 or parameter(arguments, PREFILL.stop) > limit:
            fail(arguments, 1)
            return
        chunk = take(arguments, 0)
        while chunk < blocks * kv_heads:
            block, kv_head = blocks - 1 - chunk // kv_heads, chunk % kv_heads
            first_row = block * block_rows
            if not attend(arguments, kv_head, first_row, least(block_rows, q_len - first_row), work):
                fail(arguments, 2)
            chunk = take(arguments, 0)

    return kernel
