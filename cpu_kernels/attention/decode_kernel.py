"""decode_attention: rows of q over paged K and V, out = softmax(scale * q K^T) V with an online softmax.

An item is (rows of one sequence that follow one another, block of KV heads, split of the key range), taken page by page
(decode_item.py). Splits of the same row are merged at the end (Flash-Decoding), so that all threads have work even with
one KV head. An empty range gives (0, -inf).

The pages of a token's heads lie side by side, so an item takes as many heads as leave every thread enough items, page
by page: memory is then read in the order of its addresses. One head alone would skip the pages of the others, and what
the prefetchers fetch beyond the end of each page is lost: 0.56 of what a plain read reaches, and not 0.75 (q8, four
heads).

How a row's keys are shared out does not depend on the rows beside it, and rows are taken together only where theirs are
shared out alike: its sums are the same bits as alone.
"""

import numpy as np
from numba import types

from cpu_kernels.attention.decode_item import attend_item, set_bounds, states_of_row, table_of
from cpu_kernels.attention.parameters import HEAD_STATE, KEY_TILE, ROWS_TOGETHER, SPLIT_TILES, RowShape
from cpu_kernels.attention.products.values import head_writer
from cpu_kernels.attention.tiles import MINUS_INFINITY, write_lse
from cpu_kernels.team.arguments import DECODE
from cpu_kernels.team.chunks import await_stage, fail, finish, parameter, take
from cpu_kernels.vectors.arithmetic import add, exp2_not_positive, fma, keep_below, mul, sub, sum_lanes
from cpu_kernels.vectors.compiler import helper
from cpu_kernels.vectors.isa import Isa
from cpu_kernels.vectors.scalar import larger, least, load_i32, load_scalar, most, store_scalar
from cpu_kernels.vectors.vector import load_f32, splat, store_f32

ZERO = np.float32(0.0)


def merge_splits(kv_dtype: str):
    """Function: merge the splits of one head into split 0's acc and (m, l), and write out and lse."""
    write = head_writer(kv_dtype)

    @helper
    def merge(part_bytes, splits, acc, acc_bytes, running, head_dim, to, lse_to):
        largest = MINUS_INFINITY
        for split in range(splits):
            largest = larger(largest, load_scalar(running + split * part_bytes))
        m, total = splat(largest), splat(ZERO)
        for split in range(splits):
            state = running + split * part_bytes
            weight = splat(ZERO)
            if load_scalar(state) != MINUS_INFINITY:
                weight = exp2_not_positive(sub(splat(load_scalar(state)), m))
            total = fma(splat(load_scalar(state + 4)), weight, total)
            for i in range(0, acc_bytes, 64):
                value = mul(load_f32(acc + split * part_bytes + i), weight)
                store_f32(add(load_f32(acc + i), value) if split else value, acc + i)
        store_scalar(largest, running)
        store_scalar(sum_lanes(keep_below(total, 1, ZERO)), running + 4)
        write(acc, write_lse(running, lse_to), to, head_dim)

    return merge


