"""decode_attention: one query row per item over paged K and V, out = softmax(scale * q K^T) V with an online softmax.

An item is (query row, KV-head group, split of the key range). For a tile of up to 64 keys at a time all query heads of
the group share one pass over K and V: a register tile of heads x keys collects dot products, then attention_tiles.py
takes over, while the next tile of keys is prefetched. Splits of the same row are merged at the end (Flash-Decoding), so
that all threads have work even with one group. An empty range gives (0, -inf).
"""

import numpy as np
from llvmlite import ir
from numba import types

from .attention_layout import (
    HEAD_SCALARS,
    HEAD_SCORES,
    HEAD_WEIGHTS,
    KEY_TILE,
    LINE_BYTES,
    P_BATCH,
    P_GROUPS,
    P_HEAD_DIM,
    P_HEADS,
    P_K_ROW,
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
    P_V_ROW,
    RowShape,
)
from .attention_tiles import (
    LOG2_E,
    MINUS_INFINITY,
    head_writer,
    page_at,
    q_line_writer,
    softmax_tile,
    tile_at,
    value_strip,
    write_lse,
)
from .chunks import await_stage, fail, finish, parameter, real_parameter, take
from .compiler import helper
from .isa import Isa
from .kv_codes import add_minima, code_weights, q_code_writer, widen_numbers
from .kv_vectors import dot_pairs, load_codes
from .tiles import masked_line, sum_each, zeros
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
    constant,
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
    splat_value,
    store_as,
    store_f32,
    store_scalar,
    sub,
    sum_lanes,
)

ZERO = np.float32(0.0)


