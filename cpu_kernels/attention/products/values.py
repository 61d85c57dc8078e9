"""Weighted sums of V: a strip, one line wide, of a tile's rows times the weights of several query heads.

One instruction takes one row of float32, or two of bf16 where the CPU has products of bf16: these are interleaved, so
that a lane holds the same dim of both, and their weights, side by side in memory, are put in every lane. Where a
register holds half a line, the strip is passed over twice, so that four heads' sums fit in the registers.

acc of a line, 64 bytes a register: fp32 in the order of dims; bf16 and q4 even dims, then odd; q8 register r holds dims
4 r .. 4 r + 3 of every 16.
"""

from llvmlite import ir
from numba import types

from cpu_kernels.attention.parameters import HEAD_SCALARS, HEAD_SCORES, LANES, LINE_BYTES, RowShape
from cpu_kernels.attention.products.code_values import code_strip
from cpu_kernels.attention.products.row_vectors import fetch, interleave, key_rows
from cpu_kernels.vectors.compiler import helper
from cpu_kernels.vectors.dot import as_floats, emit_dot_bf16, high_halves, low_halves
from cpu_kernels.vectors.isa import Isa
from cpu_kernels.vectors.tiles import masked_line, zeros
from cpu_kernels.vectors.vector import (
    F32,
    I32,
    I64,
    VF32,
    VI32,
    call_llvm,
    emits,
    float_vector,
    fma_value,
    intp,
    lanes_below,
    load_as,
    picked,
    splat_value,
    store_as,
)

ROWS = 2  # of a step


def value_strip(isa: Isa, kv_dtype: str, heads: int):
    """Function: acc[head] = acc[head] * correction[head] + sum_key weight[head][key] * V[key] for one line of V.

    weights: HEAD_SCORES apart, as the softmax leaves them; of codes see code_values.py. `ahead` is where the next
    tile's share of V begins.
    """
    make = code_strip if RowShape.of(kv_dtype).has_codes else plain_strip
    return make(isa, kv_dtype, heads)


def registers_of(b, isa: Isa, kv_dtype: str, rows):
    """What the weights of a step multiply: registers of rows that one instruction takes, [[...], ...]."""
    if kv_dtype == "fp32":
        return [[as_floats(b, row)] for row in rows]
    if isa.has_bf16:
        return [interleave(b, *rows)]
    return [[low_halves(b, row), high_halves(b, row)] for row in rows]


