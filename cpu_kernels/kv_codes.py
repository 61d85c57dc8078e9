"""Attention over pages of codes: the parts that rows of plain numbers do not need.

    s = scale_q (sum_g scale_g sum_d q_d code_d + sum_g minimum_g sum_d q_d)     q as int16 per head
    out = sum_t (p_t scale_tg) code_t + sum_t p_t minimum_tg                     p scale as int16 per head, tile, group

16 bits hold q and p * scale to 2**-16 of their largest, so nothing is lost that float32 would keep in the sum.
"""

import numpy as np

from .attention_layout import HEAD_SCALARS, HEAD_SCORES, HEAD_WEIGHTS, KEY_TILE, LINE_BYTES, RowShape
from .compiler import helper
from .kv_layout import GROUP_DIMS
from .kv_vectors import as_bf16, load_bf16_scalar, store_int16, widen_line
from .vector import (
    add,
    fma,
    load_bf16_tail,
    load_f32,
    load_f32_tail,
    load_scalar,
    max_lanes,
    mul,
    round_even,
    splat,
    store_f32,
    store_scalar,
    sum_lanes,
    vabs,
    vmax,
)

ZERO, ONE = np.float32(0.0), np.float32(1.0)
INT16_MAX = np.float32(32767.0)
SMALLEST = np.float32(1e-30)  # below, 32767 / x might overflow, and x is nothing beside any output


@helper
def int16_scale(largest):
    """(what to multiply numbers up to `largest` by, what undoes it)."""
    if largest > SMALLEST:
        return INT16_MAX / largest, largest / INT16_MAX
    return ZERO, ZERO


def q_code_writer(kv_dtype: str):
    """Function: one query head, rounded to bf16, as int16 lines; its scale to `scale_at`, sums per group to `sums`."""
    group_dims = GROUP_DIMS[kv_dtype]

    @helper
    def load_q(source, head_dim, groups, to, scale_at, sums):
        largest = splat(ZERO)
        for i in range(0, head_dim, 16):
            largest = vmax(vabs(as_bf16(load_f32_tail(source + 4 * i, head_dim - i))), largest)
        factor, scale = int16_scale(max_lanes(largest))
        store_scalar(scale, scale_at)
        for group in range(groups):
            total = splat(ZERO)
            for i in range(group * group_dims, (group + 1) * group_dims, 16):
                code = round_even(mul(as_bf16(load_f32_tail(source + 4 * i, head_dim - i)), splat(factor)))
                store_int16(code, to + 2 * i)
                total = add(total, code)
            store_scalar(sum_lanes(total), sums + 4 * group)

    return load_q


@helper
def widen_numbers(source, groups, stride, keys, to):
    """Scales or minima of a tile's keys, bf16 [groups, page_size] -> float32 [groups, 64], 0 beyond the keys."""
    for group in range(groups):
        for part in range(4):
            value = load_bf16_tail(source + group * stride + 32 * part, keys - 16 * part)
            store_f32(value, to + 4 * KEY_TILE * group + 64 * part)


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


def code_weights(kv_dtype: str):
    """Function: every head's weights for one group of V: p * scale as int16, and the scalars that undo it."""
    has_minimum = RowShape.of(kv_dtype).numbers == 2

    @helper
    def head_weights(scores, s0, s1, s2, s3, weights, scalars):
        p0, p1 = mul(load_f32(scores), s0), mul(load_f32(scores + 64), s1)
        p2, p3 = mul(load_f32(scores + 128), s2), mul(load_f32(scores + 192), s3)
        largest = vmax(vmax(vabs(p0), vabs(p1)), vmax(vabs(p2), vabs(p3)))
        factor, undo = int16_scale(max_lanes(largest))
        factors = splat(factor)
        store_int16(round_even(mul(p0, factors)), weights)
        store_int16(round_even(mul(p1, factors)), weights + 32)
        store_int16(round_even(mul(p2, factors)), weights + 64)
        store_int16(round_even(mul(p3, factors)), weights + 96)
        store_scalar(undo, scalars + 4)

    @helper
    def numbers_of(source, keys):
        s0, s1 = load_bf16_tail(source, keys), load_bf16_tail(source + 32, keys - 16)
        return s0, s1, load_bf16_tail(source + 64, keys - 32), load_bf16_tail(source + 96, keys - 48)

    @helper
    def weights_of(scores, heads, scales, minima, keys, weights, scalars):
        s0, s1, s2, s3 = numbers_of(scales, keys)
        for head in range(heads):
            at = scores + HEAD_SCORES * head
            head_weights(at, s0, s1, s2, s3, weights + HEAD_WEIGHTS * head, scalars + HEAD_SCALARS * head)
            store_scalar(ZERO, scalars + HEAD_SCALARS * head + 8)
        if has_minimum:
            m0, m1, m2, m3 = numbers_of(minima, keys)
            for head in range(heads):
                at = scores + HEAD_SCORES * head
                low = fma(load_f32(at), m0, mul(load_f32(at + 64), m1))
                high = fma(load_f32(at + 128), m2, mul(load_f32(at + 192), m3))
                store_scalar(sum_lanes(add(low, high)), scalars + HEAD_SCALARS * head + 8)

    return weights_of


def tile_widener(kv_dtype: str):
    """Function: rows of codes -> rows of bf16, [keys][lines] of 64 bytes: what prefill multiplies."""
    shape = RowShape.of(kv_dtype)
    group_lines, line_bytes, has_minimum = shape.group_lines, shape.line_bytes, shape.numbers == 2
    widen = widen_line(kv_dtype)

    @helper
    def widen_rows(codes, row_bytes, numbers, stride, keys, groups, to):
        for key in range(keys):
            for group in range(groups):
                at = numbers + stride * group + 2 * key
                scale = load_bf16_scalar(at)
                minimum = load_bf16_scalar(at + stride * groups) if has_minimum else ZERO
                for line in range(group * group_lines, (group + 1) * group_lines):
                    target = to + LINE_BYTES * (key * groups * group_lines + line)
                    widen(codes + key * row_bytes + line_bytes * line, scale, minimum, target)

    return widen_rows
