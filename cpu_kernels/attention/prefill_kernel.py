"""prefill_attention: causal attention of many rows of one sequence, tiled over queries and keys.

An item is (KV head, block of rows): its rows x heads are up to 64 query vectors that share one pass over the
keys. A tile of 64 keys is transposed once, so that 16 keys are the lanes of a register and 4 queries x 64 keys fill 16
of them without sums across lanes; then softmax and the weighted sum of V as in vectors/tiles.py (prefill_tile.py).
Pages of codes are widened to bf16 first, a tile at a time. Causal and window masks become a visible range of lanes per
row. Items are handed out from the end, where rows see most keys, so that the last ones to finish are short.
"""

import numpy as np

from cpu_kernels.attention.parameters import (
    HEAD_SCALARS,
    HEAD_SCORES,
    KEY_TILE,
    LINE_BYTES,
    PREFILL_VALUES,
    PREFILL_VECTORS,
    RowShape,
    q_line_bytes,
    wide_dtype,
)
from cpu_kernels.attention.prefill_tile import attend_tile, rows_of_tile
from cpu_kernels.attention.products.scores import part_block, store_block, whole_block
from cpu_kernels.attention.products.values import head_writer
from cpu_kernels.attention.tiles import MINUS_INFINITY, page_at, q_line_writer, tile_at, write_lse
from cpu_kernels.team.arguments import PREFILL
from cpu_kernels.team.chunks import fail, parameter, take
from cpu_kernels.vectors.compiler import helper
from cpu_kernels.vectors.isa import Isa
from cpu_kernels.vectors.scalar import least, most, store_scalar
from cpu_kernels.vectors.vector import LANES, splat, store_f32

ZERO = np.float32(0.0)


def tile_transposer(kv_dtype: str):
    """Function: a tile's K rows -> [words][64 keys]. kv_dtype: of the rows multiplied."""
    load, load_part, line_items = whole_block(LANES), part_block(kv_dtype), RowShape.of(kv_dtype).line_items

    @helper
    def transpose_tile(rows, row_bytes, keys, items, lines, to):
        for line in range(lines):
            left = items - line_items * line
            for key in range(0, keys, LANES):
                at, last = rows + key * row_bytes + LINE_BYTES * line, keys - 1 - key
                if left >= line_items:
                    block = load(at, row_bytes, last, at)
                else:
                    block = load_part(at, row_bytes, last, left)
                store_block(block, to + 4 * KEY_TILE * LANES * line + 4 * key, 4 * KEY_TILE)

    return transpose_tile


def vector_starter(isa: Isa, kv_dtype: str):
    """Function: load an item's queries, the last one repeated as padding; acc and (m, l) of nothing."""
    load_q, q_line = q_line_writer(isa, kv_dtype), q_line_bytes(kv_dtype, isa.has_bf16)
    acc_line = RowShape.of(kv_dtype).acc_bytes

    @helper
    def start_vectors(arguments, kv_head, first_row, count, padded, lines, q, acc, running):
        queries_per_kv, head_dim = parameter(arguments, PREFILL.queries_per_kv), parameter(arguments, PREFILL.head_dim)
        for vector in range(padded):
            real = least(count - 1, vector)
            head, row = kv_head * queries_per_kv + real % queries_per_kv, first_row + real // queries_per_kv
            source = parameter(arguments, PREFILL.q) + row * parameter(arguments, PREFILL.q_row)
            source += head * parameter(arguments, PREFILL.q_head)
            load_q(source, head_dim, lines, q + vector * q_line * lines)
            store_scalar(MINUS_INFINITY, running + 8 * vector)
            store_scalar(ZERO, running + 8 * vector + 4)
        for i in range(0, padded * acc_line * lines, 64):
            store_f32(splat(ZERO), acc + i)

    return start_vectors


def vector_writer(kv_dtype: str):
    """Function: an item's out and lse."""
    write, acc_line = head_writer(kv_dtype), RowShape.of(kv_dtype).acc_bytes

    @helper
    def write_vectors(arguments, kv_head, first_row, count, lines, acc, running):
        queries_per_kv, head_dim = parameter(arguments, PREFILL.queries_per_kv), parameter(arguments, PREFILL.head_dim)
        for vector in range(count):
            head, row = kv_head * queries_per_kv + vector % queries_per_kv, first_row + vector // queries_per_kv
            to = parameter(arguments, PREFILL.out) + row * parameter(arguments, PREFILL.out_row)
            lse = parameter(arguments, PREFILL.lse) + row * parameter(arguments, PREFILL.lse_row) + 4 * head
            weight = write_lse(running + 8 * vector, lse)
            write(acc + vector * acc_line * lines, weight, to + head * parameter(arguments, PREFILL.out_head), head_dim)

    return write_vectors


