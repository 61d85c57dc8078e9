"""Dot products of queries with a block of K: 16 keys, transposed in registers, so that no sum crosses lanes.

A block is up to 16 words, 4 bytes each, of 16 rows: register w of it holds word w of every key. A query's word w in all
lanes then meets 16 keys in one instruction, and the sum of a lane is the score of its key. Transposing costs 4 shuffles
a register, whatever the number of heads; summing lanes would cost about 3 a head and key.

Codes are multiplied as bytes, by q in 16 bits; see vectors/split_dot.py.
"""

from llvmlite import ir
from numba import types

from cpu_kernels.attention.parameters import HEAD_SCORES, LANES, LINE_BYTES, RowShape
from cpu_kernels.attention.products.row_vectors import key_rows
from cpu_kernels.vectors.dot import line_products
from cpu_kernels.vectors.isa import Isa
from cpu_kernels.vectors.split_dot import Split
from cpu_kernels.vectors.tiles import masked_line
from cpu_kernels.vectors.vector import (
    F32,
    I32,
    I64,
    VF32,
    VI32,
    I32x16,
    constant,
    emits,
    fma_value,
    intp,
    load_as,
    picked,
    prefetch_value,
    splat_value,
    store_as,
)

BLOCK = types.UniTuple(I32x16, LANES)
CHAINS = 2  # sums of one head that do not wait for each other
FEW_HEADS = 2  # whose sums alone would wait for each other


def alternating(width, high):
    """Lanes of two registers, `width` of each in turn, from the lower or upper halves of their runs of 4."""
    halves = (range(lane + 2 * high, lane + 2 * high + 2, width) for lane in range(0, LANES, 4))
    return [source + at + lane for half in halves for at in half for source in (0, LANES) for lane in range(width)]


def fours(odd):
    """Lanes of two registers: every second run of 4 lanes of the first, then of the second."""
    firsts = [first for source in (0, LANES) for first in (source + 4 * odd, source + 4 * odd + 8)]
    return [lane for first in firsts for lane in range(first, first + 4)]


def transposed(b, values):
    """16 registers whose element [i][j] is that of [j][i] before.

    Two rounds inside runs of 4 lanes, which any shuffle unit does, make a column of four keys of every run; two
    rounds of whole runs put these columns together.
    """
    quads = []
    for at in range(0, LANES, 4):
        pairs = [[picked(b, *values[key : key + 2], alternating(1, high)) for key in (at, at + 2)] for high in (0, 1)]
        quads.append([picked(b, *pair, alternating(2, high)) for pair in pairs for high in (0, 1)])
    words = [None] * LANES
    for column in range(4):
        for odd in (0, 1):
            halves = [picked(b, quads[at][column], quads[at + 1][column], fours(odd)) for at in (0, 2)]
            for upper in (0, 1):
                words[4 * odd + 8 * upper + column] = picked(b, *halves, fours(upper))
    return words


def packed(b, vectors):
    """LLVM vectors as the value of a numba tuple."""
    value = ir.Constant(ir.ArrayType(VI32, len(vectors)), ir.Undefined)
    for index, vector in enumerate(vectors):
        value = b.insert_value(value, vector, index)
    return value


def whole_block(words: int):
    """Intrinsic (base, row bytes, last, ahead) -> block of `words` words; asks for as much memory at `ahead`."""
    narrow = ir.VectorType(I32, words)
    lanes = ir.Constant(VI32, [min(lane, words) for lane in range(LANES)])  # a lane past the words is undefined

    def load_words(b, address):
        value = load_as(b, address, narrow)
        return value if words == LANES else b.shuffle_vector(value, ir.Constant(narrow, ir.Undefined), lanes)

    @emits(BLOCK, intp, intp, intp, intp)
    def load(b, base, row_bytes, last, ahead):
        values = [load_words(b, row) for row in key_rows(b, base, row_bytes, last, LANES)]
        for line in range(words):
            prefetch_value(b, ahead, LINE_BYTES * line)
        return packed(b, transposed(b, values))

    return load


