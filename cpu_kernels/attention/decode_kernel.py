"""decode_attention: one query row per item over paged K and V, out = softmax(scale * q K^T) V with an online softmax.

An item is (query row, block of KV heads, split of the key range), taken tile by tile (decode_tile.py). Splits of
the same row are merged at the end (Flash-Decoding), so that all threads have work even with one KV head. An empty range
gives (0, -inf).

The pages of a token's heads lie side by side, so an item takes as many heads as leave every thread enough items, page
by page: memory is then read in the order of its addresses. One head alone would skip the pages of the others, and what
the prefetchers fetch beyond the end of each page is lost: 0.56 of what a plain read reaches, and not 0.75 (q8, four
heads).
"""

import numpy as np
from numba import types

from cpu_kernels.attention.codes import q_code_writer
from cpu_kernels.attention.decode_tile import attend_tile
from cpu_kernels.attention.parameters import (
    HEAD_SCALARS,
    KEY_TILE,
    SCALE_OF_Q,
    SPLIT_TILES,
    RowShape,
    q_line_bytes,
)
from cpu_kernels.attention.products.values import head_writer
from cpu_kernels.attention.tiles import MINUS_INFINITY, page_at, q_line_writer, tile_at, write_lse
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


def attend_item(isa: Isa, kv_dtype: str, score_heads: int, value_heads: int, words: int, capped: bool):
    """Function: one item, its queries loaded and its keys [start, stop) taken page by page; False: invalid page."""
    take_tile, ask_tile, places_of = attend_tile(isa, kv_dtype, score_heads, value_heads, words, capped)
    shape = RowShape.of(kv_dtype)
    has_codes, q_line, acc_line = shape.has_codes, q_line_bytes(kv_dtype, isa.has_bf16), shape.acc_bytes
    load_q = q_code_writer(isa, kv_dtype, words) if has_codes else q_line_writer(isa, kv_dtype, apart=True)

    @helper
    def load_heads(arguments, row, kv_head, places, heads, lines):
        """A KV head's queries; padding repeats the last one."""
        head_dim, queries_per_kv = parameter(arguments, DECODE.head_dim), parameter(arguments, DECODE.queries_per_kv)
        scratch, _, q, scalars, sums = places
        first = parameter(arguments, DECODE.q) + row * parameter(arguments, DECODE.q_row)
        for head in range(heads):
            index = kv_head * queries_per_kv + least(head, queries_per_kv - 1)
            source, to = first + index * parameter(arguments, DECODE.q_head), q + q_line * lines * head
            if has_codes:
                scale_at, head_sums = scalars + HEAD_SCALARS * head + SCALE_OF_Q, sums + 4 * lines * head
                load_q(source, head_dim, lines, to, scale_at, head_sums, scratch)
            else:
                load_q(source, head_dim, lines, to)

    @helper
    def advance(arguments, row, first_head, kv_heads, stop, place):
        """The tile at a place, (K page, V page, offset in them, keys, KV head), and the place after it.

        A place is (KV head, position, start of the page's keys); keys are 0 at the end, -1 where the page is invalid.
        """
        kv_head, position, page_start = place
        if page_start >= stop:
            return (0, 0, 0, 0, 0), place
        table = parameter(arguments, DECODE.table) + row * parameter(arguments, DECODE.table_row)
        page = page_at(arguments, table + (first_head + kv_head) * parameter(arguments, DECODE.table_head), position)
        if page < 0:
            return (0, 0, 0, -1, 0), place
        page_size = parameter(arguments, DECODE.page_size)
        page_stop = least(stop, (page_start // page_size + 1) * page_size)
        k_page, v_page, offset, keys = tile_at(arguments, page, position, page_stop)
        tile = k_page, v_page, offset, keys, kv_head
        if position + keys < page_stop:
            return tile, (kv_head, position + keys, page_start)
        if kv_head + 1 < kv_heads:
            return tile, (kv_head + 1, page_start, page_start)
        return tile, (0, page_stop, page_stop)

    @helper
    def item(arguments, row, first_head, kv_heads, start, stop, work, heads, lines, acc, head_bytes):
        """acc: of the first KV head, and `head_bytes` behind it of the next; (m, l) follow its accumulators."""
        acc_size = heads * acc_line * lines
        for kv_head in range(kv_heads):
            load_heads(arguments, row, first_head + kv_head, places_of(work, kv_head, heads, lines), heads, lines)
        tile, place = advance(arguments, row, first_head, kv_heads, stop, (0, start, start))
        following, place = advance(arguments, row, first_head, kv_heads, stop, place)
        if following[3] > 0:
            ask_tile(arguments, following, lines)
        while tile[3] > 0:
            ahead, place = advance(arguments, row, first_head, kv_heads, stop, place)
            kv_head = tile[4]
            places, at = places_of(work, kv_head, heads, lines), acc + kv_head * head_bytes
            take_tile(arguments, tile, ahead if ahead[3] > 0 else tile, places, heads, lines, at, at + acc_size)
            tile, following = following, ahead
        return tile[3] == 0

    return item


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


def decode(isa: Isa, kv_dtype: str, score_heads: int, value_heads: int, words: int, capped: bool = False):
    """Kernel of decode_attention; the parameters after the KV dtype are DecodeTiles. capped: whether scores are."""
    attend, merge = attend_item(isa, kv_dtype, score_heads, value_heads, words, capped), merge_splits(kv_dtype)
    line_items, acc_line = RowShape.of(kv_dtype).line_items, RowShape.of(kv_dtype).acc_bytes

    @helper
    def sizes(arguments):
        """(padded heads, lines of a row, bytes of a KV head's acc, bytes of its partial result)."""
        head_dim, queries_per_kv = parameter(arguments, DECODE.head_dim), parameter(arguments, DECODE.queries_per_kv)
        heads = (queries_per_kv + score_heads - 1) // score_heads * score_heads
        lines = (head_dim + line_items - 1) // line_items
        acc_size = heads * acc_line * lines
        return heads, lines, acc_size, acc_size + (8 * heads + 63) // 64 * 64

    @helper
    def clear(acc, acc_size, heads):
        for i in range(0, acc_size, 64):
            store_f32(splat(ZERO), acc + i)
        for head in range(heads):
            store_scalar(MINUS_INFINITY, acc + acc_size + 8 * head)
            store_scalar(ZERO, acc + acc_size + 8 * head + 4)

    @helper
    def attend_numbered(arguments, row, number, work, first_part):
        """The item of a row with this number, if it has that many, into the parts of its heads and split."""
        heads, lines, acc_size, part_bytes = sizes(arguments)
        kv_heads, most_splits = parameter(arguments, DECODE.kv_heads), parameter(arguments, DECODE.splits)
        at_once, splits, start, stop, share = share_out(arguments, row)
        blocks = kv_heads // at_once
        if number >= blocks * splits:
            return
        split, kv_head = number // blocks, number % blocks * at_once
        first, last = start + split * share, least(stop, start + split * share + share)
        acc, head_bytes = first_part + (kv_head * most_splits + split) * part_bytes, most_splits * part_bytes
        for i in range(at_once):
            clear(acc + i * head_bytes, acc_size, heads)
        if first < last and not attend(
            arguments, row, kv_head, at_once, first, last, work, heads, lines, acc, head_bytes
        ):
            fail(arguments, 2)

    @helper
    def attend_all(arguments, work, parts, row_bytes):
        """Stage 0: every item, into memory of its own."""
        most_items = parameter(arguments, DECODE.most_items)
        chunks = parameter(arguments, DECODE.rows) * most_items
        chunk = take(arguments, 0)
        while chunk < chunks:
            row = chunk // most_items
            attend_numbered(arguments, row, chunk % most_items, work, parts + row * row_bytes)
            finish(arguments, 0)
            chunk = take(arguments, 0)
        await_stage(arguments, 0, chunks)

    @helper
    def merge_all(arguments, parts):
        """Stage 1: merge every row's splits and write its results."""
        batch, kv_heads = parameter(arguments, DECODE.rows), parameter(arguments, DECODE.kv_heads)
        queries_per_kv, head_dim = parameter(arguments, DECODE.queries_per_kv), parameter(arguments, DECODE.head_dim)
        heads, _, acc_size, part_bytes = sizes(arguments)
        acc_bytes = acc_size // heads
        chunk = take(arguments, 1)
        while chunk < batch * kv_heads:
            row, kv_head = chunk // kv_heads, chunk % kv_heads
            splits = share_out(arguments, row)[1]
            out = parameter(arguments, DECODE.out) + row * parameter(arguments, DECODE.out_row)
            lse = parameter(arguments, DECODE.lse) + row * parameter(arguments, DECODE.lse_row)
            part = parts + chunk * parameter(arguments, DECODE.splits) * part_bytes
            for head in range(queries_per_kv):
                index = kv_head * queries_per_kv + head
                acc, running = part + head * acc_bytes, part + acc_size + 8 * head
                to = out + index * parameter(arguments, DECODE.out_head)
                merge(part_bytes, splits, acc, acc_bytes, running, head_dim, to, lse + 4 * index)
            chunk = take(arguments, 1)

    def kernel(arguments, thread):
        scratch, thread_bytes = parameter(arguments, DECODE.scratch), parameter(arguments, DECODE.thread_bytes)
        parts = scratch + thread_bytes * parameter(arguments, DECODE.threads)
        part_bytes = sizes(arguments)[3]
        row_bytes = parameter(arguments, DECODE.kv_heads) * parameter(arguments, DECODE.splits) * part_bytes
        attend_all(arguments, scratch + thread * thread_bytes, parts, row_bytes)
        merge_all(arguments, parts)

    return kernel
