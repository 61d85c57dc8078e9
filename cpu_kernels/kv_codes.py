"""Attention over pages of codes: the parts that rows of plain numbers do not need.

    s = scale_q (sum_g scale_g sum_d q_d code_d + sum_g minimum_g sum_d q_d)     q in 16 bits per head
    out = sum_t (p_t scale_tg) code_t + sum_t p_t minimum_tg                     p scale in 16 bits per tile, group

16 bits hold q and p * scale to 2**-16 of their largest, so nothing is lost that float32 would keep in the sum. They are
kept as two planes of words, see split_dot.py.
"""

import numpy as np

from .attention_layout import (
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
from .compiler import helper
from .isa import Isa
from .kv_layout import GROUP_DIMS
from .kv_vectors import (
    as_bf16,
    load_bf16_scalar,
    load_every_second,
    widen_line,
)
from .scalar import load_scalar, store_scalar
from .split_dot import Split
from .vector import (
    add,
    fma,
    load_bf16_tail,
    load_f32,
    load_f32_tail,
    max_lanes,
    mul,
    round_even,
    splat,
    store_f32,
    sum_lanes,
    vabs,
    vmax,
)

ZERO, ONE = np.float32(0.0), np.float32(1.0)
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
    weight. A scale that is not a number shows in the result.
    """
    has_minimum = RowShape.of(kv_dtype).numbers == 2
    store, largest_weight = Split(isa).store_weights(), np.float32(Split(isa).largest_weight)

    @helper
    def numbers_of(source, keys):
        s0, s1 = load_bf16_tail(source, keys), load_bf16_tail(source + 32, keys - 16)
        return s0, s1, load_bf16_tail(source + 64, keys - 32), load_bf16_tail(source + 96, keys - 48)

    @helper
    def undone(s0, s1, s2, s3, undo):
        """`undo`, or NaN where a scale is NaN or infinite."""
        total = splat(undo)
        for s in (s0, s1, s2, s3):
            total = fma(s, splat(ZERO), total)
        return sum_lanes(total) / np.float32(16.0)

    @helper
    def weights_of(scores, heads, scales, minima, keys, weights, scalars):
        s0, s1, s2, s3 = numbers_of(scales, keys)
        factor, undo = code_scale(max_lanes(vmax(vmax(s0, s1), vmax(s2, s3))), largest_weight)
        undo, factors = undone(s0, s1, s2, s3, undo), splat(factor)
        s0, s1, s2, s3 = mul(s0, factors), mul(s1, factors), mul(s2, factors), mul(s3, factors)
        for head in range(heads):
            at, to = scores + HEAD_SCORES * head, scalars + HEAD_SCALARS * head
            p0, p1, p2, p3 = load_f32(at), load_f32(at + 64), load_f32(at + 128), load_f32(at + 192)
            store(mul(p0, s0), mul(p1, s1), mul(p2, s2), mul(p3, s3), weights + HEAD_WEIGHTS * head)
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
