"""Packing: rows of fp32, bf16 or fp16 weights into the blocks of formats/weights.py, one block per chunk.

q8: of a few scales around absmax / 127, the one of least squared error. q4: of a grid of ranges inside [min, max], the
one of least squared error, then the scale and minimum that fit its codes best (least squares) and the codes that fit
those, as long as the error falls. Scale and minimum are rounded to float16 before codes are chosen, so the error that
is compared is the error that the stored bytes have. A value that is not finite fails the call.
"""

import numpy as np
from llvmlite import ir
from numba import types

from cpu_kernels.formats.weights import BLOCK_FEATURES, GROUP_INPUTS, LINE_BYTES, SUPERBLOCK_LINES
from cpu_kernels.team.arguments import PACK
from cpu_kernels.team.chunks import fail, parameter, take
from cpu_kernels.vectors.arithmetic import (
    add,
    fma,
    max_lanes,
    min_lanes,
    mul,
    round_even,
    sub,
    sum_lanes,
    vabs,
    vmax,
    vmin,
)
from cpu_kernels.vectors.compiler import helper
from cpu_kernels.vectors.vector import (
    F32,
    HALF,
    I32,
    VF32,
    VI8,
    VI32,
    F32x16,
    call_llvm,
    constant,
    emits,
    float32,
    intp,
    load_bf16_tail,
    load_f32_tail,
    load_half_tail,
    splat,
    store_as,
    store_bf16_tail,
    store_f32_tail,
)

ZERO, ONE = np.float32(0.0), np.float32(1.0)
HALF_MAX = 65504.0
SHRINKS = 4
SHRINK = np.float32(0.025)  # of the range, each time and side; a 7 x 7 grid finds 0.2 % less error in twice the time
REFITS = 3


@emits(types.int64, F32x16, F32x16, F32x16, F32x16)
def not_finite(b, v0, v1, v2, v3):
    """1 if any lane is NaN, infinite or beyond float16's largest scale, 15 * 65504."""
    largest = constant(VI32, 0)
    for vector in (v0, v1, v2, v3):
        magnitude = b.and_(b.bitcast(vector, VI32), constant(VI32, 0x7FFFFFFF))
        largest = b.select(b.icmp_signed(">", magnitude, largest), magnitude, largest)
    absmax = call_llvm(b, "llvm.vector.reduce.smax.v16i32", I32, largest)
    return b.zext(b.icmp_signed(">=", absmax, ir.Constant(I32, 0x7F800000)), ir.IntType(64))


@emits(float32, float32)
def half_scalar(b, value):
    """A float32 rounded to float16, within its finite range."""
    for most, sign in ((ir.Constant(F32, HALF_MAX), "<"), (ir.Constant(F32, -HALF_MAX), ">")):
        value = b.select(b.fcmp_ordered(sign, most, value), most, value)
    return b.fpext(b.fptrunc(value, HALF), F32)


@emits(types.void, float32, intp)
def store_half_scalar(b, value, address):
    """One float16."""
    store_as(b, b.fptrunc(value, HALF), address)


def code_words(b, vectors):
    """Four float vectors of codes -> <16 x i32> of their 64 bytes in order."""
    parts = [b.trunc(b.fptosi(vector, VI32), VI8) for vector in vectors]
    pick = lambda count: ir.Constant(ir.VectorType(I32, count), list(range(count)))  # noqa: E731
    low, high = b.shuffle_vector(parts[0], parts[1], pick(32)), b.shuffle_vector(parts[2], parts[3], pick(32))
    return b.bitcast(b.shuffle_vector(low, high, pick(64)), VI32)


@emits(types.void, F32x16, F32x16, F32x16, F32x16, intp)
def store_codes_q4(b, v0, v1, v2, v3, address):
    """Codes 0..15 of one feature and group: word j of the 8 lines after the superblock's first, 64 bytes apart."""
    words = code_words(b, (v0, v1, v2, v3))
    for line in range(8):
        low, high = (b.extract_element(words, ir.Constant(I32, 2 * line + part)) for part in range(2))
        word = b.or_(low, b.shl(high, ir.Constant(I32, 4)))
        store_as(b, word, address, LINE_BYTES * (1 + line))


