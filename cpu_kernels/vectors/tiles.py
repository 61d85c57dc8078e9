"""Tuples of vectors as register tiles: their start and their way to memory."""

from contextlib import nullcontext

from llvmlite import ir
from numba import types
from numba.core import cgutils

from cpu_kernels.vectors.vector import (
    F32,
    I16,
    I32,
    I64,
    LANES,
    VF32,
    VI32,
    F32x16,
    constant,
    emits,
    float_vector,
    intp,
    lanes_below,
    load_as,
    masked_load,
    store_as,
)

ZERO64 = ir.Constant(I64, 0)


def masked_line(b, address, count, item_bytes):
    """<16 x i32> whose first `count` items of 2 or 4 bytes are read and the rest are 0 without touching memory."""
    if item_bytes == 4:
        return masked_load(b, address, VI32, lanes_below(b, count), "v16i32")
    halves, lanes = ir.VectorType(I16, 2 * LANES), ir.VectorType(I32, 2 * LANES)
    first = b.insert_element(ir.Constant(lanes, ir.Undefined), b.trunc(count, I32), ir.Constant(I32, 0))
    limit = b.shuffle_vector(first, first, ir.Constant(lanes, [0] * lanes.count))
    mask = b.icmp_signed("<", ir.Constant(lanes, list(range(lanes.count))), limit)
    return b.bitcast(masked_load(b, address, halves, mask, "v32i16"), VI32)


def zeros(count: int, lanes: int = LANES):
    """Intrinsic () -> tuple of `count` zero vectors."""
    vector = float_vector(lanes)

    @emits(types.UniTuple(vector, count))
    def zero_tile(b):
        value = ir.Constant(ir.ArrayType(vector.be_type, count), ir.Undefined)
        for index in range(count):
            value = b.insert_value(value, constant(vector.be_type, 0.0), index)
        return value

    return zero_tile


def sums_so_far(count: int):
    """Intrinsic (out, out_stride, goes_on) -> tuple of `count` vectors: row r of out, or zeros if `goes_on` is 0."""
    tile = types.UniTuple(F32x16, count)

    @emits(tile, intp, intp, intp)
    def begin(b, out, out_stride, goes_on):
        value, wanted = ir.Constant(ir.ArrayType(VF32, count), ir.Undefined), b.icmp_signed("!=", goes_on, ZERO64)
        for index in range(count):
            before = load_as(b, b.add(out, b.mul(out_stride, ir.Constant(I64, index))), VF32)
            value = b.insert_value(value, b.select(wanted, before, constant(VF32, 0.0)), index)
        return value

    return begin


def add_where(b, value, source, wanted):
    """value + what is at `source` if `wanted` is not 0, else value. `value` is any float LLVM vector."""
    before = b.block
    with b.if_then(b.icmp_signed("!=", wanted, ZERO64)):
        added = b.fadd(value, load_as(b, source, value.type))
        inside = b.block
    merged = b.phi(value.type)
    merged.add_incoming(value, before)
    merged.add_incoming(added, inside)
    return merged


def add_and_store(b, value, bias, out, accumulate):
    """out = value + bias, or out += that; bias 0 means none. `value` is any float LLVM vector."""
    store_as(b, add_where(b, add_where(b, value, bias, bias), out, accumulate), out)


def finish_features(rows: int):
    """Intrinsic (tile, bias, out, out_stride, accumulate, kept): row r's 16 features go to out + r * out_stride.

    kept: `rows`, or fewer, more than a half, where the last ones only fill the tile.
    """
    tile = types.UniTuple(F32x16, rows)

    @emits(types.void, tile, intp, intp, intp, intp, intp)
    def store_features(b, sums, bias, out, out_stride, accumulate, kept):
        for row in range(rows):
            at = b.add(out, b.mul(out_stride, ir.Constant(I64, row)))
            with b.if_then(b.icmp_signed("<", ir.Constant(I64, row), kept)) if row > rows // 2 else nullcontext():
                add_and_store(b, b.extract_value(sums, row), bias, at, accumulate)

    return store_features


