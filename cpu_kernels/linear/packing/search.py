"""Scales and minima of least squared error, of eight features' groups at once, and their codes in packed lines.

Where a feature's error no longer falls, a further fit finds the same scale and minimum again and changes nothing, so
that lanes need not be told apart.
"""

import numpy as np
from llvmlite import ir
from numba import types

from cpu_kernels.formats import BLOCK_FEATURES, LINE_BYTES
from cpu_kernels.linear.packing.group_fit import (
    VF32,
    VI32,
    codes_of,
    differences,
    error_and_sums,
    error_of,
    extremes,
    half_value,
    inverse_value,
    least_squares,
    magnitudes,
    signed_code,
    store_halves,
    sums_of,
    value_at,
    word_of,
)
from cpu_kernels.vectors.compiler import helper
from cpu_kernels.vectors.vector import I32, F32x8, call_llvm, constant, emits, float32, intp, splat_value, store_as

SHRINKS = 4
SHRINK = np.float32(0.025)  # of the range, each time and side; a 7 x 7 grid finds 0.2 % less error in twice the time
REFITS = 3
Q8_SHRINKS = 5
MOST_Q4, MOST_Q8 = 15.0, 127.0
STEP_Q4 = np.float32(1.0 / MOST_Q4)
HALF_LINE = LINE_BYTES // 2  # of a stage or a packed line: eight features

error_q4, error_q8 = error_of(64, MOST_Q4), error_of(32, MOST_Q8)
sums_q4, error_and_sums_q4 = sums_of(MOST_Q4), error_and_sums(MOST_Q4)


@emits(F32x8, float32)
def splat(b, scalar):
    """float32 in every lane."""
    return splat_value(b, scalar, VF32.count)


@emits(F32x8, F32x8)
def as_half(b, vector):
    """Rounded to float16, within its range."""
    return half_value(b, vector)


@emits(F32x8, F32x8, F32x8)
def share_of_range(b, smallest, largest):
    """SHRINK of it."""
    return b.fmul(constant(VF32, float(SHRINK)), b.fsub(largest, smallest))


@emits(F32x8, F32x8, F32x8, float32)
def raised(b, smallest, share, times):
    """A minimum above the smallest by so many shares, as float16 has it."""
    return half_value(b, b.fadd(smallest, b.fmul(splat_value(b, times, VF32.count), share)))


@emits(F32x8, F32x8, F32x8, float32, F32x8)
def scale_below(b, largest, share, times, minimum):
    """That of the range from a minimum to so many shares below the largest, as float16 has it."""
    top = b.fsub(largest, b.fmul(splat_value(b, times, VF32.count), share))
    return half_value(b, b.fmul(b.fsub(top, minimum), constant(VF32, float(STEP_Q4))))


@emits(F32x8, F32x8, float32)
def divided(b, vector, divisor):
    """Each lane, as float16 has it."""
    return half_value(b, b.fdiv(vector, splat_value(b, divisor, VF32.count)))


@emits(F32x8, F32x8, F32x8, F32x8, F32x8)
def chosen(b, error, best, new, old):
    """`new` in the lanes whose error is below the best, `old` in the others."""
    return b.select(b.fcmp_ordered("<", error, best), new, old)


@emits(types.int64, F32x8, F32x8)
def any_below(b, error, best):
    """Whether a lane's error is below the best."""
    found = b.zext(b.fcmp_ordered("<", error, best), ir.VectorType(I32, VF32.count))
    return b.zext(call_llvm(b, f"llvm.vector.reduce.or.v{VF32.count}i32", I32, found), ir.IntType(64))


@emits(types.void, intp, F32x8, F32x8, intp)
def store_codes_q4(b, stage, scale, minimum, to):
    """Codes 0..15 of 64 inputs: the 8 lines after the superblock's first."""
    inverse = inverse_value(b, scale)
    for line in range(8):
        values = [b.fsub(value_at(b, stage, 8 * line + place), minimum) for place in range(8)]
        codes = codes_of(b, values, inverse, MOST_Q4)
        low, high = word_of(b, codes[:4]), word_of(b, codes[4:])
        store_as(b, b.or_(low, b.shl(high, constant(VI32, 4))), to, LINE_BYTES * (1 + line))


