"""One item of decode: some rows of q over a split of their keys, page after page of a block of KV heads.

Rows of one sequence see the same keys but for the last ones, so they are taken together and a page is read from memory
once: where they see the same keys of it, several rows' query vectors take its tiles as heads of one row do, and what
remains of the rows finds the page in the cache. Which keys and pages a row sees is asked page by page. Every row's
tiles, and the sums inside them, are those of a pass of its own.
"""

import numpy as np

from cpu_kernels.attention.codes import q_code_writer
from cpu_kernels.attention.decode_tile import attend_tile
from cpu_kernels.attention.parameters import (
    BOUNDS_BYTES,
    HEAD_SCALARS,
    HEAD_STATE,
    SCALE_OF_Q,
    RowShape,
    q_line_bytes,
    state_bytes,
    vectors_at_once,
)
from cpu_kernels.attention.products.row_scores import query_weaver
from cpu_kernels.attention.tiles import MINUS_INFINITY, page_at, q_line_writer, tile_at
from cpu_kernels.team.arguments import DECODE
from cpu_kernels.team.chunks import parameter
from cpu_kernels.vectors.compiler import helper
from cpu_kernels.vectors.isa import Isa
from cpu_kernels.vectors.scalar import least, load_i32, load_i64, most, store_i64, store_scalar

ZERO = np.float32(0.0)
TILES_AHEAD = 2  # how far before its turn a tile is asked for; other distances were slower (docs/log.md)
states_of_row = helper(state_bytes)


@helper
def set_bounds(work, row, first, last):
    """Keep the keys [first, last) of an item's row."""
    store_i64(first, work + BOUNDS_BYTES * row)
    store_i64(last, work + BOUNDS_BYTES * row + 8)


@helper
def seen(work, row, page_start, page_stop):
    """The keys [first, last) of a page that an item's row sees."""
    at = work + BOUNDS_BYTES * row
    return most(page_start, load_i64(at)), least(page_stop, load_i64(at + 8))


@helper
def all_seen(work, rows):
    """The keys [first, last) that any of an item's rows sees."""
    start, stop = load_i64(work), load_i64(work + 8)
    for row in range(1, rows):
        first, last = load_i64(work + BOUNDS_BYTES * row), load_i64(work + BOUNDS_BYTES * row + 8)
        if first < last:
            start, stop = least(start, first) if start < stop else first, most(stop, last)
    return start, stop


@helper
def table_of(arguments, row, kv_head):
    """Address of the pages of a row's KV head."""
    table = parameter(arguments, DECODE.table) + row * parameter(arguments, DECODE.table_row)
    return table + kv_head * parameter(arguments, DECODE.table_head)


