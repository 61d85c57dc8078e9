"""What decode and prefill attention share: tiles of keys, softmax of a tile, weighted sum of V, heads in and out.

A tile is a run of up to 64 keys of one page, so its rows are a base address and a stride. With its scores s already in
a first-level buffer:
    m' = max(m, max s)    p = 2^(s - m')    l' = l 2^(m - m') + sum p    acc' = acc 2^(m - m') + p V
Scores include log2(e), so m counts powers of two until the end. acc stays in memory of its own, 2 registers per head
while a column strip of V, one line wide, passes by (Rabe and Staats, arXiv 2112.05682).

p stays float32 beside bf16 rows: rounded to bf16 it would halve the products, but moves the int8 inputs of a quantised
linear behind it by more than any other reordering does. Rows of codes meet p * scale as int16 per head, tile and group,
and two of them are interleaved, so that one instruction takes two keys.
"""

import math

import numpy as np
from llvmlite import ir
from numba import types

from .attention_layout import (
    HEAD_SCALARS,
    HEAD_SCORES,
    HEAD_WEIGHTS,
    KEY_TILE,
    LINE_BYTES,
    P_K,
    P_K_PAGE,
    P_NUM_PAGES,
    P_PAGE_SIZE,
    P_V,
    P_V_PAGE,
    RowShape,
)
from .chunks import parameter
from .compiler import helper
from .dot import high_halves, low_halves
from .isa import Isa
from .kv_vectors import dot_pairs, fetch, interleave, load_codes
from .tiles import masked_line, zeros
from .vector import (
    F32,
    I32,
    I64,
    LANES,
    VF32,
    VI32,
    F32x16,
    add,
    call_llvm,
    emits,
    exp2_not_positive,
    fma,
    fma_value,
    intp,
    keep_below,
    keep_from,
    lanes_below,
    larger,
    least,
    load_as,
    load_f32,
    load_f32_tail,
    load_i32,
    load_scalar,
    max_lanes,
    mul,
    splat,
    splat_value,
    store_as,
    store_bf16_tail,
    store_f32,
    store_f32_tail,
    store_scalar,
    sub,
    sum_lanes,
    vmax,
)

MINUS_INFINITY = np.float32(-np.inf)
LOG2_E = 1.4426950408889634
ZERO, ONE = np.float32(0.0), np.float32(1.0)


def value_strip(isa: Isa, kv_dtype: str, heads: int):
    """Function: acc[head] = acc[head] * correction[head] + sum_key weight[head][key] * V[key] for one line of V.

    Its weights are the scores themselves, or what code_weights made of them; codes' sums are also
    multiplied and offset by the head's scalars. `ahead` is where the next tile's share of V begins.
    """
    shape = RowShape.of(kv_dtype)
    vectors, item_bytes = shape.acc_bytes // LINE_BYTES, LINE_BYTES // shape.line_items
    in_pairs = has_scale = shape.group_lines > 0
    tile = types.UniTuple(F32x16, heads * vectors)
    zero_tile = zeros(heads * vectors)

    def accumulate(b, sums, first, second, p):
        if in_pairs:
            parts, weight_type, weight_bytes = interleave(b, first, second), I32, HEAD_WEIGHTS
        else:
            parts = [low_halves(b, first), high_halves(b, first)] if vectors == 2 else [b.bitcast(first, VF32)]
            weight_type, weight_bytes = F32, HEAD_SCORES
        for head in range(heads):
            weight = splat_value(b, load_as(b, p, weight_type, weight_bytes * head))
            for part, value in enumerate(parts):
                index = head * vectors + part
                total = b.extract_value(sums, index)
                if in_pairs:
                    total = dot_pairs(isa, kv_dtype, b, total, value, weight)
                else:
                    total = fma_value(b, value, weight, total)
                sums = b.insert_value(sums, total, index)
        return sums

    @emits(tile, tile, intp, intp, intp)
    def whole_line(b, sums, row, second, p):
        return accumulate(b, sums, *(load_codes(b, kv_dtype, at) for at in (row, b.add(row, second))), p)

    @emits(tile, tile, intp, intp, intp, intp)
    def part_line(b, sums, row, second, p, count):
        return accumulate(b, sums, *(masked_line(b, at, count, item_bytes) for at in (row, b.add(row, second))), p)

    @emits(types.void, tile, intp, intp, intp)
    def add_to_acc(b, sums, acc, acc_stride, scalars):
        for head in range(heads):
            correction, scale, offset = (
                splat_value(b, load_as(b, scalars, F32, HEAD_SCALARS * head + 4 * field)) for field in range(3)
            )
            at = b.add(acc, b.mul(acc_stride, ir.Constant(I64, head)))
            for part in range(vectors):
                total = b.extract_value(sums, head * vectors + part)
                if has_scale:
                    total = fma_value(b, b.sitofp(b.bitcast(total, VI32), VF32), scale, offset)
                store_as(b, fma_value(b, load_as(b, at, VF32, 64 * part), correction, total), at, 64 * part)

    step, weight_step = (2, 4) if in_pairs else (1, 4)
    fetched, is_whole = step * shape.line_bytes, has_scale

    @helper
    def strip(acc, acc_stride, scalars, row, row_bytes, keys, p, count, ahead):
        sums = zero_tile()
        if is_whole or count >= LINE_BYTES // item_bytes:
            for key in range(0, keys, step):
                sums = whole_line(sums, row, row_bytes if key + 1 < keys else 0, p)
                row, p, ahead = row + step * row_bytes, p + weight_step, ahead + fetched
                fetch(ahead - fetched)
                if fetched > LINE_BYTES:
                    fetch(ahead - LINE_BYTES)
        else:
            for key in range(0, keys, step):
                sums = part_line(sums, row, row_bytes if key + 1 < keys else 0, p, count)
                row, p = row + step * row_bytes, p + weight_step
        add_to_acc(sums, acc, acc_stride, scalars)

    return strip