@emits(types.void, F32x16, F32x16, F32x16, F32x16, intp)
def store_codes_q8(b, v0, v1, v2, v3, address):
    """Codes -127..127 of one feature and group, stored with 128 added, in 16 lines."""
    shifted = [b.fadd(vector, constant(VF32, 128.0)) for vector in (v0, v1, v2, v3)]
    words = code_words(b, shifted)
    for line in range(16):
        store_as(b, b.extract_element(words, ir.Constant(I32, line)), address, LINE_BYTES * (1 + line))


@helper
def codes(vector, minimum, inverse, low, high):
    """round((vector - minimum) * inverse) clamped to low..high."""
    return vmin(vmax(round_even(mul(sub(vector, minimum), inverse)), low), high)


@helper
def squared_error(vector, code, scale, minimum, total):
    """total + (vector - (code * scale + minimum))^2."""
    difference = sub(vector, fma(code, scale, minimum))
    return fma(difference, difference, total)


@helper
def error_of(v0, v1, v2, v3, scale, minimum, low, high):
    """Squared error of four vectors quantised with this scale and minimum; codes clamped to low..high."""
    inverse = splat(ONE / scale if scale > ZERO else ZERO)
    s, m = splat(scale), splat(minimum)
    total, more = splat(ZERO), splat(ZERO)
    total = squared_error(v0, codes(v0, m, inverse, low, high), s, m, total)
    more = squared_error(v1, codes(v1, m, inverse, low, high), s, m, more)
    total = squared_error(v2, codes(v2, m, inverse, low, high), s, m, total)
    more = squared_error(v3, codes(v3, m, inverse, low, high), s, m, more)
    return sum_lanes(add(total, more))


@helper
def refit(v0, v1, v2, v3, scale, minimum):
    """The scale and minimum of least squares for the codes that (scale, minimum) chooses."""
    inverse = splat(ONE / scale if scale > ZERO else ZERO)
    m, low, high = splat(minimum), splat(ZERO), splat(np.float32(15.0))
    c0, c1 = codes(v0, m, inverse, low, high), codes(v1, m, inverse, low, high)
    c2, c3 = codes(v2, m, inverse, low, high), codes(v3, m, inverse, low, high)
    sum_c = sum_lanes(add(add(c0, c1), add(c2, c3)))
    sum_cc = sum_lanes(fma(c0, c0, fma(c1, c1, fma(c2, c2, mul(c3, c3)))))
    sum_v = sum_lanes(add(add(v0, v1), add(v2, v3)))
    sum_cv = sum_lanes(fma(c0, v0, fma(c1, v1, fma(c2, v2, mul(c3, v3)))))
    count = np.float32(GROUP_INPUTS)
    determinant = count * sum_cc - sum_c * sum_c
    if determinant <= ZERO:
        return scale, minimum
    fitted = (count * sum_cv - sum_c * sum_v) / determinant
    return fitted, (sum_v - fitted * sum_c) / count


@helper
def search_q4(v0, v1, v2, v3):
    """(scale, minimum), both float16 values, of least squared error found."""
    low, high = splat(ZERO), splat(np.float32(15.0))
    smallest, largest = min_lanes(vmin(vmin(v0, v1), vmin(v2, v3))), max_lanes(vmax(vmax(v0, v1), vmax(v2, v3)))
    less = SHRINK * (largest - smallest)
    best, best_scale, best_minimum = np.float32(np.inf), ZERO, half_scalar(smallest)
    for up in range(SHRINKS):
        minimum = half_scalar(smallest + np.float32(up) * less)
        for down in range(SHRINKS):
            scale = half_scalar((largest - np.float32(down) * less - minimum) * np.float32(1.0 / 15.0))
            error = error_of(v0, v1, v2, v3, scale, minimum, low, high)
            if error < best:
                best, best_scale, best_minimum = error, scale, minimum
    for _ in range(REFITS):
        scale, minimum = refit(v0, v1, v2, v3, best_scale, best_minimum)
        scale, minimum = half_scalar(scale), half_scalar(minimum)
        error = error_of(v0, v1, v2, v3, scale, minimum, low, high)
        if error >= best:
            break
        best, best_scale, best_minimum = error, scale, minimum
    return best_scale, best_minimum


