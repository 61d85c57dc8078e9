"""Attention over pages of codes: the parts that rows of plain numbers do not need.

    s = scale_q (sum_g scale_g sum_d q_d code_d + sum_g minimum_g sum_d q_d)     q in 16 bits per head
    out = sum_t (p_t scale_tg) code_t + sum_t p_t minimum_tg                     p scale in 16 bits per tile, group

16 bits hold q to 2**-16 of its largest, and p * scale to 2**-15 or better, because a tile's largest p is above
1/2. They are kept as two planes of words, see vectors/split_dot.py.
"""

import numpy as np
from llvmlite import ir

from cpu_kernels.attention.parameters import (
    HEAD_SCALARS,
    HEAD_SCORES,
    HEAD_WEIGHTS,
    KEY_TILE,
    LINE_BYTES,
    OFFSET_OF_STRIP,
    SCALE_OF_STRIP,
    WEIGHT_OF_TILE,
    RowShape,
)
from cpu_kernels.attention.products.row_vectors import as_bf16, load_bf16_scalar, load_every_second, widen_line
from cpu_kernels.formats.pages import GROUP_DIMS
from cpu_kernels.vectors.arithmetic import add, fma, max_lanes, mul, round_even, sum_lanes, vabs, vmax
from cpu_kernels.vectors.compiler import helper
from cpu_kernels.vectors.dot import V32I16
from cpu_kernels.vectors.isa import Isa
from cpu_kernels.vectors.scalar import load_scalar, store_scalar
from cpu_kernels.vectors.split_dot import Split
from cpu_kernels.vectors.tiles import masked_line
from cpu_kernels.vectors.vector import (
    F32,
    I16,
    I32,
    I64,
    call_llvm,
    constant,
    emits,
    float32,
    intp,
    load_bf16_tail,
    load_f32,
    load_f32_tail,
    splat,
    store_f32,
)

ZERO, ONE, INFINITY = np.float32(0.0), np.float32(1.0), np.float32(np.inf)
SMALLEST = np.float32(1e-30)  # below, the division might overflow, and x is nothing beside any output


@helper
def code_scale(largest, code):
    """(what to multiply numbers up to `largest` by, so that they become codes up to `code`; what undoes it)."""
    if largest > SMALLEST:
        return code / largest, largest / code
    return ZERO, ZERO


def q_code_writer(isa: Isa, kv_dtype: str, words: int):
    """Function: one query head, rounded to bf16, as code_dots takes it, and its scale and sums per group.

    scratch: float32 [64], written.
    """
    group_dims, shape = GROUP_DIMS[kv_dtype], RowShape.of(kv_dtype)
    plane, block_groups = 4 * words, words // shape.group_words
    block_bytes, group_bytes, is_q4 = shape.planes * plane, 4 * shape.group_words, kv_dtype == "q4"
    store, largest_q = Split(isa).store_q(), np.float32(Split(isa).largest_q)

    @helper
    def load_q(source, head_dim, groups, to, scale_at, sums, scratch):
        largest = splat(ZERO)
        for i in range(0, head_dim, 16):
            largest = vmax(vabs(as_bf16(load_f32_tail(source + 4 * i, head_dim - i))), largest)
        factor, scale = code_scale(max_lanes(largest), largest_q)
        store_scalar(scale, scale_at)
        for group in range(groups):
            total = splat(ZERO)
            for i in range(0, group_dims, 16):
                at = group * group_dims + i
                code = round_even(mul(as_bf16(load_f32_tail(source + 4 * at, head_dim - at)), splat(factor)))
                store_f32(code, scratch + 4 * i)
                total = add(total, code)
            store_scalar(sum_lanes(total), sums + 4 * group)
            block = group // block_groups
            target = to + block_bytes * block + group_bytes * (group - block * block_groups)
            if is_q4:
                store(load_every_second(scratch, 0), target, plane)
                store(load_every_second(scratch, 1), target + 2 * plane, plane)
            else:
                for part in range(4):
                    store(load_f32(scratch + 64 * part), target + 16 * part, plane)

    return load_q


@helper
def widen_numbers(source, groups, stride, keys, to):
    """Scales or minima of a tile's keys, bf16 [groups, page_size] -> float32 [groups, 64], 0 beyond the keys."""
    for group in range(groups):
        for part in range(4):
            value = load_bf16_tail(source + group * stride + 32 * part, keys - 16 * part)
            store_f32(value, to + 4 * KEY_TILE * group + 64 * part)