@emits(types.void, F32x16, F32x16, intp, intp)
def store_interleaved(b, even, odd, address, count):
    """even[0], odd[0], even[1], ...: the first `count` of them."""
    for half in range(2):
        lanes = [lane // 2 + 8 * half + (LANES if lane % 2 else 0) for lane in range(LANES)]
        value = b.shuffle_vector(even, odd, ir.Constant(VI32, lanes))
        left = b.sub(count, ir.Constant(I64, LANES * half))
        at = b.add(address, ir.Constant(I64, 64 * half))
        arguments = [value, b.inttoptr(at, VF32.as_pointer()), ir.Constant(ir.IntType(32), 4), lanes_below(b, left)]
        call_llvm(b, "llvm.masked.store.v16f32.p0", ir.VoidType(), *arguments)


@helper
def softmax_tile(scores, first, keys, scale, running, correction):
    """scores[64] of one query -> p in place; only keys [first, keys) are visible.

    scale includes log2(e); running holds m then l; correction is what acc has to be multiplied by.
    """
    if keys <= first:
        for i in range(0, 4 * KEY_TILE, 64):
            store_f32(splat(ZERO), scores + i)
        store_scalar(ONE, correction)
        return
    s0 = keep_below(mul(load_f32(scores), scale), keys, MINUS_INFINITY)
    s1 = keep_below(mul(load_f32(scores + 64), scale), keys - 16, MINUS_INFINITY)
    s2 = keep_below(mul(load_f32(scores + 128), scale), keys - 32, MINUS_INFINITY)
    s3 = keep_below(mul(load_f32(scores + 192), scale), keys - 48, MINUS_INFINITY)
    if first > 0:
        s0, s1 = keep_from(s0, first, MINUS_INFINITY), keep_from(s1, first - 16, MINUS_INFINITY)
        s2, s3 = keep_from(s2, first - 32, MINUS_INFINITY), keep_from(s3, first - 48, MINUS_INFINITY)
    before = load_scalar(running)
    largest = larger(before, max_lanes(vmax(vmax(s0, s1), vmax(s2, s3))))
    m = splat(largest)
    p0, p1 = exp2_not_positive(sub(s0, m)), exp2_not_positive(sub(s1, m))
    p2, p3 = exp2_not_positive(sub(s2, m)), exp2_not_positive(sub(s3, m))
    store_f32(p0, scores)
    store_f32(p1, scores + 64)
    store_f32(p2, scores + 128)
    store_f32(p3, scores + 192)
    factor = exp2_not_positive(splat(before - largest))
    store_f32_tail(factor, correction, 1)
    total = fma(splat(load_scalar(running + 4)), factor, splat(sum_lanes(add(add(p0, p1), add(p2, p3)))))
    store_scalar(largest, running)
    store_f32_tail(total, running + 4, 1)


@helper
def page_at(arguments, table, position):
    """The page that holds a position; -1 where the table names none."""
    page = types.int64(load_i32(table + 4 * (position // parameter(arguments, P_PAGE_SIZE))))
    return page if 0 <= page < parameter(arguments, P_NUM_PAGES) else -1


@helper
def tile_at(arguments, page, position, stop):
    """(K page, V page, offset in them, keys) of the tile of keys that starts at a position of a valid page."""
    page_size = parameter(arguments, P_PAGE_SIZE)
    offset = position % page_size
    keys = least(least(KEY_TILE, page_size - offset), stop - position)
    k_page = parameter(arguments, P_K) + page * parameter(arguments, P_K_PAGE)
    v_page = parameter(arguments, P_V) + page * parameter(arguments, P_V_PAGE)
    return k_page, v_page, offset, keys


@helper
def write_lse(running, to):
    """ln of the sum that (m, l) stands for; returns 1 / l, 0 where there was no key."""
    m, total = load_scalar(running), load_scalar(running + 4)
    if m == MINUS_INFINITY:
        store_scalar(MINUS_INFINITY, to)
        return ZERO
    store_scalar(types.float32(types.float64(m) / LOG2_E + math.log(total)), to)
    return ONE / total


def q_line_writer(kv_dtype: str):
    """Function: one query head in the KV dtype, bf16 for codes, zero padded to whole lines."""
    is_fp32 = kv_dtype == "fp32"
    line_items = RowShape.of(kv_dtype).line_items

    @helper
    def load_q(source, head_dim, lines, to):
        for i in range(0, lines * line_items, 16):
            vector = load_f32_tail(source + 4 * i, head_dim - i)
            if is_fp32:
                store_f32(vector, to + 4 * i)
            else:
                store_bf16_tail(vector, to + 2 * i, 16)

    return load_q


def head_writer(kv_dtype: str):
    """Function: one head's acc * weight, in the order of dims."""
    is_fp32, shape = kv_dtype == "fp32", RowShape.of(kv_dtype)
    line_items, acc_bytes = shape.line_items, shape.acc_bytes

    @helper
    def write(acc, weight, to, head_dim):
        for line in range((head_dim + line_items - 1) // line_items):
            at, left = acc + acc_bytes * line, head_dim - line_items * line
            if is_fp32:
                store_f32_tail(mul(load_f32(at), weight), to + 4 * line_items * line, left)
            else:
                even, odd = mul(load_f32(at), weight), mul(load_f32(at + 64), weight)
                store_interleaved(even, odd, to + 4 * line_items * line, left)

    return write
