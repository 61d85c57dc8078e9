"""decode_attention: one query row per item over paged K and V, out = softmax(scale * q K^T) V with an online softmax.

An item is (query row, KV-head group, split of the key range). For 64 keys at a time all query heads of the group share
one pass over K and V: a register tile of heads x keys collects dot products, then attention_tiles.py takes over, while
the next tile of keys is prefetched. Splits of the same row are merged at the end (Flash-Decoding), so that all threads
have work even with one group. An empty range gives (0, -inf).
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
    P_LSE,
    P_LSE_ROW,
    P_MAX_PAGES,
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
    THREAD_ADDRESSES,
)
from .attention_tiles import (
    LOG2_E,
    MINUS_INFINITY,
    copy_rows,
    fetch_ahead,
    heads_in_and_out,
    key_rows,
    softmax_tile,
    weighted_strip,
)
from .chunks import await_stage, fail, finish, parameter, real_parameter, take
from .compiler import helper
from .dot import emit_dot_bf16
from .isa import Isa
from .tiles import masked_line, sum_each, zeros
from .vector import (
    I64,
    LANES,
    VF32,
    VI32,
    F32x16,
    add,
    emits,
    exp2_not_positive,
    fma,
    fma_value,
    intp,
    keep_below,
    larger,
    least,
    load_as,
    load_f32,
    load_i32,
    load_scalar,
    most,
    mul,
    splat,
    store_as,
    store_f32,
    store_scalar,
    sub,
    sum_lanes,
)


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


def attend(isa: Isa, kv_dtype: str, score_heads: int, value_heads: int):
    """Function: one item. q and acc hold `heads` padded rows; running holds (m, l) per head; False: invalid page."""
    scores_of, strip_of = scores_tile(isa, kv_dtype, score_heads), weighted_strip(kv_dtype, value_heads)
    keys_per_tile = LANES // score_heads
    line_items = LINE_BYTES // (2 if kv_dtype == "bf16" else 4)
    line_acc_bytes = 128 if kv_dtype == "bf16" else 64

    @helper
    def item(arguments, table, start, stop, q, q_bytes, acc, acc_bytes, running, heads, work):
        head_dim = parameter(arguments, P_HEAD_DIM)
        scale = splat(types.float32(real_parameter(arguments, P_SCALE) * LOG2_E))
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
                softmax_tile(scores + 4 * KEY_TILE * head, 0, keys, scale, running + 8 * head, corrections + 4 * head)
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
    load_q, write = heads_in_and_out(kv_dtype)
    is_bf16 = kv_dtype == "bf16"
    line_items = LINE_BYTES // (2 if is_bf16 else 4)
    line_acc_bytes = 128 if is_bf16 else 64

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