@emits(float32, intp, intp)
def largest_scale(b, scales, keys):
    """The largest size of 64 scales, of which `keys` are read; one that is infinite or not a number comes out as such.

    Without their signs, the bits of bf16 are whole numbers in the same order, and what is not a number is above all.
    """
    bits = []
    for first in (0, 32):
        at, left = b.add(scales, ir.Constant(I64, 2 * first)), b.sub(keys, ir.Constant(I64, first))
        bits.append(b.and_(b.bitcast(masked_line(b, at, left, 2), V32I16), constant(V32I16, 0x7FFF)))
    larger = b.select(b.icmp_unsigned(">", *bits), *bits)
    largest = b.zext(call_llvm(b, "llvm.vector.reduce.umax.v32i16", I16, larger), I32)
    return b.bitcast(b.shl(largest, ir.Constant(I32, 16)), F32)


@helper
def add_minima(scores, minima, sums, groups):
    """scores[64] += sum of minimum * (sum of the head's q codes) over the groups."""
    for part in range(4):
        total = load_f32(scores + 64 * part)
        for group in range(groups):
            total = fma(
                load_f32(minima + 4 * KEY_TILE * group + 64 * part), splat(load_scalar(sums + 4 * group)), total
            )
        store_f32(total, scores + 64 * part)


def code_weights(isa: Isa, kv_dtype: str):
    """Function: every head's weights for one group of V, p * scale in 16 bits, and the scalars that undo it.

    p is at most 1, WEIGHT_OF_TILE apart, so all heads share the factor that takes the largest scale to the largest
    weight. A scale that is not a number shows in the result. One of q4 is below 0 where the minimum, rounded, is above
    all numbers of its group; weights that must be positive take it as 0, which leaves the minimum, a rounding away.
    """
    has_minimum = RowShape.of(kv_dtype).numbers == 2
    needs_positive = has_minimum and Split(isa).takes_bytes
    store, largest_weight = Split(isa).store_weights(), np.float32(Split(isa).largest_weight)

    @helper
    def numbers_of(source, keys):
        s0, s1 = load_bf16_tail(source, keys), load_bf16_tail(source + 32, keys - 16)
        return s0, s1, load_bf16_tail(source + 64, keys - 32), load_bf16_tail(source + 96, keys - 48)

    @helper
    def weights_of(scores, heads, scales, minima, keys, weights, scalars):
        largest = largest_scale(scales, keys)
        factor, undo = code_scale(largest, largest_weight)
        if not largest < INFINITY:
            undo = largest - largest
        s0, s1, s2, s3 = numbers_of(scales, keys)
        if needs_positive:
            zero = splat(ZERO)
            s0, s1, s2, s3 = vmax(s0, zero), vmax(s1, zero), vmax(s2, zero), vmax(s3, zero)
        factors = splat(factor)
        s0, s1, s2, s3 = mul(s0, factors), mul(s1, factors), mul(s2, factors), mul(s3, factors)
        for head in range(heads):
            to = scalars + HEAD_SCALARS * head
            store(scores + HEAD_SCORES * head, s0, s1, s2, s3, weights + HEAD_WEIGHTS * head)
            store_scalar(undo * load_scalar(to + WEIGHT_OF_TILE), to + SCALE_OF_STRIP)
            store_scalar(ZERO, to + OFFSET_OF_STRIP)
        if has_minimum:
            m0, m1, m2, m3 = numbers_of(minima, keys)
            for head in range(heads):
                at, to = scores + HEAD_SCORES * head, scalars + HEAD_SCALARS * head
                low = fma(load_f32(at), m0, mul(load_f32(at + 64), m1))
                high = fma(load_f32(at + 128), m2, mul(load_f32(at + 192), m3))
                store_scalar(sum_lanes(add(low, high)) * load_scalar(to + WEIGHT_OF_TILE), to + OFFSET_OF_STRIP)

    return weights_of


def tile_widener(kv_dtype: str):
    """Function: rows of codes -> rows of bf16, [keys][lines] of 64 bytes: what prefill multiplies."""
    shape = RowShape.of(kv_dtype)
    group_bytes, has_minimum = shape.line_bytes, shape.numbers == 2
    group_lines, line_bytes = shape.line_items // 32, shape.line_bytes * 32 // shape.line_items
    widen = widen_line(kv_dtype)

    @helper
    def widen_rows(codes, row_bytes, numbers, stride, keys, groups, to):
        for key in range(keys):
            for group in range(groups):
                at = numbers + stride * group + 2 * key
                scale = load_bf16_scalar(at)
                minimum = load_bf16_scalar(at + stride * groups) if has_minimum else ZERO
                for line in range(group_lines):
                    source = codes + key * row_bytes + group_bytes * group + line_bytes * line
                    target = to + LINE_BYTES * ((key * groups + group) * group_lines + line)
                    widen(source, scale, minimum, target)

    return widen_rows