@emits(types.void, intp, F32x8, intp)
def store_codes_q8(b, stage, scale, to):
    """Codes -127..127 of 32 inputs, with 128 added: eight lines."""
    inverse, added = inverse_value(b, scale), constant(VF32, 128.0)
    for line in range(8):
        values = [value_at(b, stage, 4 * line + place) for place in range(4)]
        codes = [b.fadd(signed_code(b, value, inverse, MOST_Q8), added) for value in values]
        store_as(b, word_of(b, codes), to, LINE_BYTES * line)


@helper
def search_q4(stage, spare):
    """(scale, minimum), float16 values, of least squared error found for 64 inputs of eight features; `spare` is memory
    as large as the stage."""
    smallest, largest = extremes(stage)
    share = share_of_range(smallest, largest)
    best, best_scale, best_minimum = splat(np.float32(np.inf)), splat(np.float32(0.0)), as_half(smallest)
    for up in range(SHRINKS):
        minimum = raised(smallest, share, np.float32(up))
        differences(stage, minimum, spare)
        for down in range(SHRINKS):
            scale = scale_below(largest, share, np.float32(down), minimum)
            (error,) = error_q4(stage, spare, scale, minimum)
            best_scale, best_minimum = (
                chosen(error, best, scale, best_scale),
                chosen(error, best, minimum, best_minimum),
            )
            best = chosen(error, best, error, best)
    sum_v, sum_c, sum_cc, sum_cv = sums_q4(stage, spare, best_scale, best_minimum)
    for _ in range(REFITS):
        scale, minimum = least_squares(best_scale, best_minimum, sum_v, sum_c, sum_cc, sum_cv)
        error, new_c, new_cc, new_cv = error_and_sums_q4(stage, spare, scale, minimum)
        if not any_below(error, best):
            break
        best_scale = chosen(error, best, scale, best_scale)
        best_minimum = chosen(error, best, minimum, best_minimum)
        sum_c, sum_cc = chosen(error, best, new_c, sum_c), chosen(error, best, new_cc, sum_cc)
        sum_cv, best = chosen(error, best, new_cv, sum_cv), chosen(error, best, error, best)
    return best_scale, best_minimum


@helper
def search_q8(stage, spare):
    """Scale, a float16 value, of least squared error found for 32 inputs of eight features."""
    largest, zero = magnitudes(stage, spare), splat(np.float32(0.0))
    best, best_scale = splat(np.float32(np.inf)), zero
    for shrink in range(Q8_SHRINKS):
        scale = divided(largest, np.float32(126.0) + np.float32(0.5) * np.float32(shrink))
        (error,) = error_q8(spare, spare, scale, zero)
        best_scale, best = chosen(error, best, scale, best_scale), chosen(error, best, error, best)
    return best_scale


@helper
def pack_group_q4(stage, spare, to):
    """64 inputs of 16 features on a stage into the superblock at `to`."""
    for half in range(2):
        inputs, halves = stage + HALF_LINE * half, to + HALF_LINE // 2 * half
        scale, minimum = search_q4(inputs, spare)
        store_halves(scale, halves)
        store_halves(minimum, halves + 2 * BLOCK_FEATURES)
        store_codes_q4(inputs, scale, minimum, to + HALF_LINE * half)


@helper
def pack_group_q8(stage, spare, to):
    """64 inputs of 16 features on a stage into the superblock at `to`."""
    for part in range(4):
        run, half = part // 2, part % 2
        inputs = stage + 32 * LINE_BYTES * run + HALF_LINE * half
        scale = search_q8(inputs, spare)
        store_halves(scale, to + 2 * BLOCK_FEATURES * run + HALF_LINE // 2 * half)
        store_codes_q8(inputs, scale, to + LINE_BYTES * (1 + 8 * run) + HALF_LINE * half)
