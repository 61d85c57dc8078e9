"""decode_attention: one query row per item over paged K and V, out = softmax(scale * q K^T) V with an online softmax.

An item is (query row, KV-head group, split of the key range). For a tile of up to 64 keys at a time all query heads of
the group share one pass over K (attention_scores.py) and one over V (attention_values.py), while the next tile of keys
is prefetched. Splits of the same row are merged at the end (Flash-Decoding), so that all threads have work even with
one group. An empty range gives (0, -inf).
"""

import numpy as np
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
    SCALE_OF_Q,
    RowShape,
)
from .attention_scores import code_dots, part_block, plain_dots, whole_block
from .attention_tiles import (
    LOG2_E,
    MINUS_INFINITY,
    page_at,
    q_line_writer,
    raise_maximum,
    softmax_tile,
    tile_at,
    write_lse,
)
from .attention_values import head_writer, value_strip
from .chunks import await_stage, fail, finish, parameter, real_parameter, take
from .code_softmax import code_softmax
from .compiler import helper, inlined
from .isa import Isa
from .kv_codes import add_minima, code_weights, q_code_writer, widen_numbers
from .kv_vectors import fetch
from .scalar import larger, least, load_i32, load_scalar, most, store_scalar
from .vector import (
    LANES,
    add,
    exp2_not_positive,
    fma,
    keep_below,
    load_f32,
    mul,
    splat,
    store_f32,
    sub,
    sum_lanes,
)

ZERO = np.float32(0.0)


def tile_scores(isa: Isa, kv_dtype: str, score_heads: int, words: int):
    """Function: scores[head][key] of a tile, in units of the head's scale where there are codes."""
    shape = RowShape.of(kv_dtype)
    has_codes, has_minimum, groups_at_once = shape.has_codes, shape.numbers == 2, words // shape.group_words
    block_bytes, q_block, line_items = 4 * words, 4 * words * shape.planes, shape.line_items
    q_line, line_bytes, numbers_of_group = shape.line_bytes * shape.planes, shape.line_bytes, shape.numbers
    load = whole_block(words)
    load_part = load if has_codes else part_block(kv_dtype)
    dots = code_dots(isa, kv_dtype, score_heads, words) if has_codes else plain_dots(isa, kv_dtype, score_heads)

    @inlined
    def block_of(base, row_bytes, last, ahead, left):
        """A block of 16 keys; `left`: numbers from it to the end of a plain row."""
        if has_codes or left >= line_items:
            return load(base, row_bytes, last, ahead)
        return load_part(base, row_bytes, last, left)

    @inlined
    def code_block(block, q, q_bytes, sums, groups, scales, heads, to):
        for head in range(0, heads, score_heads):
            head_sums, head_to = sums + 4 * groups * head, to + HEAD_SCORES * head
            dots(block, q + head * q_bytes, q_bytes, head_sums, 4 * groups, scales, 4 * KEY_TILE, head_to)

    @inlined
    def plain_block(block, q, q_bytes, heads, to):
        for head in range(0, heads, score_heads):
            dots(block, q + head * q_bytes, q_bytes, to + HEAD_SCORES * head)

    @helper
    def scores(arguments, k_page, offset, keys, ahead, places, heads, lines):
        work, q, scales, sums = places
        head_dim, row_bytes = parameter(arguments, P_HEAD_DIM), parameter(arguments, P_K_ROW)
        q_bytes = q_line * lines
        for i in range(0, HEAD_SCORES * heads, 64):
            store_f32(splat(ZERO), work + i)
        if has_codes:
            stride = 2 * parameter(arguments, P_PAGE_SIZE)
            numbers = k_page + parameter(arguments, P_PAGE_SIZE) * row_bytes + 2 * offset
            widen_numbers(numbers, lines * numbers_of_group, stride, keys, scales)
        blocks = (line_bytes * lines + block_bytes - 1) // block_bytes
        for key in range(0, keys, LANES):
            row = k_page + (offset + key) * row_bytes
            for index in range(blocks):
                left = head_dim - line_items * index
                block = block_of(row + block_bytes * index, row_bytes, keys - 1 - key, ahead, left)
                ahead, at, to = ahead + LINE_BYTES * words, q + q_block * index, work + 4 * key
                if has_codes:
                    group = groups_at_once * index
                    block_scales = scales + 4 * (KEY_TILE * group + key)
                    code_block(block, at, q_bytes, sums + 4 * group, lines, block_scales, heads, to)
                else:
                    plain_block(block, at, q_bytes, heads, to)
        if has_minimum:
            for head in range(heads):
                add_minima(work + HEAD_SCORES * head, scales + 4 * KEY_TILE * lines, sums + 4 * lines * head, lines)

    return scores


