"""Weighted sums of V: a strip, one line wide, of a tile's rows times the weights of several query heads.

One instruction takes one row of float32, two of bf16 where the CPU has products of bf16, or four of codes: rows are
interleaved, so that a lane holds the same dim of all of them, and the weights of these rows, side by side in memory,
are put in every lane. Codes meet weights of 16 bits, see vectors/split_dot.py.

acc of a line, 64 bytes a register: fp32 in the order of dims; bf16 and q4 even dims, then odd; q8 register r holds dims
4 r .. 4 r + 3 of every 16.
"""

from llvmlite import ir
from numba import types

from cpu_kernels.attention.parameters import HEAD_SCALARS, HEAD_SCORES, HEAD_WEIGHTS, LANES, LINE_BYTES, RowShape
from cpu_kernels.attention.row_vectors import fetch, interleave
from cpu_kernels.vectors.compiler import helper
from cpu_kernels.vectors.dot import V32I16, emit_dot_bf16, high_halves, low_halves
from cpu_kernels.vectors.isa import Isa
from cpu_kernels.vectors.split_dot import V64I8, Split
from cpu_kernels.vectors.tiles import masked_line, zeros
from cpu_kernels.vectors.vector import (
    F32,
    I32,
    I64,
    VF32,
    VI8,
    VI32,
    F32x16,
    call_llvm,
    constant,
    emits,
    fma_value,
    intp,
    lanes_below,
    load_as,
    splat_value,
    store_as,
)

WEIGHT_PLANE = HEAD_WEIGHTS // 2


def rows_at_once(isa: Isa, kv_dtype: str) -> int:
    """Rows that one instruction takes."""
    if RowShape.of(kv_dtype).has_codes:
        return 4
    return 2 if kv_dtype == "bf16" and isa.has_bf16 else 1


def unpack(b, left, right, item_bytes, high):
    """The lower or upper halves of 16-byte lanes of two <64 x i8>, items alternating."""
    lanes = []
    for lane in range(0, 64, 16):
        start = lane + 8 * high
        for item in range(start, start + 8, item_bytes):
            lanes += [*range(item, item + item_bytes), *range(64 + item, 64 + item + item_bytes)]
    return b.shuffle_vector(left, right, ir.Constant(ir.VectorType(I32, 64), lanes))


def interleave_lines(b, rows):
    """Four <64 x i8> -> 4 x <16 x i32>: lane 4 l + i of register r holds byte 16 l + 4 r + i of every row."""
    registers = []
    for high in (0, 1):
        left, right = (unpack(b, rows[at], rows[at + 1], 1, high) for at in (0, 2))
        registers += [b.bitcast(unpack(b, left, right, 2, upper), VI32) for upper in (0, 1)]
    return registers


def interleave_nibbles(b, rows):
    """Four <16 x i8> -> (low nibbles, high nibbles), <16 x i32>: lane i holds those of byte i of every row."""
    wide = ir.VectorType(I32, 32)
    halves = [b.shuffle_vector(rows[at], rows[at + 1], ir.Constant(wide, list(range(32)))) for at in (0, 2)]
    order = [16 * row + byte for byte in range(16) for row in range(4)]
    both = b.shuffle_vector(*halves, ir.Constant(ir.VectorType(I32, 64), order))
    both, nibbles = b.bitcast(both, VI32), constant(VI32, 0x0F0F0F0F)
    return [b.and_(both, nibbles), b.and_(b.lshr(both, constant(VI32, 4)), nibbles)]


def registers_of(b, isa: Isa, kv_dtype: str, load):
    """What weights multiply: the line of the rows taken at once, where load(row, type) reads one of them."""
    if kv_dtype == "q8":
        return interleave_lines(b, [load(row, V64I8) for row in range(4)])
    if kv_dtype == "q4":
        return interleave_nibbles(b, [load(row, VI8) for row in range(4)])
    if kv_dtype == "fp32":
        return [load(0, VF32)]
    if isa.has_bf16:
        return interleave(b, load(0, V32I16), load(1, V32I16))
    pairs = load(0, VI32)
    return [low_halves(b, pairs), high_halves(b, pairs)]


