"""Attention of one query row per item over paged K and V: out = softmax(scale * q K^T) V with an online softmax.

An item is (query row, KV-head group, split of the key range). For 64 keys at a time, all query heads of the group share
one pass over K and V: a register tile of heads x keys collects dot products, the scores stay in the first-level cache,
    m' = max(m, max s)    p = exp(s - m')    l' = l exp(m - m') + sum p    acc' = acc exp(m - m') + p V
and acc stays in memory of its own, 2 registers per head while a 64-byte column strip of V passes by. Splits of the same
row are merged at the end (Rabe and Staats, arXiv 2112.05682; Flash-Decoding). An empty range gives (0, -inf).

bf16: a 64-byte line holds 32 values; even and odd ones are widened into two registers, so acc is kept as evens then odds
of every 32 dims until it is written. fp32: a line is one register.
"""

import math

import numpy as np
from llvmlite import ir
from numba import types

from .attention_layout import (
    KEY_TILE,
    LINE_BYTES,
    NEXT_TILE,
    P_BATCH,
    P_GROUPS,
    P_HEAD_DIM,
    P_HEADS,
    P_K,
    P_K_PAGE,
    P_K_ROW,
    P_LSE,
    P_LSE_ROW,
    P_MAX_PAGES,
    P_NUM_PAGES,
    P_OUT,
    P_OUT_HEAD,
    P_OUT_ROW,
    P_PAGE_SIZE,
    P_Q,
    P_Q_HEAD,
    P_Q_ROW,
    P_SCALE,
    P_SPLITS,
    P_START,
    P_STOP,
    P_TABLE,
    P_TABLE_GROUP,
    P_TABLE_ROW,
    P_THREAD_BYTES,
    P_THREADS,
    P_V,
    P_V_PAGE,
    P_V_ROW,
    THREAD_ADDRESSES,
)
from .chunks import await_stage, fail, finish, parameter, real_parameter, take
from .compiler import helper
from .dot import emit_dot_bf16, high_halves, low_halves
from .isa import Isa
from .tiles import masked_line, sum_each, zeros
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
    float32,
    fma,
    fma_value,
    intp,
    keep_below,
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
    most,
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


def fetch_ahead(b, row, offset):
    """Prefetch the line at row + offset of the next tile of keys while this tile's line is in use."""
    where = b.inttoptr(b.add(row, offset), I8.as_pointer())
    call_llvm(b, "llvm.prefetch.p0", ir.VoidType(), where, *(ir.Constant(I32, value) for value in (0, 2, 1)))


