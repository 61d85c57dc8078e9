"""prefill_attention: causal attention of many rows of one sequence, tiled over queries and keys.

An item is (KV-head group, block of rows): its rows x heads are up to 64 query vectors that share one pass over the
keys. A tile of 64 keys is transposed once, so that 16 keys are the lanes of a register and 4 queries x 64 keys fill 16
of them without sums across lanes; then softmax and the weighted sum of V as in attention_tiles.py. Causal and window
masks become a visible range of lanes per row. Items are handed out from the end, where rows see most keys, so that the
last ones to finish are short.
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
    P_Q_START,
    P_SCALE,
    P_START,
    P_STOP,
    P_TABLE,
    P_TABLE_GROUP,
    P_THREAD_BYTES,
    P_WINDOW,
    PREFILL_SCORES,
    PREFILL_VALUES,
    PREFILL_VECTORS,
    THREAD_ADDRESSES,
)
from .attention_tiles import LOG2_E, MINUS_INFINITY, copy_rows, heads_in_and_out, key_rows, softmax_tile, weighted_strip
from .chunks import fail, parameter, real_parameter, take
from .compiler import helper
from .dot import emit_dot_bf16
from .isa import Isa
from .tiles import masked_line, zeros
from .vector import (
    I32,
    I64,
    LANES,
    VF32,
    VI32,
    F32x16,
    emits,
    fma_value,
    intp,
    least,
    load_as,
    load_scalar,
    most,
    splat,
    splat_value,
    store_as,
    store_f32,
    store_scalar,
)

ZERO, ONE = np.float32(0.0), np.float32(1.0)
KEY_VECTORS = KEY_TILE // LANES


def transpose_block(kv_dtype: str):
    """Intrinsic (row addresses, offset, items, to): a line of each of 16 keys -> 16 vectors, 256 bytes apart.

    Four rounds exchange halves of lane groups between rows that are 8, 4, 2 and 1 apart.
    """
    item_bytes = 2 if kv_dtype == "bf16" else 4

    @emits(types.void, intp, intp, intp, intp)
    def transpose(b, rows, offset, items, to):
        values = [
            masked_line(b, b.add(load_as(b, rows, I64, 8 * key), offset), items, item_bytes) for key in range(LANES)
        ]
        for step in (8, 4, 2, 1):
            upper = [lane & step for lane in range(LANES)]
            low = ir.Constant(VI32, [LANES + lane - step if up else lane for lane, up in enumerate(upper)])
            high = ir.Constant(VI32, [LANES + lane if up else lane + step for lane, up in enumerate(upper)])
            for index in range(LANES):
                if not index & step:
                    left, right = values[index], values[index + step]
                    values[index] = b.shuffle_vector(left, right, low)
                    values[index + step] = b.shuffle_vector(left, right, high)
        for index, value in enumerate(values):
            store_as(b, value, to, 4 * KEY_TILE * index)

    return transpose


def scores_of_tile(isa: Isa, kv_dtype: str):
    """Function: scores[query][64 keys] of PREFILL_SCORES queries and a transposed tile of K of `words` 4-byte rows."""
    tile = types.UniTuple(F32x16, PREFILL_SCORES * KEY_VECTORS)

    @emits(tile, tile, intp, intp, intp)
    def step(b, sums, q, q_bytes, keys):
        ks = [load_as(b, keys, VI32, LINE_BYTES * part) for part in range(KEY_VECTORS)]
        for query in range(PREFILL_SCORES):
            x = splat_value(b, load_as(b, b.add(q, b.mul(q_bytes, ir.Constant(I64, query))), I32))
            for part, k in enumerate(ks):
                index = query * KEY_VECTORS + part
                acc = b.extract_value(sums, index)
                if kv_dtype == "bf16":
                    acc = emit_dot_bf16(isa, b, acc, k, x)
                else:
                    acc = fma_value(b, b.bitcast(k, VF32), b.bitcast(x, VF32), acc)
                sums = b.insert_value(sums, acc, index)
        return sums

    @emits(types.void, tile, intp)
    def store(b, sums, to):
        for index in range(PREFILL_SCORES * KEY_VECTORS):
            store_as(b, b.extract_value(sums, index), to, LINE_BYTES * index)

    start = zeros(PREFILL_SCORES * KEY_VECTORS)

    @helper
    def scores(q, q_bytes, keys, words, to):
        sums = start()
        for word in range(words):
            sums = step(sums, q + 4 * word, q_bytes, keys + 4 * KEY_TILE * word)
        store(sums, to)

    return scores


def prefill(isa: Isa, kv_dtype: str):
    """Kernel of prefill_attention; parameters in attention_layout.py."""
    load_q, write = heads_in_and_out(kv_dtype)
    transpose, scores_of = transpose_block(kv_dtype), scores_of_tile(isa, kv_dtype)
    strip_of = weighted_strip(kv_dtype, PREFILL_VALUES)
    is_bf16 = kv_dtype == "bf16"
    line_items = LINE_BYTES // (2 if is_bf16 else 4)
    line_acc_bytes = 128 if is_bf16 else 64

    @helper
    def transpose_tile(rows, head_dim, lines, to):
        """The tile's K rows -> [words][64 keys]."""
        for line in range(lines):
            for key in range(0, KEY_TILE, LANES):
                at = to + 4 * KEY_TILE * LANES * line + 4 * key
                transpose(rows + 8 * key, LINE_BYTES * line, head_dim - line_items * line, at)

    @helper
    def visible(arguments, row, position, keys):
        """Visible keys [first, last) of this tile for this row of q."""
        at = parameter(arguments, P_Q_START) + row
        window = parameter(arguments, P_WINDOW)
        first = most(0, at - window + 1 - position) if window else 0
        return first, least(keys, at + 1 - position)

    @helper
    def attend_tile(arguments, first_row, group_heads, count, position, keys, work, k_t, scores, q, acc, running):
        """One tile of keys for all query vectors of the item."""
        head_dim = parameter(arguments, P_HEAD_DIM)
        scale = splat(types.float32(real_parameter(arguments, P_SCALE) * LOG2_E))
        lines = (head_dim + line_items - 1) // line_items
        q_bytes, acc_bytes = LINE_BYTES * lines, line_acc_bytes * lines
        corrections = scores + 4 * KEY_TILE * PREFILL_VALUES
        for vector in range(0, count, PREFILL_VALUES):
            last_row = first_row + least(count - 1, vector + PREFILL_VALUES - 1) // group_heads
            last = visible(arguments, last_row, position, keys)[1]
            if last <= 0 or visible(arguments, first_row + vector // group_heads, position, keys)[0] >= keys:
                continue
            for part in range(0, PREFILL_VALUES, PREFILL_SCORES):
                at = q + (vector + part) * q_bytes
                scores_of(at, q_bytes, k_t, LANES * lines, scores + 4 * KEY_TILE * part)
            for part in range(PREFILL_VALUES):
                row = first_row + least(count - 1, vector + part) // group_heads
                low, high = visible(arguments, row, position, keys)
                state = running + 8 * (vector + part)
                softmax_tile(scores + 4 * KEY_TILE * part, low, high, scale, state, corrections + 4 * part)
            for line in range(lines):
                strip_of(
                    acc + vector * acc_bytes + line_acc_bytes * line,
                    acc_bytes,
                    corrections,
                    work + 2 * NEXT_TILE,
                    last,
                    LINE_BYTES * line,
                    scores,
                    head_dim - line_items * line,
                )

    @helper
    def attend_block(arguments, group, first_row, rows, work):
        """One item: load its queries, pass over its keys, write its rows. False: a page is invalid."""
        group_heads, head_dim = parameter(arguments, P_HEADS), parameter(arguments, P_HEAD_DIM)
        lines = (head_dim + line_items - 1) // line_items
        q_bytes, acc_bytes = LINE_BYTES * lines, line_acc_bytes * lines
        count = rows * group_heads
        padded = (count + PREFILL_VALUES - 1) // PREFILL_VALUES * PREFILL_VALUES
        k_t = work + THREAD_ADDRESSES
        scores = k_t + LINE_BYTES * lines * KEY_TILE
        q = scores + PREFILL_VALUES * (4 * KEY_TILE + 8)
        acc = q + padded * q_bytes
        running = acc + padded * acc_bytes
        for vector in range(padded):
            real = least(count - 1, vector)
            head = group * group_heads + real % group_heads
            row = first_row + real // group_heads
            source = parameter(arguments, P_Q) + row * parameter(arguments, P_Q_ROW)
            load_q(source + head * parameter(arguments, P_Q_HEAD), head_dim, lines, q + vector * q_bytes)
            store_scalar(MINUS_INFINITY, running + 8 * vector)
            store_scalar(ZERO, running + 8 * vector + 4)
        for i in range(0, padded * acc_bytes, 64):
            store_f32(splat(ZERO), acc + i)
        q_start, window = parameter(arguments, P_Q_START), parameter(arguments, P_WINDOW)
        start, stop = parameter(arguments, P_START), least(parameter(arguments, P_STOP), q_start + first_row + rows)
        if window:
            start = most(start, q_start + first_row - window + 1)
        table = parameter(arguments, P_TABLE) + group * parameter(arguments, P_TABLE_GROUP)
        k_next, v_next = work + NEXT_TILE, work + 3 * NEXT_TILE
        if start < stop and not key_rows(arguments, table, start, least(KEY_TILE, stop - start), k_next, v_next):
            return False
        for position in range(start, stop, KEY_TILE):
            keys = least(KEY_TILE, stop - position)
            copy_rows(work)
            copy_rows(work + 2 * NEXT_TILE)
            ahead = least(KEY_TILE, stop - position - keys)
            if not key_rows(arguments, table, position + keys, ahead, k_next, v_next):
                return False
            transpose_tile(work, head_dim, lines, k_t)
            attend_tile(arguments, first_row, group_heads, count, position, keys, work, k_t, scores, q, acc, running)
        for vector in range(count):
            head, row = group * group_heads + vector % group_heads, first_row + vector // group_heads
            to = parameter(arguments, P_OUT) + row * parameter(arguments, P_OUT_ROW)
            to += head * parameter(arguments, P_OUT_HEAD)
            lse = parameter(arguments, P_LSE) + row * parameter(arguments, P_LSE_ROW) + 4 * head
            m, total = load_scalar(running + 8 * vector), load_scalar(running + 8 * vector + 4)
            if m == MINUS_INFINITY:
                write(acc + vector * acc_bytes, splat(ZERO), to, head_dim, lines)
                store_scalar(MINUS_INFINITY, lse)
            else:
                write(acc + vector * acc_bytes, splat(ONE / total), to, head_dim, lines)
                store_scalar(types.float32(types.float64(m) / LOG2_E + math.log(total)), lse)
        return True

    def kernel(arguments, thread):
        q_len, groups = parameter(arguments, P_BATCH), parameter(arguments, P_GROUPS)
        group_heads = parameter(arguments, P_HEADS)
        work = parameter(arguments, 0) + thread * parameter(arguments, P_THREAD_BYTES)
        block_rows = most(1, PREFILL_VECTORS // group_heads)
        blocks = (q_len + block_rows - 1) // block_rows
        limit = parameter(arguments, P_PAGE_SIZE) * parameter(arguments, P_MAX_PAGES)
        if parameter(arguments, P_START) < 0 or parameter(arguments, P_STOP) > limit:
            fail(arguments, 1)
            return
        chunk = take(arguments, 0)
        while chunk < blocks * groups:
            block, group = blocks - 1 - chunk // groups, chunk % groups
            first_row = block * block_rows
            if not attend_block(arguments, group, first_row, least(block_rows, q_len - first_row), work):
                fail(arguments, 2)
            chunk = take(arguments, 0)

    return kernel