def part_block(kv_dtype: str):
    """Intrinsic (base, row bytes, last, items) -> block whose rows have `items` numbers, then zeros; plain rows
    only."""
    item_bytes = 4 // RowShape.of(kv_dtype).word_items

    @emits(BLOCK, intp, intp, intp, intp)
    def load(b, base, row_bytes, last, items):
        rows = key_rows(b, base, row_bytes, last, LANES)
        return packed(b, transposed(b, [masked_line(b, row, items, item_bytes) for row in rows]))

    return load


@emits(types.void, BLOCK, intp, intp)
def store_block(b, block, to, stride):
    """The registers of a block, `stride` bytes apart."""
    for word in range(LANES):
        store_as(b, b.extract_value(block, word), b.add(to, b.mul(stride, ir.Constant(I64, word))))


def plain_dots(isa: Isa, kv_dtype: str, heads: int):
    """Intrinsic (block, q, q bytes, to): scores of 16 keys added to those of `heads` queries, of numbers that are
    multiplied by one instruction.
    """
    select, add_product = line_products(isa, kv_dtype)[0]

    @emits(types.void, BLOCK, intp, intp, intp)
    def dots(b, block, q, q_bytes, to):
        rows = [b.add(q, b.mul(q_bytes, ir.Constant(I64, head))) for head in range(heads)]
        sums = [[load_as(b, to, VF32, HEAD_SCORES * head), constant(VF32, 0.0)] for head in range(heads)]
        for word in range(LANES):
            keys = select(b, b.extract_value(block, word))
            for row, chains in zip(rows, sums):
                x = splat_value(b, load_as(b, row, I32, 4 * word))
                chains[word % CHAINS] = add_product(b, chains[word % CHAINS], keys, x)
        for head, chains in enumerate(sums):
            store_as(b, b.fadd(*chains), to, HEAD_SCORES * head)

    return dots


def code_dots(isa: Isa, kv_dtype: str, heads: int, words: int):
    """Intrinsic (block, q, q bytes, sums, sums bytes, scales, scales bytes, to): scores of 16 keys added to those
    of `heads` queries.

    q: `planes` runs of `words` words. sums: of q's codes, float32 per group. scales: of 16 keys, float32, and the next
    group's `scales bytes` behind.
    """
    split, group_words, plane_bytes = Split(isa), RowShape.of(kv_dtype).group_words, 4 * words

    def factors(b, word):
        """For every two planes of q what multiplies them."""
        if kv_dtype == "q8":
            return [split.keys(b, word)]
        nibbles = constant(VI32, 0x0F0F0F0F)
        return [split.values(b, b.and_(half, nibbles)) for half in (word, b.lshr(word, constant(VI32, 4)))]

    def group_sums(b, block, group, q, sums):
        """int32 sums of one group and every query; a word is widened once for all of them."""
        starts = [split.key_start(b, load_as(b, at, F32)) if kv_dtype == "q8" else ir.Constant(I32, 0) for at in sums]
        totals = [split.start(b, start, heads <= FEW_HEADS) for start in starts]
        for word in range(group * group_words, (group + 1) * group_words):
            for pair, values in enumerate(factors(b, b.extract_value(block, word))):
                for total, row in zip(totals, q):
                    for plane, value in enumerate(values):
                        x = splat_value(b, load_as(b, row, I32, (2 * pair + plane) * plane_bytes + 4 * word))
                        total[plane % len(total)] = split.key_dot(b, total[plane % len(total)], value, x)
        return [split.whole(b, *total) for total in totals]

    @emits(types.void, BLOCK, intp, intp, intp, intp, intp, intp, intp)
    def dots(b, block, q, q_bytes, sums, sums_bytes, scales, scales_bytes, to):
        rows = [b.add(q, b.mul(q_bytes, ir.Constant(I64, head))) for head in range(heads)]
        for group in range(words // group_words):
            sums_at = [b.add(sums, b.mul(sums_bytes, ir.Constant(I64, head))) for head in range(heads)]
            sums_at = [b.add(at, ir.Constant(I64, 4 * group)) for at in sums_at]
            scale = load_as(b, b.add(scales, b.mul(scales_bytes, ir.Constant(I64, group))), VF32)
            for head, total in enumerate(group_sums(b, block, group, rows, sums_at)):
                before = load_as(b, to, VF32, HEAD_SCORES * head)
                store_as(b, fma_value(b, b.sitofp(total, VF32), scale, before), to, HEAD_SCORES * head)

    return dots