def scores_block(isa: Isa, kv_dtype: str, heads: int):
    """Function: `heads` x (16 / heads) dot products of q lines and K rows, written to scores[head][key].

    Rows beyond `last` repeat it. `ahead`: where the next tile's share of K begins. scales: of codes, float32
    [groups][64] from this block's first key on.
    """
    keys, shape = LANES // heads, RowShape.of(kv_dtype)
    tile, rows_type = types.UniTuple(F32x16, LANES), types.UniTuple(types.int64, keys)
    step_lines, has_scale = shape.group_lines or 1, shape.group_lines > 0
    step_bytes, item_bytes = step_lines * shape.line_bytes, LINE_BYTES // shape.line_items

    @emits(rows_type, intp, intp, types.int64)
    def rows_of(b, base, row_bytes, last):
        value = ir.Constant(ir.ArrayType(I64, keys), ir.Undefined)
        for key in range(keys):
            number = ir.Constant(I64, key)
            number = b.select(b.icmp_signed("<", number, last), number, last)
            value = b.insert_value(value, b.add(base, b.mul(number, row_bytes)), key)
        return value

    def multiply(b, sums, q, q_stride, ks):
        qs = [load_as(b, b.add(q, b.mul(q_stride, ir.Constant(I64, head))), VI32) for head in range(heads)]
        return [dot_pairs(isa, kv_dtype, b, sums[index], ks[index % keys], qs[index // keys]) for index in range(LANES)]

    def unpacked(b, sums):
        return [b.extract_value(sums, index) for index in range(LANES)]

    def packed(b, vectors):
        value = ir.Constant(ir.ArrayType(VF32, LANES), ir.Undefined)
        for index, vector in enumerate(vectors):
            value = b.insert_value(value, vector, index)
        return value

    @emits(tile, tile, intp, intp, rows_type, intp)
    def plain_step(b, sums, q, q_stride, rows, offset):
        ks = [load_codes(b, kv_dtype, b.add(b.extract_value(rows, key), offset)) for key in range(keys)]
        return packed(b, multiply(b, unpacked(b, sums), q, q_stride, ks))

    @emits(tile, tile, intp, intp, rows_type, intp, intp)
    def part_step(b, sums, q, q_stride, rows, offset, count):
        ks = [masked_line(b, b.add(b.extract_value(rows, key), offset), count, item_bytes) for key in range(keys)]
        return packed(b, multiply(b, unpacked(b, sums), q, q_stride, ks))

    @emits(tile, tile, intp, intp, rows_type, intp, intp)
    def code_step(b, sums, q, q_stride, rows, offset, scales):
        totals = unpacked(b, sums)
        for key in range(keys):  # one key after another: 16 integer sums beside 16 float ones would not fit registers
            row = b.add(b.extract_value(rows, key), offset)
            ks = [load_codes(b, kv_dtype, row, shape.line_bytes * line) for line in range(step_lines)]
            factor = splat_value(b, load_as(b, scales, F32, 4 * key))
            for head in range(heads):
                at, dot = b.add(q, b.mul(q_stride, ir.Constant(I64, head))), constant(VF32, 0.0)
                for line, k in enumerate(ks):
                    dot = dot_pairs(isa, kv_dtype, b, dot, k, load_as(b, at, VI32, LINE_BYTES * line))
                value, index = b.sitofp(b.bitcast(dot, VI32), VF32), head * keys + key
                totals[index] = fma_value(b, value, factor, totals[index])
        return packed(b, totals)

    @emits(types.void, intp)
    def fetch_step(b, ahead):
        for offset in range(0, keys * step_bytes, LINE_BYTES):
            at = b.inttoptr(b.add(ahead, ir.Constant(I64, offset)), ir.IntType(8).as_pointer())
            hints = (ir.Constant(I32, value) for value in (0, 2, 1))
            call_llvm(b, "llvm.prefetch.p0", ir.VoidType(), at, *hints)

    @emits(types.void, tile, intp)
    def store(b, sums, to):
        values = sum_each(b, unpacked(b, sums))
        for head in range(heads):
            lanes = ir.Constant(ir.VectorType(I32, keys), list(range(head * keys, (head + 1) * keys)))
            store_as(b, b.shuffle_vector(values, values, lanes), to, HEAD_SCORES * head)

    start, line_items, fetched = zeros(LANES), shape.line_items, keys * step_bytes

    @helper
    def code_scores(q, q_stride, base, row_bytes, last, steps, scales, ahead, to):
        sums, rows = start(), rows_of(base, row_bytes, last)
        for step in range(steps):
            fetch_step(ahead + fetched * step)
            at = q + LINE_BYTES * step_lines * step
            sums = code_step(sums, at, q_stride, rows, step_bytes * step, scales + 4 * KEY_TILE * step)
        store(sums, to)

    @helper
    def plain_scores(q, q_stride, base, row_bytes, last, head_dim, scales, ahead, to):
        sums, rows = start(), rows_of(base, row_bytes, last)
        whole = head_dim // line_items
        for index in range(whole):
            fetch_step(ahead + fetched * index)
            sums = plain_step(sums, q + LINE_BYTES * index, q_stride, rows, LINE_BYTES * index)
        rest = head_dim - whole * line_items
        if rest:
            sums = part_step(sums, q + LINE_BYTES * whole, q_stride, rows, LINE_BYTES * whole, rest)
        store(sums, to)

    return code_scores if has_scale else plain_scores


def attend_tile(isa: Isa, kv_dtype: str, score_heads: int, value_heads: int):
    """Function: take one tile of keys into acc and (m, l) of the item's heads; memory as decode_thread_bytes says."""
    scores_of, strip_of = scores_block(isa, kv_dtype, score_heads), value_strip(isa, kv_dtype, value_heads)
    shape, block_keys = RowShape.of(kv_dtype), LANES // score_heads
    has_codes, has_minimum = shape.group_lines > 0, shape.numbers == 2
    line_items, line_bytes, acc_line, numbers = shape.line_items, shape.line_bytes, shape.acc_bytes, shape.numbers
    group_lines = shape.group_lines or 1
    weigh = code_weights(kv_dtype) if has_codes else None

    @helper
    def score_heads_of(arguments, k_page, offset, keys, ahead, work, heads, lines):
        """scores[head][key] of a tile; codes' are in units of the head's scale."""
        head_dim, row_bytes = parameter(arguments, P_HEAD_DIM), parameter(arguments, P_K_ROW)
        weights = work + HEAD_SCORES * heads
        q, q_bytes = weights + HEAD_WEIGHTS * heads, LINE_BYTES * lines
        scales, groups = q + q_bytes * heads, lines // group_lines
        sums = scales + 4 * KEY_TILE * groups * numbers + HEAD_SCALARS * heads
        base, extent = k_page + offset * row_bytes, head_dim
        if has_codes:
            extent, stride = groups, 2 * parameter(arguments, P_PAGE_SIZE)
            at = k_page + parameter(arguments, P_PAGE_SIZE) * row_bytes + 2 * offset
            widen_numbers(at, groups * numbers, stride, keys, scales)
        for head in range(0, heads, score_heads):
            for key in range(0, keys, block_keys):
                at, last = base + key * row_bytes, keys - 1 - key
                to = work + HEAD_SCORES * head + 4 * key
                scores_of(q + head * q_bytes, q_bytes, at, row_bytes, last, extent, scales + 4 * key, ahead, to)
                ahead += block_keys * row_bytes
        if has_minimum:
            for head in range(heads):
                minima = scales + 4 * KEY_TILE * groups
                add_minima(work + HEAD_SCORES * head, minima, sums + 4 * groups * head, groups)

    @helper
    def soften(work, heads, keys, scale, scalars, running):
        """Scores -> weights of every head."""
        for head in range(heads):
            scores, at = work + HEAD_SCORES * head, scalars + HEAD_SCALARS * head
            factor = scale * load_scalar(at + 12) if has_codes else scale
            softmax_tile(scores, 0, keys, splat(factor), running + 8 * head, at)

    @helper
    def add_values(arguments, v_page, offset, keys, ahead, work, heads, lines, scalars, acc):
        """acc of every head, one strip of V after another."""
        head_dim, row_bytes = parameter(arguments, P_HEAD_DIM), parameter(arguments, P_V_ROW)
        weights, base, acc_bytes = work + HEAD_SCORES * heads, v_page + offset * row_bytes, acc_line * lines
        stride, groups = 2 * parameter(arguments, P_PAGE_SIZE), lines // group_lines
        numbers_at = v_page + parameter(arguments, P_PAGE_SIZE) * row_bytes + 2 * offset
        source = weights if has_codes else work
        source_bytes = HEAD_WEIGHTS if has_codes else HEAD_SCORES
        for line in range(lines):
            if has_codes:
                group = line // group_lines
                if line == group * group_lines:
                    at = numbers_at + stride * group
                    weigh(work, heads, at, at + stride * groups, keys, weights, scalars)
            for head in range(0, heads, value_heads):
                to, head_scalars = acc + head * acc_bytes + acc_line * line, scalars + HEAD_SCALARS * head
                left, at = head_dim - line_items * line, base + line_bytes * line
                p = source + source_bytes * head
                strip_of(to, acc_bytes, head_scalars, at, row_bytes, keys, p, left, ahead)
            ahead += line_bytes * keys

    @helper
    def take_tile(arguments, k_page, v_page, offset, keys, k_ahead, v_ahead, work, heads, lines, acc, running):
        groups = lines // group_lines
        scalars = work + (HEAD_SCORES + HEAD_WEIGHTS + LINE_BYTES * lines) * heads + 4 * KEY_TILE * groups * numbers
        scale = types.float32(real_parameter(arguments, P_SCALE) * LOG2_E)
        score_heads_of(arguments, k_page, offset, keys, k_ahead, work, heads, lines)
        soften(work, heads, keys, scale, scalars, running)
        add_values(arguments, v_page, offset, keys, v_ahead, work, heads, lines, scalars, acc)

    return take_tile


def attend_item(isa: Isa, kv_dtype: str, score_heads: int, value_heads: int):
    """Function: one item, its queries loaded and its keys [start, stop) taken tile by tile; False: invalid page."""
    take_tile = attend_tile(isa, kv_dtype, score_heads, value_heads)
    shape = RowShape.of(kv_dtype)
    has_codes, group_lines, numbers = shape.group_lines > 0, shape.group_lines or 1, shape.numbers
    load_q = q_code_writer(kv_dtype) if has_codes else q_line_writer(kv_dtype)

    @helper
    def load_heads(arguments, row, group, work, heads, lines):
        """The item's queries; padding repeats the last one."""
        head_dim, group_heads = parameter(arguments, P_HEAD_DIM), parameter(arguments, P_HEADS)
        q, groups = work + (HEAD_SCORES + HEAD_WEIGHTS) * heads, lines // group_lines
        scalars = q + LINE_BYTES * lines * heads + 4 * KEY_TILE * groups * numbers
        sums = scalars + HEAD_SCALARS * heads
        first = parameter(arguments, P_Q) + row * parameter(arguments, P_Q_ROW)
        for head in range(heads):
            index = group * group_heads + least(head, group_heads - 1)
            source, to = first + index * parameter(arguments, P_Q_HEAD), q + LINE_BYTES * lines * head
            if has_codes:
                load_q(source, head_dim, groups, to, scalars + HEAD_SCALARS * head + 12, sums + 4 * groups * head)
            else:
                load_q(source, head_dim, lines, to)

    @helper
    def item(arguments, row, group, start, stop, work, heads, lines, acc, running):
        table = parameter(arguments, P_TABLE) + row * parameter(arguments, P_TABLE_ROW)
        table += group * parameter(arguments, P_TABLE_GROUP)
        load_heads(arguments, row, group, work, heads, lines)
        k_row, v_row = parameter(arguments, P_K_ROW), parameter(arguments, P_V_ROW)
        position, page = start, page_at(arguments, table, start)
        while position < stop:
            if page < 0:
                return False
            k_page, v_page, offset, keys = tile_at(arguments, page, position, stop)
            position += keys
            k_ahead, v_ahead = k_page + offset * k_row, v_page + offset * v_row
            if position < stop:
                page = page_at(arguments, table, position)
                if page >= 0:
                    k_next, v_next, next_offset, _ = tile_at(arguments, page, position, stop)
                    k_ahead, v_ahead = k_next + next_offset * k_row, v_next + next_offset * v_row
            take_tile(arguments, k_page, v_page, offset, keys, k_ahead, v_ahead, work, heads, lines, acc, running)
        return True

    return item


def merge_splits(kv_dtype: str):
    """Function: merge the splits of one head into split 0's acc and (m, l), and write out and lse."""
    write = head_writer(kv_dtype)

    @helper
    def merge(item_bytes, splits, acc, acc_bytes, running, head_dim, to, lse_to):
        largest = MINUS_INFINITY
        for split in range(splits):
            largest = larger(largest, load_scalar(running + split * item_bytes))
        m, total = splat(largest), splat(ZERO)
        for split in range(splits):
            state = running + split * item_bytes
            weight = splat(ZERO)
            if load_scalar(state) != MINUS_INFINITY:
                weight = exp2_not_positive(sub(splat(load_scalar(state)), m))
            total = fma(splat(load_scalar(state + 4)), weight, total)
            for i in range(0, acc_bytes, 64):
                value = mul(load_f32(acc + split * item_bytes + i), weight)
                store_f32(add(load_f32(acc + i), value) if split else value, acc + i)
        store_scalar(largest, running)
        store_scalar(sum_lanes(keep_below(total, 1, ZERO)), running + 4)
        write(acc, splat(write_lse(running, lse_to)), to, head_dim)

    return merge


def decode(isa: Isa, kv_dtype: str, score_heads: int, value_heads: int):
    """Kernel of decode_attention; parameters in attention_layout.py."""
    attend, merge = attend_item(isa, kv_dtype, score_heads, value_heads), merge_splits(kv_dtype)
    shape = RowShape.of(kv_dtype)
    row_items, acc_line = shape.line_items * (shape.group_lines or 1), shape.acc_bytes
    group_lines = shape.group_lines or 1

    @helper
    def sizes(arguments):
        """(padded heads, lines of a row, bytes of the items' acc)."""
        head_dim, group_heads = parameter(arguments, P_HEAD_DIM), parameter(arguments, P_HEADS)
        heads = (group_heads + score_heads - 1) // score_heads * score_heads
        lines = (head_dim + row_items - 1) // row_items * group_lines
        return heads, lines, heads * acc_line * lines

    @helper
    def part_of_range(arguments, row, split):
        """This split's keys of a row; (0, 0) and a failure for a range outside the table."""
        splits = parameter(arguments, P_SPLITS)
        start = types.int64(load_i32(parameter(arguments, P_START) + 4 * row))
        stop = types.int64(load_i32(parameter(arguments, P_STOP) + 4 * row))
        if start < 0 or stop > parameter(arguments, P_PAGE_SIZE) * parameter(arguments, P_MAX_PAGES):
            fail(arguments, 1)
            return 0, 0
        share = (most(0, stop - start) + splits * KEY_TILE - 1) // (splits * KEY_TILE) * KEY_TILE
        first = start + split * share
        return first, least(stop, first + share)

    @helper
    def clear(acc, running, heads):
        for i in range(0, running - acc, 64):
            store_f32(splat(ZERO), acc + i)
        for head in range(heads):
            store_scalar(MINUS_INFINITY, running + 8 * head)
            store_scalar(ZERO, running + 8 * head + 4)

    @helper
    def attend_all(arguments, work, first_item, item_bytes, items, heads, lines, acc_size):
        """Stage 0: every item, into memory of its own."""
        splits, groups = parameter(arguments, P_SPLITS), parameter(arguments, P_GROUPS)
        chunk = take(arguments, 0)
        while chunk < items:
            row, group, split = chunk // (groups * splits), chunk // splits % groups, chunk % splits
            acc = first_item + chunk * item_bytes
            running = acc + acc_size
            clear(acc, running, heads)
            start, stop = part_of_range(arguments, row, split)
            if start < stop and not attend(arguments, row, group, start, stop, work, heads, lines, acc, running):
                fail(arguments, 2)
            finish(arguments, 0)
            chunk = take(arguments, 0)

    @helper
    def merge_all(arguments, first_item, item_bytes, heads, acc_size):
        """Stage 1: merge every row's splits and write its results."""
        batch, groups = parameter(arguments, P_BATCH), parameter(arguments, P_GROUPS)
        group_heads, splits = parameter(arguments, P_HEADS), parameter(arguments, P_SPLITS)
        head_dim, acc_bytes = parameter(arguments, P_HEAD_DIM), acc_size // heads
        chunk = take(arguments, 1)
        while chunk < batch * groups:
            row, group = chunk // groups, chunk % groups
            out = parameter(arguments, P_OUT) + row * parameter(arguments, P_OUT_ROW)
            lse = parameter(arguments, P_LSE) + row * parameter(arguments, P_LSE_ROW)
            item = first_item + chunk * splits * item_bytes
            for head in range(group_heads):
                index = group * group_heads + head
                acc, running = item + head * acc_bytes, item + acc_size + 8 * head
                to = out + index * parameter(arguments, P_OUT_HEAD)
                merge(item_bytes, splits, acc, acc_bytes, running, head_dim, to, lse + 4 * index)
            chunk = take(arguments, 1)

    def kernel(arguments, thread):
        scratch = parameter(arguments, 0)
        heads, lines, acc_size = sizes(arguments)
        item_bytes = acc_size + (8 * heads + 63) // 64 * 64
        work = scratch + thread * parameter(arguments, P_THREAD_BYTES)
        first_item = scratch + parameter(arguments, P_THREAD_BYTES) * parameter(arguments, P_THREADS)
        items = parameter(arguments, P_BATCH) * parameter(arguments, P_GROUPS) * parameter(arguments, P_SPLITS)
        attend_all(arguments, work, first_item, item_bytes, items, heads, lines, acc_size)
        await_stage(arguments, 0, items)
        merge_all(arguments, first_item, item_bytes, heads, acc_size)

    return kernel
