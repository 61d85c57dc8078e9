"""What decode and prefill attention share: tiles of keys, softmax of a tile, queries in, lse out.

A tile is a run of up to 64 keys of one page, so its rows are a base address and a stride. With its scores s already in
a first-level buffer:
    m' = max(m, ceil(max s))    p = 2^(s - m')    l' = l 2^(m - m') + sum p    acc' = acc 2^(m - m') + p V
Scores include log2(e), so m counts powers of two until the end. acc stays in memory of its own, in registers only while
a column strip of V, one line wide, passes by (Rabe and Staats, arXiv 2112.05682).

Because m is whole, scaling by 2^(m - m') changes no mantissa: p rounded to bf16, as it multiplies rows of bf16, is the
same weight whatever tiles, splits or segments the keys were met in. l sums p before that rounding, so lse is exact.
"""

import math

import numpy as np
from numba import types

from cpu_kernels.attention.parameters import (
    KEY_TILE,
    RowShape,
)
from cpu_kernels.team.arguments import ATTENTION
from cpu_kernels.team.chunks import parameter
from cpu_kernels.vectors.arithmetic import (
    add,
    exp2_not_positive,
    keep_below,
    keep_from,
    max_lanes,
    mul,
    sub,
    sum_lanes,
    vmax,
)
from cpu_kernels.vectors.compiler import helper
from cpu_kernels.vectors.dot import emit_round_bf16
from cpu_kernels.vectors.isa import Isa
from cpu_kernels.vectors.scalar import larger, least, load_i32, load_scalar, power_of_two, round_up, store_scalar
from cpu_kernels.vectors.vector import (
    LANES,
    VF32,
    VI32,
    F32x16,
    constant,
    emits,
    intp,
    load_f32,
    load_f32_tail,
    picked,
    round_to_bf16,
    splat,
    store_as,
    store_bf16_tail,
    store_f32,
    widen_halves,
)

MINUS_INFINITY = np.float32(-np.inf)
LOG2_E = 1.4426950408889634
ZERO, ONE = np.float32(0.0), np.float32(1.0)


@helper
def scaled_scores(scores, first, keys, scale):
    """scores[64] times scale; -inf outside of [first, keys)."""
    s0, s1 = mul(load_f32(scores), scale), mul(load_f32(scores + 64), scale)
    s2, s3 = mul(load_f32(scores + 128), scale), mul(load_f32(scores + 192), scale)
    if keys < KEY_TILE:
        s0, s1 = keep_below(s0, keys, MINUS_INFINITY), keep_below(s1, keys - 16, MINUS_INFINITY)
        s2, s3 = keep_below(s2, keys - 32, MINUS_INFINITY), keep_below(s3, keys - 48, MINUS_INFINITY)
    if first > 0:
        s0, s1 = keep_from(s0, first, MINUS_INFINITY), keep_from(s1, first - 16, MINUS_INFINITY)
        s2, s3 = keep_from(s2, first - 32, MINUS_INFINITY), keep_from(s3, first - 48, MINUS_INFINITY)
    return s0, s1, s2, s3


@helper
def raise_maximum(scores, first, keys, scale, running, correction):
    """m = m' for the scores of a tile; correction: 2^(m - m'), what l and acc have to be multiplied by.

    scale includes log2(e); running holds m then l; only keys [first, keys) are visible. A function of its own, because
    the
    exponentials of a tile wait for its maximum: run for one query after another, both halves keep the core busy.
    """
    if keys <= first:
        store_scalar(ONE, correction)
        return
    s0, s1, s2, s3 = scaled_scores(scores, first, keys, scale)
    before = load_scalar(running)
    largest = larger(before, round_up(max_lanes(vmax(vmax(s0, s1), vmax(s2, s3)))))
    store_scalar(largest, running)
    store_scalar(power_of_two(before - largest), correction)


def rounded_weight(b, value):
    """A weight rounded to bf16, in float32. The lower half of a NaN is 0, since numbers of bf16 brought it here, so it
    stays one."""
    bits = b.bitcast(value, VI32)
    odd = b.and_(b.lshr(bits, constant(VI32, 16)), constant(VI32, 1))
    rounded = b.add(bits, b.add(odd, constant(VI32, 0x7FFF)))
    return b.bitcast(b.and_(rounded, constant(VI32, 0xFFFF0000)), VF32)


def weight_storer(isa: Isa, kv_dtype: str):
    """Emitter (p of a tile's keys, address, offset): how they are kept until they multiply V.

    Beside rows of bf16 p is rounded to bf16, and kept so where the CPU multiplies bf16; else it is kept in float32.
    """
    is_rounded = kv_dtype == "bf16"
    item_bytes = 2 if is_rounded and isa.has_bf16 else 4

    def store(b, powers, to, offset=0):
        for part, value in enumerate(powers):
            if is_rounded:
                value = emit_round_bf16(isa, b, value) if isa.has_bf16 else rounded_weight(b, value)
            store_as(b, value, to, offset + part * LANES * item_bytes)

    return store