@helper
def rows_alike(arguments, work, table, row, limit, page_start, page_stop):
    """How many rows from `row` on, before `limit`, see the same keys of the same page; table: of row 0."""
    table_row = parameter(arguments, DECODE.table_row)
    first, last = seen(work, row, page_start, page_stop)
    entry = table + 4 * (first // parameter(arguments, DECODE.page_size))
    page, other = load_i32(entry + row * table_row), row + 1
    while other < limit:
        start, stop = seen(work, other, page_start, page_stop)
        if start != first or stop != last or load_i32(entry + other * table_row) != page:
            break
        other += 1
    return other - row


@helper
def tile_ahead(arguments, table, kv_head, kv_heads, position, last, steps):
    """(K page, V page, offset in them, keys) of the tile so many KV heads and pages further on; no keys where there is
    none. table: of the item's first KV head."""
    kv_head += steps
    while kv_head >= kv_heads:
        kv_head, position = kv_head - kv_heads, position + parameter(arguments, DECODE.page_size)
    if position >= last:
        return 0, 0, 0, 0
    page = page_at(arguments, table + kv_head * parameter(arguments, DECODE.table_head), position)
    if page < 0:
        return 0, 0, 0, 0
    return tile_at(arguments, page, position, last)


def load_queries(isa: Isa, kv_dtype: str, score_heads: int, words: int):
    """Function: one row's queries of a KV head, padding repeats the last one; and (m, l) of nothing."""
    has_codes, q_line = RowShape.of(kv_dtype).has_codes, q_line_bytes(kv_dtype, isa.has_bf16)
    load_q = q_code_writer(isa, kv_dtype, words) if has_codes else q_line_writer(isa, kv_dtype, apart=True)
    weave = None if words else query_weaver(isa, score_heads)
    is_woven = weave is not None

    @helper
    def load(arguments, row, kv_head, places, heads, lines):
        head_dim, queries_per_kv = parameter(arguments, DECODE.head_dim), parameter(arguments, DECODE.queries_per_kv)
        scratch, _, q, scalars, sums, running = places
        first = parameter(arguments, DECODE.q) + row * parameter(arguments, DECODE.q_row)
        for head in range(heads):
            index = kv_head * queries_per_kv + least(head, queries_per_kv - 1)
            source, to = first + index * parameter(arguments, DECODE.q_head), q + q_line * lines * head
            if has_codes:
                scale_at, head_sums = scalars + HEAD_SCALARS * head + SCALE_OF_Q, sums + 4 * lines * head
                load_q(source, head_dim, lines, to, scale_at, head_sums, scratch)
            else:
                load_q(source, head_dim, lines, to)
            store_scalar(MINUS_INFINITY, running + HEAD_STATE * head)
            store_scalar(ZERO, running + HEAD_STATE * head + 4)
        if is_woven:
            for head in range(0, heads, score_heads):
                weave(q + q_line * lines * head, q_line * lines)

    return load


def attend_item(isa: Isa, kv_dtype: str, score_heads: int, value_heads: int, words: int, capped: bool):
    """Function: one item, whose rows' bounds are set; False: a page is invalid."""
    take_tile, ask_tile, places_of = attend_tile(isa, kv_dtype, score_heads, value_heads, words, capped)
    load, acc_line, most_vectors = (
        load_queries(isa, kv_dtype, score_heads, words),
        RowShape.of(kv_dtype).acc_bytes,
        vectors_at_once(words),
    )

    @helper
    def take_keys(arguments, item, page, kv_head, position, last, work, vector, vectors, asks, acc):
        """The keys [position, last) of a page for so many query vectors from `vector` on; acc: of the first of them.

        asks: whether K, and V, of a later tile is asked for meanwhile; else the tile itself is, which costs least.
        """
        first_row, rows, first_head, kv_heads, heads, lines = item
        table, stop = table_of(arguments, first_row, first_head), load_i64(work + 8)
        places = places_of(work, kv_head, vector, rows, heads, lines)
        while position < last:
            tile = tile_at(arguments, page, position, last)
            ahead = tile_ahead(arguments, table, kv_head, kv_heads, position, stop, TILES_AHEAD)
            k_ahead = ahead if asks[0] and ahead[3] > 0 else tile
            v_ahead = ahead if asks[1] and ahead[3] > 0 else tile
            take_tile(arguments, tile, k_ahead, v_ahead, places, vectors, lines, acc)
            position += tile[3]

    @helper
    def take_page(arguments, item, kv_head, page_start, page_stop, work, acc):
        """A page's keys of one KV head for all rows of the item; acc: of its first row. False: the page is invalid."""
        first_row, rows, first_head, kv_heads, heads, lines = item
        table, rows_at_once = table_of(arguments, first_row, first_head + kv_head), most(1, most_vectors // heads)
        row, turn = 0, 0
        while row < rows:
            position, last = seen(work, row, page_start, page_stop)
            if position >= last:
                row += 1
                continue
            page = page_at(arguments, table + row * parameter(arguments, DECODE.table_row), position)
            if page < 0:
                return False
            limit = least(rows, row + rows_at_once)
            count = rows_alike(arguments, work, table, row, limit, page_start, page_stop)
            asks = turn == 0, turn == 1 or (turn == 0 and row + count == rows)
            vector, vectors, to = row * heads, count * heads, acc + row * heads * acc_line * lines
            take_keys(arguments, item, page, kv_head, position, last, work, vector, vectors, asks, to)
            row, turn = row + count, turn + 1
        return True

    @helper
    def start(arguments, item, work):
        """Load the item's queries and ask for its second tile."""
        first_row, rows, first_head, kv_heads, heads, lines = item
        for kv_head in range(kv_heads):
            for row in range(rows):
                places = places_of(work, kv_head, row * heads, rows, heads, lines)
                load(arguments, first_row + row, first_head + kv_head, places, heads, lines)
        first, last = load_i64(work), load_i64(work + 8)
        following = tile_ahead(arguments, table_of(arguments, first_row, first_head), 0, kv_heads, first, last, 1)
        if following[3] > 0:
            ask_tile(arguments, following, lines)

    @helper
    def keep(item, work, running, head_bytes, row_bytes):
        """(m, l) of the item's rows and heads to where they are merged; running: of the first of them."""
        _, rows, _, kv_heads, heads, lines = item
        for kv_head in range(kv_heads):
            for row in range(rows):
                source = places_of(work, kv_head, row * heads, rows, heads, lines)[5]
                for head in range(heads):
                    state = load_i64(source + HEAD_STATE * head)
                    store_i64(state, running + kv_head * head_bytes + row * row_bytes + HEAD_STATE * head)

    @helper
    def attend(arguments, item, work, acc, running, head_bytes):
        """item: (first row, rows, first KV head, KV heads, padded heads of each, lines of a row). acc, running: of its
        first row and KV head; those of the next KV head are `head_bytes` further on."""
        page_size, kv_heads, heads = parameter(arguments, DECODE.page_size), item[3], item[4]
        start(arguments, item, work)
        page_start, stop = all_seen(work, item[1])
        while page_start < stop:
            page_stop = least(stop, (page_start // page_size + 1) * page_size)
            for kv_head in range(kv_heads):
                if not take_page(arguments, item, kv_head, page_start, page_stop, work, acc + kv_head * head_bytes):
                    return False
            page_start = page_stop
        keep(item, work, running, head_bytes, states_of_row(heads))
        return True

    return attend