@helper
def key_range(arguments, first_row, rows):
    """The keys that any of these rows may see."""
    q_start, window = parameter(arguments, PREFILL.q_start), parameter(arguments, PREFILL.window)
    start, stop = (
        parameter(arguments, PREFILL.start),
        least(parameter(arguments, PREFILL.stop), q_start + first_row + rows),
    )
    return most(start, q_start + first_row - window + 1) if window else start, stop


def attend_block(isa: Isa, kv_dtype: str, capped: bool):
    """Function: one item: load its queries, pass over its keys, write its rows. False: a page is invalid."""
    shape, wide = RowShape.of(kv_dtype), wide_dtype(kv_dtype)
    transpose_tile, start_vectors, write_vectors = tile_transposer(wide), vector_starter(isa, wide), vector_writer(wide)
    rows_of, attend = rows_of_tile(kv_dtype), attend_tile(isa, wide, capped)
    row_items, has_codes, q_line = shape.line_items, shape.has_codes, q_line_bytes(wide, isa.has_bf16)
    line_items, acc_line = RowShape.of(wide).line_items, RowShape.of(wide).acc_bytes

    @helper
    def block(arguments, kv_head, first_row, rows, work):
        queries_per_kv, head_dim = parameter(arguments, PREFILL.queries_per_kv), parameter(arguments, PREFILL.head_dim)
        lines = ((head_dim + row_items - 1) // row_items * row_items + line_items - 1) // line_items
        row_size, count = LINE_BYTES * lines, rows * queries_per_kv
        padded = (count + PREFILL_VALUES - 1) // PREFILL_VALUES * PREFILL_VALUES
        widened = work + row_size * KEY_TILE
        scores = widened + (2 * row_size * KEY_TILE if has_codes else 0)
        q = scores + PREFILL_VALUES * (HEAD_SCORES + HEAD_SCALARS)
        acc = q + padded * q_line * lines
        running = acc + padded * acc_line * lines
        start_vectors(arguments, kv_head, first_row, count, padded, lines, q, acc, running)
        position, stop = key_range(arguments, first_row, rows)
        table = parameter(arguments, PREFILL.table) + kv_head * parameter(arguments, PREFILL.table_head)
        items = line_items * lines if has_codes else head_dim
        while position < stop:
            page = page_at(arguments, table, position)
            if page < 0:
                return False
            k_page, v_page, offset, keys = tile_at(arguments, page, position, stop)
            k_rows, k_row, v_rows, v_row = rows_of(arguments, k_page, v_page, offset, keys, lines, widened)
            transpose_tile(k_rows, k_row, keys, items, lines, work)
            attend(
                arguments,
                first_row,
                queries_per_kv,
                count,
                position,
                keys,
                lines,
                v_rows,
                v_row,
                work,
                scores,
                q,
                acc,
                running,
            )
            position += keys
        write_vectors(arguments, kv_head, first_row, count, lines, acc, running)
        return True

    return block


def prefill(isa: Isa, kv_dtype: str, capped: bool = False):
    """Kernel of prefill_attention; parameters in parameters.py. capped: whether scores are."""
    attend = attend_block(isa, kv_dtype, capped)

    def kernel(arguments, thread):
        q_len, kv_heads = parameter(arguments, PREFILL.rows), parameter(arguments, PREFILL.kv_heads)
        work = parameter(arguments, PREFILL.scratch) + thread * parameter(arguments, PREFILL.thread_bytes)
        block_rows = most(1, PREFILL_VECTORS // parameter(arguments, PREFILL.queries_per_kv))
        blocks = (q_len + block_rows - 1) // block_rows
        limit = parameter(arguments, PREFILL.page_size) * parameter(arguments, PREFILL.max_pages)
        if parameter(arguments, PREFILL.start) < 0 or parameter(arguments, PREFILL.stop) > limit:
            fail(arguments, 1)
            return
        chunk = take(arguments, 0)
        while chunk < blocks * kv_heads:
            block, kv_head = blocks - 1 - chunk // kv_heads, chunk % kv_heads
            first_row = block * block_rows
            if not attend(arguments, kv_head, first_row, least(block_rows, q_len - first_row), work):
                fail(arguments, 2)
            chunk = take(arguments, 0)

    return kernel