def plain_strip(isa: Isa, kv_dtype: str, heads: int):
    """As `value_strip`, of rows of numbers."""
    shape, lanes = RowShape.of(kv_dtype), isa.lanes
    parts, item_bytes, line_items = shape.parts, 4 // shape.word_items, shape.line_items
    pieces, piece_bytes, words = LANES // lanes, 4 * lanes, ir.VectorType(I32, lanes)
    pairs = kv_dtype == "bf16" and isa.has_bf16
    weights_bytes = 4 if pairs else 4 * ROWS
    lines_asked = ROWS // pieces  # of the next tile, a step
    tile, zero_tile = types.UniTuple(float_vector(lanes), heads * parts), zeros(heads * parts, lanes)

    def add_products(b, sums, rows, weights):
        values = [b.extract_value(sums, index) for index in range(heads * parts)]
        for step, registers in enumerate(registers_of(b, isa, kv_dtype, rows)):
            for head in range(heads):
                weight = splat_value(b, load_as(b, weights, I32, HEAD_SCORES * head + 4 * step), lanes)
                for index, register in enumerate(registers, start=parts * head):
                    if pairs:
                        values[index] = emit_dot_bf16(isa, b, values[index], register, weight)
                    else:
                        values[index] = fma_value(b, register, as_floats(b, weight), values[index])
        for index, value in enumerate(values):
            sums = b.insert_value(sums, value, index)
        return sums

    @emits(tile, tile, intp, intp, intp, intp)
    def whole_line(b, sums, row, row_bytes, last, weights):
        rows = [load_as(b, at, words) for at in key_rows(b, row, row_bytes, last, ROWS)]
        return add_products(b, sums, rows, weights)

    @emits(tile, tile, intp, intp, intp, intp, intp)
    def part_line(b, sums, row, row_bytes, last, weights, count):
        rows = [masked_line(b, at, count, item_bytes) for at in key_rows(b, row, row_bytes, last, ROWS)]
        return add_products(b, sums, [picked(b, line, line, list(range(lanes))) for line in rows], weights)

    @emits(types.void, tile, intp, intp, intp)
    def add_to_acc(b, sums, acc, acc_stride, scalars):
        for head in range(heads):
            correction = splat_value(b, load_as(b, scalars, F32, HEAD_SCALARS * head), lanes)
            at = b.add(acc, b.mul(acc_stride, ir.Constant(I64, head)))
            for part in range(parts):
                before = load_as(b, at, float_vector(lanes).be_type, LINE_BYTES * part)
                total = b.extract_value(sums, parts * head + part)
                store_as(b, fma_value(b, before, correction, total), at, LINE_BYTES * part)

    @helper
    def strip(acc, acc_stride, scalars, row, row_bytes, keys, weights, count, ahead):
        for piece in range(pieces):
            sums, at, weights_at = zero_tile(), row + piece_bytes * piece, weights
            if count >= line_items:
                for key in range(0, keys, ROWS):
                    sums = whole_line(sums, at, row_bytes, keys - 1 - key, weights_at)
                    for _ in range(lines_asked):
                        fetch(ahead)
                        ahead += LINE_BYTES
                    at, weights_at = at + ROWS * row_bytes, weights_at + weights_bytes
            else:
                left = count - piece_bytes * piece // item_bytes
                for key in range(0, keys, ROWS):
                    sums = part_line(sums, at, row_bytes, keys - 1 - key, weights_at, left)
                    at, weights_at = at + ROWS * row_bytes, weights_at + weights_bytes
            add_to_acc(sums, acc + piece_bytes * piece, acc_stride, scalars)

    return strip


def in_order(b, kv_dtype: str, parts):
    """The registers of a line's acc -> its dims in order, a register each."""
    if kv_dtype == "fp32":
        return list(parts)
    if kv_dtype == "q8":
        registers = []
        for lane in range(0, LANES, 4):
            picked = ir.Constant(
                ir.VectorType(I32, 8), [*range(lane, lane + 4), *range(LANES + lane, LANES + lane + 4)]
            )
            pairs = [b.shuffle_vector(parts[at], parts[at + 1], picked) for at in (0, 2)]
            registers.append(b.shuffle_vector(*pairs, ir.Constant(VI32, list(range(LANES)))))
        return registers
    halves = ([lane // 2 + 8 * half + (LANES if lane % 2 else 0) for lane in range(LANES)] for half in range(2))
    return [b.shuffle_vector(*parts, ir.Constant(VI32, lanes)) for lanes in halves]


def head_writer(kv_dtype: str):
    """Function: one head's acc * weight, in the order of dims."""
    shape = RowShape.of(kv_dtype)
    line_items, acc_bytes = shape.line_items, shape.acc_bytes

    @emits(types.void, intp, types.float32, intp, intp)
    def write_line(b, acc, weight, to, count):
        factor = splat_value(b, weight)
        parts = [b.fmul(load_as(b, acc, VF32, LINE_BYTES * part), factor) for part in range(shape.parts)]
        for index, value in enumerate(in_order(b, kv_dtype, parts)):
            left = b.sub(count, ir.Constant(I64, LANES * index))
            at = b.inttoptr(b.add(to, ir.Constant(I64, LINE_BYTES * index)), VF32.as_pointer())
            arguments = [value, at, ir.Constant(I32, 4), lanes_below(b, left)]
            call_llvm(b, "llvm.masked.store.v16f32.p0", ir.VoidType(), *arguments)

    @helper
    def write(acc, weight, to, head_dim):
        for line in range((head_dim + line_items - 1) // line_items):
            write_line(acc + acc_bytes * line, weight, to + 4 * line_items * line, head_dim - line_items * line)

    return write