@helper
def search_q8(v0, v1):
    """Scale, a float16 value, of least squared error found for 32 inputs."""
    zero, low, high = splat(ZERO), splat(np.float32(-127.0)), splat(np.float32(127.0))
    absmax = max_lanes(vmax(vabs(v0), vabs(v1)))
    best, best_scale = np.float32(np.inf), ZERO
    for shrink in range(5):
        scale = half_scalar(absmax / (np.float32(126.0) + np.float32(0.5) * np.float32(shrink)))
        error = error_of(v0, v1, zero, zero, scale, ZERO, low, high)
        if error < best:
            best, best_scale = error, scale
    return best_scale


@helper
def pack_group_q4(v0, v1, v2, v3, to, feature):
    """One feature's 64 inputs into the superblock at `to`."""
    scale, minimum = search_q4(v0, v1, v2, v3)
    inverse, m = splat(ONE / scale if scale > ZERO else ZERO), splat(minimum)
    low, high = splat(ZERO), splat(np.float32(15.0))
    store_half_scalar(scale, to + 2 * feature)
    store_half_scalar(minimum, to + 2 * BLOCK_FEATURES + 2 * feature)
    store_codes_q4(
        codes(v0, m, inverse, low, high),
        codes(v1, m, inverse, low, high),
        codes(v2, m, inverse, low, high),
        codes(v3, m, inverse, low, high),
        to + 4 * feature,
    )


@helper
def pack_group_q8(v0, v1, v2, v3, to, feature):
    """One feature's 64 inputs into the superblock at `to`."""
    zero, low, high = splat(ZERO), splat(np.float32(-127.0)), splat(np.float32(127.0))
    first, second = search_q8(v0, v1), search_q8(v2, v3)
    store_half_scalar(first, to + 2 * feature)
    store_half_scalar(second, to + 2 * BLOCK_FEATURES + 2 * feature)
    a, b = splat(ONE / first if first > ZERO else ZERO), splat(ONE / second if second > ZERO else ZERO)
    store_codes_q8(
        codes(v0, zero, a, low, high),
        codes(v1, zero, a, low, high),
        codes(v2, zero, b, low, high),
        codes(v3, zero, b, low, high),
        to + 4 * feature,
    )


def pack(source_dtype: str, weight_dtype: str):
    load = {"fp32": load_f32_tail, "bf16": load_bf16_tail, "fp16": load_half_tail}[source_dtype]
    source_bytes = 4 if source_dtype == "fp32" else 2
    is_row_major = weight_dtype not in SUPERBLOCK_LINES
    store = store_f32_tail if weight_dtype == "fp32" else store_bf16_tail
    item_bytes = 4 if weight_dtype == "fp32" else 2
    superblock_bytes = SUPERBLOCK_LINES.get(weight_dtype, 0) * LINE_BYTES
    pack_group = pack_group_q4 if weight_dtype == "q4" else pack_group_q8

    @helper
    def pack_row(source, in_features, to, feature):
        """One feature into its block; False if a value is not finite."""
        for first in range(0, in_features, GROUP_INPUTS):
            at, left = source + source_bytes * first, in_features - first
            v0, v1 = load(at, left), load(at + 16 * source_bytes, left - 16)
            v2, v3 = load(at + 32 * source_bytes, left - 32), load(at + 48 * source_bytes, left - 48)
            if not_finite(v0, v1, v2, v3):
                return False
            if is_row_major:
                target = to + item_bytes * (feature * in_features + first)
                store(v0, target, left)
                store(v1, target + 16 * item_bytes, left - 16)
                store(v2, target + 32 * item_bytes, left - 32)
                store(v3, target + 48 * item_bytes, left - 48)
            else:
                pack_group(v0, v1, v2, v3, to + first // GROUP_INPUTS * superblock_bytes, feature)
        return True

    def kernel(arguments, thread):
        rows, stride, num_blocks = (
            parameter(arguments, PACK.rows),
            parameter(arguments, PACK.row_bytes),
            parameter(arguments, PACK.num_blocks),
        )
        in_features, out, block_bytes = (
            parameter(arguments, PACK.in_features),
            parameter(arguments, PACK.out),
            parameter(arguments, PACK.block_bytes),
        )
        block = take(arguments, 0)
        while block < num_blocks:
            for feature in range(BLOCK_FEATURES):
                source = rows + (block * BLOCK_FEATURES + feature) * stride
                if not pack_row(source, in_features, out + block * block_bytes, feature):
                    fail(arguments, 1)
            block = take(arguments, 0)

    return kernel
