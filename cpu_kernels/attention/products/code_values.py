"""Weighted sums of V where pages hold codes: as values.py, but four rows at once, by weights of 16 bits.

Rows are interleaved byte by byte, so that a word of a register holds the same dim of four of them, and the weights of
these rows, side by side in memory, are put in every lane; see vectors/split_dot.py.
"""

from functools import reduce

from llvmlite import ir
from numba import types

from cpu_kernels.attention.parameters import HEAD_SCALARS, HEAD_WEIGHTS, LINE_BYTES, RowShape
from cpu_kernels.attention.products.row_vectors import fetch, key_rows
from cpu_kernels.vectors.compiler import helper
from cpu_kernels.vectors.dot import V8I32, V16I8, V16I16, as_floats, emit_dot2_256
from cpu_kernels.vectors.isa import Isa
from cpu_kernels.vectors.split_dot import V64I8, Split
from cpu_kernels.vectors.tiles import zeros
from cpu_kernels.vectors.vector import (
    F32,
    I32,
    I64,
    VF32,
    VI8,
    VI32,
    F32x8,
    F32x16,
    constant,
    emits,
    fma_value,
    intp,
    load_as,
    picked,
    splat_value,
    store_as,
)

WEIGHT_PLANE = HEAD_WEIGHTS // 2
ROWS = 4  # that one instruction takes
PIECES = 4  # of 16 codes, of a line


def unpack(b, left, right, item_bytes, high):
    """The lower or upper halves of 16-byte lanes of two <64 x i8>, items alternating."""
    lanes = []
    for lane in range(0, 64, 16):
        start = lane + 8 * high
        for item in range(start, start + 8, item_bytes):
            lanes += [*range(item, item + item_bytes), *range(64 + item, 64 + item + item_bytes)]
    return b.shuffle_vector(left, right, ir.Constant(ir.VectorType(I32, 64), lanes))


def interleave_lines(b, rows, parts):
    """Four <64 x i8> -> <16 x i32> of each part: lane 4 l + i of part r holds byte 16 l + 4 r + i of every row."""
    registers = []
    for high, upper in (divmod(part, 2) for part in parts):
        left, right = (unpack(b, rows[at], rows[at + 1], 1, high) for at in (0, 2))
        registers.append(b.bitcast(unpack(b, left, right, 2, upper), VI32))
    return registers


def interleave_nibbles(b, rows):
    """Four <16 x i8> -> (low nibbles, high nibbles), <16 x i32>: lane i holds those of byte i of every row."""
    wide = ir.VectorType(I32, 32)
    halves = [b.shuffle_vector(rows[at], rows[at + 1], ir.Constant(wide, list(range(32)))) for at in (0, 2)]
    order = [16 * row + byte for byte in range(16) for row in range(4)]
    both = b.shuffle_vector(*halves, ir.Constant(ir.VectorType(I32, 64), order))
    both, nibbles = b.bitcast(both, VI32), constant(VI32, 0x0F0F0F0F)
    return [b.and_(both, nibbles), b.and_(b.lshr(both, constant(VI32, 4)), nibbles)]