@helper
def share_out(arguments, row):
    """(KV heads an item takes, splits, first key, last key, keys of a split) of a row; no keys and a failure for a
    range outside the table.

    As many heads as leave the row its items: all of them where there are many keys.
    """
    kv_heads, items = parameter(arguments, DECODE.kv_heads), parameter(arguments, DECODE.items)
    start = types.int64(load_i32(parameter(arguments, DECODE.start) + 4 * row))
    stop = types.int64(load_i32(parameter(arguments, DECODE.stop) + 4 * row))
    if start < 0 or stop > parameter(arguments, DECODE.page_size) * parameter(arguments, DECODE.max_pages):
        fail(arguments, 1)
        start, stop = 0, 0
    tiles = (most(0, stop - start) + KEY_TILE - 1) // KEY_TILE
    splits = most(tiles // SPLIT_TILES, least(tiles, (items + kv_heads - 1) // kv_heads))
    splits = most(1, least(parameter(arguments, DECODE.splits), splits))
    at_once = kv_heads if kv_heads * splits >= 2 * items else 1
    while at_once > 1 and (kv_heads % at_once > 0 or kv_heads // at_once * splits < items):
        at_once -= 1
    blocks = kv_heads // at_once
    splits = least(splits, (items + blocks - 1) // blocks)
    return at_once, splits, start, stop, (tiles + splits - 1) // splits * KEY_TILE


@helper
def is_with_the_one_before(arguments, row):
    """Whether a row and the one before it are of one sequence, and their keys are shared out alike.

    Of one sequence: their last common key is in the same page. That rows are together is never wrong, only slower where
    they have no pages in common.
    """
    if row % ROWS_TOGETHER == 0:
        return False
    bounds, page_size = 4 * (row - 1), parameter(arguments, DECODE.page_size)
    starts, stops = parameter(arguments, DECODE.start) + bounds, parameter(arguments, DECODE.stop) + bounds
    start = most(load_i32(starts), load_i32(starts + 4))
    last = least(load_i32(stops), load_i32(stops + 4)) - 1
    if start < 0 or last < start or last >= page_size * parameter(arguments, DECODE.max_pages):
        return False
    page = 4 * (last // page_size)
    if load_i32(table_of(arguments, row - 1, 0) + page) != load_i32(table_of(arguments, row, 0) + page):
        return False
    before, own = share_out(arguments, row - 1), share_out(arguments, row)
    return before[0] == own[0] and before[1] == own[1]


def decode(isa: Isa, kv_dtype: str, score_heads: int, value_heads: int, words: int, capped: bool = False):
    """Kernel of decode_attention; the parameters after the KV dtype are DecodeTiles. capped: whether scores are."""
    attend, merge = attend_item(isa, kv_dtype, score_heads, value_heads, words, capped), merge_splits(kv_dtype)
    line_items, acc_line = RowShape.of(kv_dtype).line_items, RowShape.of(kv_dtype).acc_bytes

    @helper
    def sizes(arguments):
        """(padded heads, lines of a row, bytes of a row's acc of a KV head, of its states, of all rows' of a split)."""
        head_dim, queries_per_kv = parameter(arguments, DECODE.head_dim), parameter(arguments, DECODE.queries_per_kv)
        heads = (queries_per_kv + score_heads - 1) // score_heads * score_heads
        lines = (head_dim + line_items - 1) // line_items
        acc_bytes, states = heads * acc_line * lines, states_of_row(heads)
        return heads, lines, acc_bytes, states, parameter(arguments, DECODE.rows) * (acc_bytes + states)

    @helper
    def set_rows(arguments, row, split, work):
        """Set the bounds of a split of this row and of those that are taken with it; returns their number."""
        rows, batch = 0, parameter(arguments, DECODE.rows)
        while row + rows < batch and (rows == 0 or is_with_the_one_before(arguments, row + rows)):
            _, _, start, stop, share = share_out(arguments, row + rows)
            first = start + split * share
            set_bounds(work, rows, first, least(stop, first + share))
            rows += 1
        return rows

    @helper
    def attend_numbered(arguments, row, number, work, parts):
        """The item with this number of a row and of those that are taken with it, if it has that many."""
        if is_with_the_one_before(arguments, row):
            return
        heads, lines, acc_bytes, states, part_bytes = sizes(arguments)
        kv_heads, most_splits = parameter(arguments, DECODE.kv_heads), parameter(arguments, DECODE.splits)
        at_once, splits, _, _, _ = share_out(arguments, row)
        blocks = kv_heads // at_once
        if number >= blocks * splits:
            return
        split, kv_head = number // blocks, number % blocks * at_once
        rows, head_bytes = set_rows(arguments, row, split, work), most_splits * part_bytes
        part = parts + (kv_head * most_splits + split) * part_bytes
        acc, running = part + row * acc_bytes, part + parameter(arguments, DECODE.rows) * acc_bytes + row * states
        for i in range(at_once):
            for at in range(0, rows * acc_bytes, 64):
                store_f32(splat(ZERO), acc + i * head_bytes + at)
        item = row, rows, kv_head, at_once, heads, lines
        if not attend(arguments, item, work, acc, running, head_bytes):
            fail(arguments, 2)

    @helper
    def attend_all(arguments, work, parts):
        """Stage 0: every item, into memory of its own."""
        most_items = parameter(arguments, DECODE.most_items)
        chunks = parameter(arguments, DECODE.rows) * most_items
        chunk = take(arguments, 0)
        while chunk < chunks:
            attend_numbered(arguments, chunk // most_items, chunk % most_items, work, parts)
            finish(arguments, 0)
            chunk = take(arguments, 0)
        await_stage(arguments, 0, chunks)

    @helper
    def merge_all(arguments, parts):
        """Stage 1: merge every row's splits and write its results."""
        batch, kv_heads = parameter(arguments, DECODE.rows), parameter(arguments, DECODE.kv_heads)
        queries_per_kv, head_dim = parameter(arguments, DECODE.queries_per_kv), parameter(arguments, DECODE.head_dim)
        heads, _, row_bytes, states, part_bytes = sizes(arguments)
        acc_bytes = row_bytes // heads
        chunk = take(arguments, 1)
        while chunk < batch * kv_heads:
            row, kv_head = chunk // kv_heads, chunk % kv_heads
            splits = share_out(arguments, row)[1]
            out = parameter(arguments, DECODE.out) + row * parameter(arguments, DECODE.out_row)
            lse = parameter(arguments, DECODE.lse) + row * parameter(arguments, DECODE.lse_row)
            part = parts + kv_head * parameter(arguments, DECODE.splits) * part_bytes
            first_acc, first_state = part + row * row_bytes, part + batch * row_bytes + row * states
            for head in range(queries_per_kv):
                index = kv_head * queries_per_kv + head
                acc, running = first_acc + head * acc_bytes, first_state + HEAD_STATE * head
                to = out + index * parameter(arguments, DECODE.out_head)
                merge(part_bytes, splits, acc, acc_bytes, running, head_dim, to, lse + 4 * index)
            chunk = take(arguments, 1)

    def kernel(arguments, thread):
        scratch, thread_bytes = parameter(arguments, DECODE.scratch), parameter(arguments, DECODE.thread_bytes)
        parts = scratch + thread_bytes * parameter(arguments, DECODE.threads)
        attend_all(arguments, scratch + thread * thread_bytes, parts)
        merge_all(arguments, parts)

    return kernel