def attend_tile(isa: Isa, kv_dtype: str, score_heads: int, value_heads: int, words: int):
    """Function: take one tile of keys into acc and (m, l) of the item's heads; memory as decode_thread_bytes says."""
    scores_of, strip_of = tile_scores(isa, kv_dtype, score_heads, words), value_strip(isa, kv_dtype, value_heads)
    shape = RowShape.of(kv_dtype)
    has_codes, numbers, q_line = shape.has_codes, shape.numbers, shape.line_bytes * shape.planes
    line_items, line_bytes, acc_line = shape.line_items, shape.line_bytes, shape.acc_bytes
    soften = code_softmax(score_heads) if has_codes else softmax_tile(isa, kv_dtype)
    weigh = code_weights(isa, kv_dtype) if has_codes else None

    @helper
    def ask(ahead, keys, head, stop, heads):
        """Fetch what heads [head, stop) have of the first line of the next V; all at once it would stall the loads."""
        share = (line_bytes * keys + heads - 1) // heads
        for i in range(share * head, share * stop, LINE_BYTES):
            fetch(ahead + i)

    @helper
    def soften_heads(arguments, work, heads, keys, scalars, running, ahead):
        """Scores -> weights of every head, while the first line's share of the next V is asked for."""
        scale = types.float32(real_parameter(arguments, P_SCALE) * LOG2_E)
        if has_codes:
            for head in range(0, heads, score_heads):
                at = scalars + HEAD_SCALARS * head
                soften(work + HEAD_SCORES * head, keys, scale, running + 8 * head, at)
                ask(ahead, keys, head, least(head + score_heads, heads), heads)
        else:
            for head in range(heads):
                at = scalars + HEAD_SCALARS * head
                raise_maximum(work + HEAD_SCORES * head, 0, keys, splat(scale), running + 8 * head, at)
            for head in range(heads):
                at = scalars + HEAD_SCALARS * head
                soften(work + HEAD_SCORES * head, 0, keys, splat(scale), running + 8 * head, at)
                ask(ahead, keys, head, head + 1, heads)

    @helper
    def add_values(arguments, v_page, offset, keys, ahead, work, heads, lines, scalars, acc):
        """acc of every head, one strip of V after another."""
        head_dim, row_bytes = parameter(arguments, P_HEAD_DIM), parameter(arguments, P_V_ROW)
        base, acc_bytes = v_page + offset * row_bytes, acc_line * lines
        weights, weight_bytes = work, HEAD_SCORES
        if has_codes:
            weights, weight_bytes = work + HEAD_SCORES * heads, HEAD_WEIGHTS
        for line in range(lines):
            if has_codes:
                stride = 2 * parameter(arguments, P_PAGE_SIZE)
                at = v_page + parameter(arguments, P_PAGE_SIZE) * row_bytes + 2 * offset + stride * line
                weigh(work, heads, at, at + stride * lines, keys, weights, scalars)
            for head in range(0, heads, value_heads):
                to, head_scalars = acc + head * acc_bytes + acc_line * line, scalars + HEAD_SCALARS * head
                left, at = head_dim - line_items * line, base + line_bytes * line
                p = weights + weight_bytes * head
                strip_of(to, acc_bytes, head_scalars, at, row_bytes, keys, p, left, ahead if line else at)
            ahead += line_bytes * keys

    @helper
    def places_of(work, heads, lines):
        """(scores, q, scales of K, scalars, sums of q) in the thread's working memory."""
        q = work + (HEAD_SCORES + HEAD_WEIGHTS) * heads
        scales = q + q_line * lines * heads
        scalars = scales + 4 * KEY_TILE * lines * numbers
        return work, q, scales, scalars, scalars + HEAD_SCALARS * heads

    @helper
    def take_tile(arguments, k_page, v_page, offset, keys, k_ahead, v_ahead, work, heads, lines, acc, running):
        work, q, scales, scalars, sums = places_of(work, heads, lines)
        scores_of(arguments, k_page, offset, keys, k_ahead, (work, q, scales, sums), heads, lines)
        soften_heads(arguments, work, heads, keys, scalars, running, v_ahead)
        add_values(arguments, v_page, offset, keys, v_ahead, work, heads, lines, scalars, acc)

    return take_tile, places_of


def attend_item(isa: Isa, kv_dtype: str, score_heads: int, value_heads: int, words: int):
    """Function: one item, its queries loaded and its keys [start, stop) taken tile by tile; False: invalid page."""
    take_tile, places_of = attend_tile(isa, kv_dtype, score_heads, value_heads, words)
    shape = RowShape.of(kv_dtype)
    has_codes, q_line = shape.has_codes, shape.line_bytes * shape.planes
    load_q = q_code_writer(isa, kv_dtype, words) if has_codes else q_line_writer(kv_dtype)

    @helper
    def load_heads(arguments, row, group, work, heads, lines):
        """The item's queries; padding repeats the last one."""
        head_dim, group_heads = parameter(arguments, P_HEAD_DIM), parameter(arguments, P_HEADS)
        scratch, q, _, scalars, sums = places_of(work, heads, lines)
        first = parameter(arguments, P_Q) + row * parameter(arguments, P_Q_ROW)
        for head in range(heads):
            index = group * group_heads + least(head, group_heads - 1)
            source, to = first + index * parameter(arguments, P_Q_HEAD), q + q_line * lines * head
            if has_codes:
                scale_at, head_sums = scalars + HEAD_SCALARS * head + SCALE_OF_Q, sums + 4 * lines * head
                load_q(source, head_dim, lines, to, scale_at, head_sums, scratch)
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
        write(acc, write_lse(running, lse_to), to, head_dim)

    return merge


def decode(isa: Isa, kv_dtype: str, score_heads: int, value_heads: int, words: int):
    """Kernel of decode_attention; parameters in attention_layout.py, the others are DecodeTiles."""
    attend, merge = attend_item(isa, kv_dtype, score_heads, value_heads, words), merge_splits(kv_dtype)
    line_items, acc_line = RowShape.of(kv_dtype).line_items, RowShape.of(kv_dtype).acc_bytes

    @helper
    def sizes(arguments):
        """(padded heads, lines of a row, bytes of the items' acc)."""
        head_dim, group_heads = parameter(arguments, P_HEAD_DIM), parameter(arguments, P_HEADS)
        heads = (group_heads + score_heads - 1) // score_heads * score_heads
        lines = (head_dim + line_items - 1) // line_items
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