def code_strip(isa: Isa, kv_dtype: str, heads: int):
    """As values.value_strip, of codes: weights are two planes, HEAD_WEIGHTS apart, and their sums are multiplied and
    offset by the head's scalars. `count` is not looked at: rows are whole groups.
    """
    if kv_dtype == "q8" and isa.name in ("avx2", "avxvnni"):
        return pair_strip(isa, heads)
    parts = RowShape.of(kv_dtype).parts
    at_once = min(parts, max(1, (8 if isa.has_avx512 else 2) // heads))
    strips = [part_strip(isa, kv_dtype, heads, range(first, first + at_once)) for first in range(0, parts, at_once)]
    return reduce(one_after_other, strips)


def one_after_other(first, second):
    """Function: both strips."""

    @helper
    def strip(acc, acc_stride, scalars, row, row_bytes, keys, weights, count, ahead):
        first(acc, acc_stride, scalars, row, row_bytes, keys, weights, count, ahead)
        second(acc, acc_stride, scalars, row, row_bytes, keys, weights, count, ahead)

    return strip


def part_strip(isa: Isa, kv_dtype: str, heads: int, parts: range):
    """`code_strip` of some of the parts of acc."""
    shape, split = RowShape.of(kv_dtype), Split(isa)
    share = ROWS * shape.line_bytes * len(parts) // shape.parts  # of the next tile's line, asked for in a step
    number, planes = parts[0] // len(parts), (0, WEIGHT_PLANE)
    tile = types.UniTuple(F32x16, heads * len(parts) * len(planes))
    zero_tile = zeros(tile.count)

    def registers(b, rows):
        if kv_dtype == "q8":
            return interleave_lines(b, [load_as(b, row, V64I8) for row in rows], parts)
        both = interleave_nibbles(b, [load_as(b, row, VI8) for row in rows])
        return [both[part] for part in parts]

    @emits(tile, tile, intp, intp, intp, intp)
    def add_rows(b, sums, row, row_bytes, last, weights):
        values, index = [split.values(b, value) for value in registers(b, key_rows(b, row, row_bytes, last, ROWS))], 0
        for head in range(heads):
            for plane, offset in enumerate(planes):
                weight = splat_value(b, load_as(b, weights, I32, HEAD_WEIGHTS * head + offset))
                for value in values:
                    total = b.bitcast(b.extract_value(sums, index), VI32)
                    total = b.bitcast(split.value_dot(b, total, value[plane], weight), VF32)
                    sums, index = b.insert_value(sums, total, index), index + 1
        return sums

    @emits(types.void, tile, intp, intp, intp)
    def add_to_acc(b, sums, acc, acc_stride, scalars):
        for head in range(heads):
            at = b.add(acc, b.mul(acc_stride, ir.Constant(I64, head)))
            for place, part in enumerate(parts):
                first = head * len(parts) * len(planes) + place
                two = [b.bitcast(b.extract_value(sums, index), VI32) for index in (first, first + len(parts))]
                add_scaled(b, split.whole(b, *two), scalars, head, at, LINE_BYTES * part)

    @helper
    def strip(acc, acc_stride, scalars, row, row_bytes, keys, weights, count, ahead):
        sums, ahead = zero_tile(), ahead + number * share * ((keys + ROWS - 1) // ROWS)
        for key in range(0, keys, ROWS):
            sums = add_rows(sums, row, row_bytes, keys - 1 - key, weights)
            for offset in range(0, share, LINE_BYTES):
                fetch(ahead + offset)
            row, weights, ahead = row + ROWS * row_bytes, weights + 4, ahead + share
        add_to_acc(sums, acc, acc_stride, scalars)

    return strip


def add_scaled(b, total, scalars, head, acc, offset):
    """acc * correction + total * scale + offset, by the scalars of a head."""
    lanes = total.type.count
    correction, scale, added = (
        splat_value(b, load_as(b, scalars, F32, HEAD_SCALARS * head + 4 * field), lanes) for field in range(3)
    )
    numbers = ir.VectorType(F32, lanes)
    value = fma_value(b, b.sitofp(total, numbers), scale, added)
    store_as(b, fma_value(b, load_as(b, acc, numbers, offset), correction, value), acc, offset)


def pair_strip(isa: Isa, heads: int):
    """`code_strip` of q8 on 256 bits: 16 dims at a time of rows 0 and 2, and of 1 and 3, as pairs of int16.

    Codes are widened as they are loaded, so that pairing them costs a shuffle for every 8 dims and two rows.
    """
    tile, zero_tile = types.UniTuple(F32x8, 2 * heads), zeros(2 * heads, 8)
    # A lane of 128 bits holds 8 dims: the first four of them, then the last.
    orders = [
        [8 * lane + 4 * high + i + side for lane in (0, 1) for i in range(4) for side in (0, 16)] for high in (0, 1)
    ]

    @emits(tile, tile, intp, intp, intp, intp)
    def add_rows(b, sums, row, row_bytes, last, weights):
        rows = [b.sext(load_as(b, at, V16I8), V16I16) for at in key_rows(b, row, row_bytes, last, ROWS)]
        values = [b.bitcast(b.extract_value(sums, index), V8I32) for index in range(2 * heads)]
        for plane in (0, 1):
            pairs = [picked(b, rows[plane], rows[plane + 2], order) for order in orders]
            for head in range(heads):
                weight = splat_value(b, load_as(b, weights, I32, HEAD_WEIGHTS * head + WEIGHT_PLANE * plane), 8)
                for index, pair in enumerate(pairs, start=2 * head):
                    values[index] = emit_dot2_256(isa, b, values[index], pair, b.bitcast(weight, V16I16))
        for index, value in enumerate(values):
            sums = b.insert_value(sums, as_floats(b, value), index)
        return sums

    @emits(types.void, tile, intp, intp, intp)
    def add_to_acc(b, sums, acc, acc_stride, scalars):
        for head in range(heads):
            at = b.add(acc, b.mul(acc_stride, ir.Constant(I64, head)))
            for high in (0, 1):
                both = b.bitcast(b.extract_value(sums, 2 * head + high), V8I32)
                for lane in (0, 1):
                    four = picked(b, both, both, list(range(4 * lane, 4 * lane + 4)))
                    add_scaled(b, four, scalars, head, at, LINE_BYTES * (2 * lane + high))

    @helper
    def strip(acc, acc_stride, scalars, row, row_bytes, keys, weights, count, ahead):
        for piece in range(PIECES):
            sums, at, weights_at = zero_tile(), row + 16 * piece, weights
            for key in range(0, keys, ROWS):
                sums = add_rows(sums, at, row_bytes, keys - 1 - key, weights_at)
                fetch(ahead)
                at, weights_at, ahead = at + ROWS * row_bytes, weights_at + 4, ahead + LINE_BYTES
            add_to_acc(sums, acc + 16 * piece, acc_stride, scalars)

    return strip