def scores_tile(isa: Isa, kv_dtype: str, heads: int):
    """Function: `heads` x (16 / heads) dot products of q lines and K rows, written to scores[head][key]."""
    keys = LANES // heads
    tile = types.UniTuple(F32x16, LANES)
    item_bytes = 2 if kv_dtype == "bf16" else 4

    def accumulate(b, sums, qs, ks):
        for index in range(LANES):
            q, k = qs[index // keys], ks[index % keys]
            acc = b.extract_value(sums, index)
            if kv_dtype == "bf16":
                acc = emit_dot_bf16(isa, b, acc, k, q)
            else:
                acc = fma_value(b, b.bitcast(k, VF32), b.bitcast(q, VF32), acc)
            sums = b.insert_value(sums, acc, index)
        return sums

    def rows(b, q, q_stride, table, offset):
        q_rows = [b.add(q, b.mul(q_stride, ir.Constant(I64, head))) for head in range(heads)]
        for key in range(keys):
            fetch_ahead(b, load_as(b, table, I64, NEXT_TILE + 8 * key), offset)
        return q_rows, [b.add(load_as(b, table, I64, 8 * key), offset) for key in range(keys)]

    @emits(tile, tile, intp, intp, intp, intp)
    def line(b, sums, q, q_stride, table, offset):
        q_rows, k_rows = rows(b, q, q_stride, table, offset)
        return accumulate(b, sums, [load_as(b, at, VI32) for at in q_rows], [load_as(b, at, VI32) for at in k_rows])

    @emits(tile, tile, intp, intp, intp, intp, intp)
    def part(b, sums, q, q_stride, table, offset, count):
        q_rows, k_rows = rows(b, q, q_stride, table, offset)
        ks = [masked_line(b, at, count, item_bytes) for at in k_rows]
        return accumulate(b, sums, [load_as(b, at, VI32) for at in q_rows], ks)

    @emits(types.void, tile, intp)
    def store(b, sums, to):
        values = sum_each(b, [b.extract_value(sums, index) for index in range(LANES)])
        for head in range(heads):
            lanes = ir.Constant(ir.VectorType(ir.IntType(32), keys), list(range(head * keys, (head + 1) * keys)))
            store_as(b, b.shuffle_vector(values, values, lanes), to, 4 * KEY_TILE * head)

    start = zeros(LANES)
    line_items = LINE_BYTES // item_bytes

    @helper
    def scores(q, q_stride, table, head_dim, to):
        sums = start()
        whole = head_dim // line_items
        for index in range(whole):
            sums = line(sums, q + LINE_BYTES * index, q_stride, table, LINE_BYTES * index)
        rest = head_dim - whole * line_items
        if rest:
            sums = part(sums, q + LINE_BYTES * whole, q_stride, table, LINE_BYTES * whole, rest)
        store(sums, to)

    return scores


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
def softmax_tile(scores, keys, scale, running, correction):
    """scores[64] -> p in place; scale includes log2(e), so m is in powers of two; running holds m then l of this head (4-byte words `KEY_TILE` apart); see the module."""
    s0 = keep_below(mul(load_f32(scores), scale), keys, MINUS_INFINITY)
    s1 = keep_below(mul(load_f32(scores + 64), scale), keys - 16, MINUS_INFINITY)
    s2 = keep_below(mul(load_f32(scores + 128), scale), keys - 32, MINUS_INFINITY)
    s3 = keep_below(mul(load_f32(scores + 192), scale), keys - 48, MINUS_INFINITY)
    before = load_scalar(running)
    largest = larger(before, max_lanes(vmax(vmax(s0, s1), vmax(s2, s3))))
    m = splat(largest)
    p0, p1, p2, p3 = exp2_not_positive(sub(s0, m)), exp2_not_positive(sub(s1, m)), exp2_not_positive(sub(s2, m)), exp2_not_positive(sub(s3, m))
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
    """Addresses of the K and V rows of `keys` positions; the last one repeats up to KEY_TILE. False: a page is invalid."""
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


def attend(isa: Isa, kv_dtype: str, score_heads: int, value_heads: int):
    """Function: one item. q and acc hold `heads` padded rows; running holds (m, l) per head; False: invalid page."""
    scores_of, strip_of = scores_tile(isa, kv_dtype, score_heads), weighted_strip(kv_dtype, value_heads)
    keys_per_tile = LANES // score_heads
    line_items = LINE_BYTES // (2 if kv_dtype == "bf16" else 4)
    line_acc_bytes = 128 if kv_dtype == "bf16" else 64

    @helper
    def item(arguments, table, start, stop, q, q_bytes, acc, acc_bytes, running, heads, work):
        head_dim, scale = parameter(arguments, P_HEAD_DIM), splat(types.float32(real_parameter(arguments, P_SCALE) * LOG2_E))
        k_rows, v_rows = work, work + 2 * NEXT_TILE
        corrections = work + THREAD_ADDRESSES
        scores = corrections + 4 * heads + 64
        first = least(KEY_TILE, stop - start)
        if not key_rows(arguments, table, start, first, k_rows + NEXT_TILE, v_rows + NEXT_TILE):
            return False
        for position in range(start, stop, KEY_TILE):
            keys = least(KEY_TILE, stop - position)
            ahead = least(KEY_TILE, stop - position - keys)
            for row in range(0, 2 * NEXT_TILE * 2, 2 * NEXT_TILE):
                copy_rows(work + row)
            if not key_rows(arguments, table, position + keys, ahead, k_rows + NEXT_TILE, v_rows + NEXT_TILE):
                return False
            for head in range(0, heads, score_heads):
                for key in range(0, keys, keys_per_tile):
                    to = scores + 4 * (KEY_TILE * head + key)
                    scores_of(q + head * q_bytes, q_bytes, k_rows + 8 * key, head_dim, to)
            for head in range(heads):
                softmax_tile(scores + 4 * KEY_TILE * head, keys, scale, running + 8 * head, corrections + 4 * head)
            for head in range(0, heads, value_heads):
                for line in range((head_dim + line_items - 1) // line_items):
                    strip_of(
                        acc + head * acc_bytes + line_acc_bytes * line,
                        acc_bytes,
                        corrections + 4 * head,
                        v_rows,
                        keys,
                        LINE_BYTES * line,
                        scores + 4 * KEY_TILE * head,
                        head_dim - line_items * line,
                    )
        return True

    return item


def decode(isa: Isa, kv_dtype: str, score_heads: int, value_heads: int):
    """Kernel of decode_attention; parameters in attention_layout.py."""
    item = attend(isa, kv_dtype, score_heads, value_heads)
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

    @helper
    def merge_head(first, item_bytes, splits, head, running_offset, acc_bytes, to, lse_to, head_dim, lines):
        """Merge the splits of one head into split 0's acc, and write it."""
        largest = MINUS_INFINITY
        for split in range(splits):
            largest = larger(largest, load_scalar(first + split * item_bytes + running_offset + 8 * head))
        m = splat(largest)
        acc = first + head * acc_bytes
        total = splat(np.float32(0.0))
        for split in range(splits):
            source = first + split * item_bytes
            running = source + running_offset + 8 * head
            if load_scalar(running) == MINUS_INFINITY:
                weight = splat(np.float32(0.0))
            else:
                weight = exp2_not_positive(sub(splat(load_scalar(running)), m))
            total = fma(splat(load_scalar(running + 4)), weight, total)
            for i in range(0, acc_bytes, 64):
                value = mul(load_f32(source + head * acc_bytes + i), weight)
                store_f32(add(load_f32(acc + i), value) if split else value, acc + i)
        scalar = sum_lanes(keep_below(total, 1, np.float32(0.0)))
        if largest == MINUS_INFINITY:
            write(acc, splat(np.float32(0.0)), to, head_dim, lines)
            store_scalar(MINUS_INFINITY, lse_to)
        else:
            write(acc, splat(np.float32(1.0) / scalar), to, head_dim, lines)
            store_scalar(types.float32(types.float64(largest) / LOG2_E + math.log(scalar)), lse_to)

    def kernel(arguments, thread):
        scratch, batch, groups = parameter(arguments, 0), parameter(arguments, P_BATCH), parameter(arguments, P_GROUPS)
        group_heads, head_dim = parameter(arguments, P_HEADS), parameter(arguments, P_HEAD_DIM)
        splits, page_size = parameter(arguments, P_SPLITS), parameter(arguments, P_PAGE_SIZE)
        work = scratch + thread * parameter(arguments, P_THREAD_BYTES)
        heads = (group_heads + score_heads - 1) // score_heads * score_heads
        lines = (head_dim + line_items - 1) // line_items
        q_bytes, acc_bytes = LINE_BYTES * lines, line_acc_bytes * lines
        running_offset = heads * acc_bytes
        item_bytes = running_offset + (8 * heads + 63) // 64 * 64
        q_work = work + THREAD_ADDRESSES + 64 + 4 * heads + 4 * KEY_TILE * heads
        first_item = scratch + parameter(arguments, P_THREAD_BYTES) * parameter(arguments, P_THREADS)
        items = batch * groups * splits
        chunk = take(arguments, 0)
        while chunk < items:
            row, group, split = chunk // (groups * splits), chunk // splits % groups, chunk % splits
            acc = first_item + chunk * item_bytes
            for i in range(0, running_offset, 64):
                store_f32(splat(np.float32(0.0)), acc + i)
            for head in range(heads):
                store_scalar(MINUS_INFINITY, acc + running_offset + 8 * head)
                store_scalar(np.float32(0.0), acc + running_offset + 8 * head + 4)
            start = types.int64(load_i32(parameter(arguments, P_START) + 4 * row))
            stop = types.int64(load_i32(parameter(arguments, P_STOP) + 4 * row))
            if start < 0 or stop > page_size * parameter(arguments, P_MAX_PAGES):
                fail(arguments, 1)
                stop = start
            share = (most(0, stop - start) + splits * KEY_TILE - 1) // (splits * KEY_TILE) * KEY_TILE
            start, stop = start + split * share, least(stop, start + (split + 1) * share)
            if start < stop:
                q = parameter(arguments, P_Q) + row * parameter(arguments, P_Q_ROW)
                for head in range(heads):
                    source = q + (group * group_heads + least(head, group_heads - 1)) * parameter(arguments, P_Q_HEAD)
                    load_q(source, head_dim, lines, q_work + q_bytes * head)
                table = (
                    parameter(arguments, P_TABLE)
                    + row * parameter(arguments, P_TABLE_ROW)
                    + group * parameter(arguments, P_TABLE_GROUP)
                )
                running = acc + running_offset
                if not item(arguments, table, start, stop, q_work, q_bytes, acc, acc_bytes, running, heads, work):
                    fail(arguments, 2)
            finish(arguments, 0)
            chunk = take(arguments, 0)
        await_stage(arguments, 0, items)
        chunk = take(arguments, 1)
        while chunk < batch * groups:
            row, group = chunk // groups, chunk % groups
            out = parameter(arguments, P_OUT) + row * parameter(arguments, P_OUT_ROW)
            lse = parameter(arguments, P_LSE) + row * parameter(arguments, P_LSE_ROW)
            for head in range(group_heads):
                index = group * group_heads + head
                merge_head(
                    first_item + chunk * splits * item_bytes,
                    item_bytes,
                    splits,
                    head,
                    running_offset,
                    acc_bytes,
                    out + index * parameter(arguments, P_OUT_HEAD),
                    lse + 4 * index,
                    head_dim,
                    lines,
                )
            chunk = take(arguments, 1)

    return kernel
