"""What decode and prefill attention share: key addresses, softmax of a tile, weighted sum of V, heads in and out.

For 64 keys at a time, with scores s already in a first-level buffer:
    m' = max(m, max s)    p = 2^(s - m')    l' = l 2^(m - m') + sum p    acc' = acc 2^(m - m') + p V
Scores include log2(e), so m counts powers of two until the end. acc stays in memory of its own, 2 registers per head
while a 64-byte column strip of V passes by (Rabe and Staats, arXiv 2112.05682).

bf16: a 64-byte line holds 32 values; even and odd ones are widened into two registers, so acc is kept as evens then
odds of every 32 dims until it is written. fp32: a line is one register.
"""


import numpy as np
from llvmlite import ir
from numba import types

from .attention_layout import (
    KEY_TILE,
    LINE_BYTES,
    NEXT_TILE,
    P_K,
    P_K_PAGE,
    P_K_ROW,
    P_NUM_PAGES,
    P_PAGE_SIZE,
    P_V,
    P_V_PAGE,
    P_V_ROW,
)
from .chunks import parameter
from .compiler import helper
from .dot import high_halves, low_halves
from .tiles import masked_line
from .vector import (
    F32,
    I8,
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
    load_line,
    load_scalar,
    max_lanes,
    mul,
    splat,
    splat_value,
    store_as,
    store_bf16_tail,
    store_f32,
    store_f32_tail,
    store_i64,
    store_line,
    store_scalar,
    sub,
    sum_lanes,
    vmax,
)

MINUS_INFINITY = np.float32(-np.inf)
LOG2_E = 1.4426950408889634
ZERO, ONE = np.float32(0.0), np.float32(1.0)


def fetch_ahead(b, row, offset):
    """Prefetch the line at row + offset of the next tile of keys while this tile's line is in use."""
    where = b.inttoptr(b.add(row, offset), I8.as_pointer())
    call_llvm(b, "llvm.prefetch.p0", ir.VoidType(), where, *(ir.Constant(I32, value) for value in (0, 2, 1)))


def weighted_strip(kv_dtype: str, heads: int):
    """Function: acc[head] = acc[head] * correction[head] + sum_key p[head][key] * V[key] for one 64-byte strip of V."""
    vectors = 2 if kv_dtype == "bf16" else 1
    item_bytes = 2 if kv_dtype == "bf16" else 4
    tile = types.UniTuple(F32x16, heads * vectors)

    @emits(tile, intp, intp, intp)
    def load_scaled(b, acc, acc_stride, corrections):
        value = ir.Constant(ir.ArrayType(VF32, heads * vectors), ir.Undefined)
        for head in range(heads):
            factor = splat_value(b, load_as(b, corrections, F32, 4 * head))
            at = b.add(acc, b.mul(acc_stride, ir.Constant(I64, head)))
            for part in range(vectors):
                scaled = b.fmul(load_as(b, at, VF32, 64 * part), factor)
                value = b.insert_value(value, scaled, head * vectors + part)
        return value

    def load(b, row_at, offset):
        fetch_ahead(b, load_as(b, row_at, I64, NEXT_TILE), offset)
        return b.add(load_as(b, row_at, I64), offset)

    def accumulate(b, sums, line, p):
        parts = [low_halves(b, line), high_halves(b, line)] if vectors == 2 else [b.bitcast(line, VF32)]
        for head in range(heads):
            weight = splat_value(b, load_as(b, p, F32, 4 * KEY_TILE * head))
            for part, value in enumerate(parts):
                index = head * vectors + part
                sums = b.insert_value(sums, fma_value(b, value, weight, b.extract_value(sums, index)), index)
        return sums

    @emits(tile, tile, intp, intp, intp)
    def whole_line(b, sums, row_at, offset, p):
        return accumulate(b, sums, load_as(b, load(b, row_at, offset), VI32), p)

    @emits(tile, tile, intp, intp, intp, intp)
    def part_line(b, sums, row_at, offset, p, count):
        return accumulate(b, sums, masked_line(b, load(b, row_at, offset), count, item_bytes), p)

    @emits(types.void, tile, intp, intp)
    def store(b, sums, acc, acc_stride):
        for head in range(heads):
            at = b.add(acc, b.mul(acc_stride, ir.Constant(I64, head)))
            for part in range(vectors):
                store_as(b, b.extract_value(sums, head * vectors + part), at, 64 * part)

    @helper
    def strip(acc, acc_stride, corrections, table, keys, offset, p, count):
        sums = load_scaled(acc, acc_stride, corrections)
        if count >= LINE_BYTES // item_bytes:
            for key in range(keys):
                sums = whole_line(sums, table + 8 * key, offset, p + 4 * key)
        else:
            for key in range(keys):
                sums = part_line(sums, table + 8 * key, offset, p + 4 * key, count)
        store(sums, acc, acc_stride)

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
def key_rows(arguments, table, position, keys, k_rows, v_rows):
    """Addresses of the K and V rows of `keys` positions; the last one repeats to KEY_TILE. False: a page is invalid."""
    page_size, num_pages = parameter(arguments, P_PAGE_SIZE), parameter(arguments, P_NUM_PAGES)
    k, k_page, k_row = parameter(arguments, P_K), parameter(arguments, P_K_PAGE), parameter(arguments, P_K_ROW)
    v, v_page, v_row = parameter(arguments, P_V), parameter(arguments, P_V_PAGE), parameter(arguments, P_V_ROW)
    done = 0
    k_at, v_at = k, v
    while done < keys:
        logical = (position + done) // page_size
        offset = position + done - logical * page_size
        page = types.int64(load_i32(table + 4 * logical))
        if page < 0 or page >= num_pages:
            return False
        run = least(page_size - offset, keys - done)
        for key in range(run):
            k_at = k + page * k_page + (offset + key) * k_row
            v_at = v + page * v_page + (offset + key) * v_row
            store_i64(k_at, k_rows + 8 * (done + key))
            store_i64(v_at, v_rows + 8 * (done + key))
        done += run
    for key in range(done, KEY_TILE if keys else 0):
        store_i64(k_at, k_rows + 8 * key)
        store_i64(v_at, v_rows + 8 * key)
    return True


@helper
def copy_rows(rows):
    """Make the next tile's rows this tile's."""
    for i in range(0, NEXT_TILE, 64):
        store_line(load_line(rows + NEXT_TILE + i), rows + i)


def heads_in_and_out(kv_dtype: str):
    """Functions (load_q, write): one query head in the KV dtype, and one head's weighted acc in the order of dims."""
    is_bf16 = kv_dtype == "bf16"
    line_items = LINE_BYTES // (2 if is_bf16 else 4)
    line_acc_bytes = 128 if is_bf16 else 64

    @helper
    def load_q(source, head_dim, lines, to):
        """One query head in the KV dtype, zero padded to whole lines."""
        for i in range(0, lines * line_items, 16):
            vector = load_f32_tail(source + 4 * i, head_dim - i)
            if is_bf16:
                store_bf16_tail(vector, to + 2 * i, 16)
            else:
                store_f32(vector, to + 4 * i)

    @helper
    def write(acc, weight, to, head_dim, lines):
        """One head's acc * weight, in order."""
        for line in range(lines):
            at, left = acc + line_acc_bytes * line, head_dim - line_items * line
            if is_bf16:
                even, odd = mul(load_f32(at), weight), mul(load_f32(at + 64), weight)
                store_interleaved(even, odd, to + 4 * line_items * line, left)
            else:
                store_f32_tail(mul(load_f32(at), weight), to + 4 * line_items * line, left)

    return load_q, write