def value_strip(isa: Isa, kv_dtype: str, heads: int):
    """Function: acc[head] = acc[head] * correction[head] + sum_key weight[head][key] * V[key] for one line of V.

    weights: of plain rows as softmax_tile leaves them, HEAD_SCORES apart; of codes two planes, HEAD_WEIGHTS apart,
    whose sums are also multiplied and offset by the head's scalars. `ahead` is where the next tile's share of V begins.
    """
    shape, together, split = RowShape.of(kv_dtype), rows_at_once(isa, kv_dtype), Split(isa)
    parts, has_codes, item_bytes = shape.parts, shape.has_codes, 4 // shape.word_items
    planes = (0, WEIGHT_PLANE) if has_codes else (0,)
    weight_bytes, fetched = HEAD_WEIGHTS if has_codes else HEAD_SCORES, together * shape.line_bytes
    tile = types.UniTuple(F32x16, heads * parts * len(planes))
    zero_tile, line_items = zeros(tile.count), shape.line_items

    def multiplied(b, total, value, weight):
        if together == 2:
            return emit_dot_bf16(isa, b, total, value, weight)
        return fma_value(b, value, b.bitcast(weight, VF32), total)

    def code_product(b, total, values, weight, plane):
        values = split.values(b, values)
        return b.bitcast(split.value_dot(b, b.bitcast(total, VI32), values[plane], weight), VF32)

    def accumulate(b, sums, values, weights):
        index = 0
        for head in range(heads):
            for plane, offset in enumerate(planes):
                weight = splat_value(b, load_as(b, weights, I32, weight_bytes * head + offset))
                for value in values:
                    total = b.extract_value(sums, index)
                    if has_codes:
                        total = code_product(b, total, value, weight, plane)
                    else:
                        total = multiplied(b, total, value, weight)
                    sums, index = b.insert_value(sums, total, index), index + 1
        return sums

    def row_address(b, row, row_bytes, last, number):
        number = ir.Constant(I64, number)
        return b.add(row, b.mul(row_bytes, b.select(b.icmp_signed("<", number, last), number, last)))

    @emits(tile, tile, intp, intp, intp, intp)
    def whole_line(b, sums, row, row_bytes, last, weights):
        values = registers_of(
            b, isa, kv_dtype, lambda number, kind: load_as(b, row_address(b, row, row_bytes, last, number), kind)
        )
        return accumulate(b, sums, values, weights)

    @emits(tile, tile, intp, intp, intp, intp, intp)
    def part_line(b, sums, row, row_bytes, last, weights, count):
        def load(number, kind):
            line = masked_line(b, row_address(b, row, row_bytes, last, number), count, item_bytes)
            return b.bitcast(line, kind)

        return accumulate(b, sums, registers_of(b, isa, kv_dtype, load), weights)

    @emits(types.void, tile, intp, intp, intp)
    def add_to_acc(b, sums, acc, acc_stride, scalars):
        for head in range(heads):
            correction, scale, offset = (
                splat_value(b, load_as(b, scalars, F32, HEAD_SCALARS * head + 4 * field)) for field in range(3)
            )
            at = b.add(acc, b.mul(acc_stride, ir.Constant(I64, head)))
            for part in range(parts):
                first = head * parts * len(planes) + part
                total = b.extract_value(sums, first)
                if has_codes:
                    two = [b.bitcast(b.extract_value(sums, index), VI32) for index in (first, first + parts)]
                    total = fma_value(b, b.sitofp(split.whole(b, *two), VF32), scale, offset)
                before = load_as(b, at, VF32, LINE_BYTES * part)
                store_as(b, fma_value(b, before, correction, total), at, LINE_BYTES * part)

    @helper
    def strip(acc, acc_stride, scalars, row, row_bytes, keys, weights, count, ahead):
        sums = zero_tile()
        if has_codes or count >= line_items:
            for key in range(0, keys, together):
                sums = whole_line(sums, row, row_bytes, keys - 1 - key, weights)
                for offset in range(0, fetched, LINE_BYTES):
                    fetch(ahead + offset)
                row, weights, ahead = row + together * row_bytes, weights + 4, ahead + fetched
        else:
            for key in range(0, keys, together):
                sums = part_line(sums, row, row_bytes, keys - 1 - key, weights, count)
                row, weights = row + together * row_bytes, weights + 4
        add_to_acc(sums, acc, acc_stride, scalars)

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