def softmax_tile(isa: Isa, kv_dtype: str):
    """Function: scores[64] of one query -> p in place, and l; arguments as for raise_maximum, which comes before.

    Decode takes several queries at a time, decode_softmax.py.
    """
    store_weights = weight_storer(isa, kv_dtype)

    @emits(types.void, F32x16, F32x16, F32x16, F32x16, intp)
    def store(b, p0, p1, p2, p3, to):
        store_weights(b, (p0, p1, p2, p3), to)

    @helper
    def soften(scores, first, keys, scale, running, correction):
        if keys <= first:
            zero = splat(ZERO)
            store(zero, zero, zero, zero, scores)
            return
        s0, s1, s2, s3 = scaled_scores(scores, first, keys, scale)
        m = splat(load_scalar(running))
        p0, p1 = exp2_not_positive(sub(s0, m)), exp2_not_positive(sub(s1, m))
        p2, p3 = exp2_not_positive(sub(s2, m)), exp2_not_positive(sub(s3, m))
        total = sum_lanes(add(add(p0, p1), add(p2, p3)))
        store_scalar(load_scalar(running + 4) * load_scalar(correction) + total, running + 4)
        store(p0, p1, p2, p3, scores)

    return soften


@helper
def page_at(arguments, table, position):
    """The page that holds a position; -1 where the table names none."""
    page = types.int64(load_i32(table + 4 * (position // parameter(arguments, ATTENTION.page_size))))
    return page if 0 <= page < parameter(arguments, ATTENTION.num_pages) else -1


@helper
def tile_at(arguments, page, position, stop):
    """(K page, V page, offset in them, keys) of the tile of keys that starts at a position of a valid page."""
    page_size = parameter(arguments, ATTENTION.page_size)
    offset = position % page_size
    keys = least(least(KEY_TILE, page_size - offset), stop - position)
    k_page = parameter(arguments, ATTENTION.k) + page * parameter(arguments, ATTENTION.k_page)
    v_page = parameter(arguments, ATTENTION.v) + page * parameter(arguments, ATTENTION.v_page)
    return k_page, v_page, offset, keys


@helper
def tile_rows(arguments, k_page, v_page, offset):
    """(rows of K, their numbers, rows of V, their numbers) from a token of a page on; only codes have numbers."""
    page_size = parameter(arguments, ATTENTION.page_size)
    k_row, v_row = parameter(arguments, ATTENTION.k_row), parameter(arguments, ATTENTION.v_row)
    k_numbers, v_numbers = k_page + page_size * k_row + 2 * offset, v_page + page_size * v_row + 2 * offset
    return k_page + offset * k_row, k_numbers, v_page + offset * v_row, v_numbers


@helper
def write_lse(running, to):
    """ln of the sum that (m, l) stands for; returns 1 / l, 0 where there was no key."""
    m, total = load_scalar(running), load_scalar(running + 4)
    if m == MINUS_INFINITY:
        store_scalar(MINUS_INFINITY, to)
        return ZERO
    store_scalar(types.float32(types.float64(m) / LOG2_E + math.log(total)), to)
    return ONE / total


def q_line_writer(isa: Isa, kv_dtype: str, apart: bool = False):
    """Function: one query head as numbers of a plain KV dtype, zero padded to whole lines; see `q_line_bytes`.

    apart: of a line that is kept as float32 though rows are bf16, the even numbers come first, then the odd ones.
    """
    is_fp32, has_bf16 = kv_dtype == "fp32", isa.has_bf16
    line_items, apart = RowShape.of(kv_dtype).line_items, apart and not (is_fp32 or has_bf16)

    @emits(F32x16, F32x16)
    def rounded(b, vector):
        return widen_halves(b, round_to_bf16(b, vector), 1)

    @emits(types.void, F32x16, F32x16, intp)
    def store_apart(b, low, high, to):
        for odd in (0, 1):
            store_as(b, picked(b, low, high, list(range(odd, 2 * LANES, 2))), to, 4 * LANES * odd)

    @helper
    def load_apart(source, head_dim, lines, to):
        for i in range(0, lines * line_items, 32):
            low = rounded(load_f32_tail(source + 4 * i, head_dim - i))
            store_apart(low, rounded(load_f32_tail(source + 4 * i + 64, head_dim - i - 16)), to + 4 * i)

    @helper
    def load_q(source, head_dim, lines, to):
        for i in range(0, lines * line_items, 16):
            vector = load_f32_tail(source + 4 * i, head_dim - i)
            if is_fp32:
                store_f32(vector, to + 4 * i)
            elif has_bf16:
                store_bf16_tail(vector, to + 2 * i, 16)
            else:
                store_f32(rounded(vector), to + 4 * i)

    return load_apart if apart else load_q