def finish_dots(features: int, rows: int, lanes: int = LANES):
    """Intrinsic (tile, bias, out, out_stride, accumulate, kept) for a tile whose vectors, of 16 lanes or 8, are partial
    sums of one dot product.

    Vector row * features + f is summed over its lanes into out + row * out_stride + 4 * f. kept: as `finish_features`.
    """
    tile = types.UniTuple(float_vector(lanes), features * rows)

    @emits(types.void, tile, intp, intp, intp, intp, intp)
    def store_dots(b, sums, bias, out, out_stride, accumulate, kept):
        vectors = [b.extract_value(sums, index) for index in range(features * rows)]
        for row, value in enumerate(sum_rows(b, vectors, features)):
            at = b.add(out, b.mul(out_stride, ir.Constant(I64, row)))
            with b.if_then(b.icmp_signed("<", ir.Constant(I64, row), kept)) if row > rows // 2 else nullcontext():
                add_and_store(b, value, bias, at, accumulate)

    return store_dots


def fold_lanes(width):
    """Which of the 32 lanes of two vectors hold lower halves of their `width`-lane segments, in an order cheap to pick.

    Down to 128-bit lanes whole lanes move; inside a lane the two vectors alternate, so that one shuffle does it.
    """
    if width > 4:
        return [lane for lane in range(2 * LANES) if lane % width < width // 2]
    picked = []
    for quad in range(0, LANES, 4):
        for vector in (0, LANES):
            picked += [vector + quad + lane for lane in range(4) if lane % width < width // 2]
    return picked


def sum_each(b, vectors):
    """<n x float> of the lane sums of n vectors of 16 lanes or 8, in order; n is 8 or 16.

    Neighbours fold into one vector that holds half sums of both, until one is left; `owners` says whose sum a lane is.
    Two vectors of 8 lanes are one of 16 that two own.
    """
    width = vectors[0].type.count
    pieces = [(vector, [index] * width) for index, vector in enumerate(vectors)]
    if width < LANES:
        both = ir.Constant(VI32, list(range(LANES)))
        pieces = [
            (b.shuffle_vector(left, right, both), left_owners + right_owners)
            for (left, left_owners), (right, right_owners) in zip(pieces[::2], pieces[1::2])
        ]
    while len(pieces) > 1:
        low = fold_lanes(width)
        masks = [ir.Constant(VI32, [lane + shift for lane in low]) for shift in (0, width // 2)]
        folded = []
        for (left, left_owners), (right, right_owners) in zip(pieces[::2], pieces[1::2]):
            value = b.fadd(*(b.shuffle_vector(left, right, mask) for mask in masks))
            folded.append((value, [(left_owners + right_owners)[lane] for lane in low]))
        pieces, width = folded, width // 2
    value, owners = pieces[0]
    if width == 2:
        swapped = b.shuffle_vector(value, value, ir.Constant(VI32, [lane ^ 1 for lane in range(LANES)]))
        value = b.fadd(value, swapped)
    order = ir.Constant(ir.VectorType(I32, len(vectors)), [owners.index(index) for index in range(len(vectors))])
    return b.shuffle_vector(value, value, order)


def sum_rows(b, vectors, features):
    """For every `features` (a divisor of 16) vectors, one <features x float> of their lane sums."""
    if len(vectors) < LANES // 2:
        return [sum_few(b, vectors[at : at + features]) for at in range(0, len(vectors), features)]
    half = LANES // 2
    padded = vectors + [constant(vectors[0].type, 0.0)] * (-len(vectors) % half)
    rows = []
    for start in range(0, len(padded), LANES):
        sums = sum_each(b, padded[start : start + LANES])
        for at in range(0, min(LANES, len(vectors) - start), features):
            rows.append(
                b.shuffle_vector(sums, sums, ir.Constant(ir.VectorType(I32, features), list(range(at, at + features))))
            )
    return rows


def sum_few(b, vectors):
    """<n x float> of the lane sums of n vectors."""
    value = ir.Constant(ir.VectorType(F32, len(vectors)), ir.Undefined)
    reduce = cgutils.get_or_insert_function(
        b.module, ir.FunctionType(F32, [F32, VF32]), "llvm.vector.reduce.fadd.v16f32"
    )
    for index, vector in enumerate(vectors):
        total = b.call(reduce, [ir.Constant(F32, -0.0), vector], fastmath=("reassoc",))
        value = b.insert_element(value, total, ir.Constant(I32, index))
    return value
