"""Prefill attention over pages: (out, lse) of the queries of a chunk over exactly the keys that it was given.

A program takes a tile of rows, which are the query heads of one KV head at successive places, so K and V are read once
for all of them. Blocks that every row of the tile sees need no mask; those that the diagonal, the window or the end of
the keys cuts are walked after them.
"""

from __future__ import annotations

import functools

import triton
import triton.language as tl
from torch import Tensor

from cpu_kernels.contract import ChunkKeys, Pages, Partial
from gpu_kernels.attention.keys import Keys, check, load_block, load_page_ids, load_queries
from gpu_kernels.attention.softmax import Scores, no_keys, normalised, scores_of, take_in
from gpu_kernels.attention.tiles import HOPPER_PREFILL_TILES, PREFILL_TILES, Tile, head_pad, is_hopper, tile_of
from gpu_kernels.kv_rows import PageRows
from gpu_kernels.launching import Kernel, Shape

NO_WINDOW = 2**30


@triton.jit
def _take_whole_blocks(query, keys, rows, form, whole, between, maximum, total, acc, BLOCK_N: tl.constexpr):
    """The blocks `whole`, (first, stop), all of whose keys all rows of the tile see."""
    page_ids = load_page_ids(keys.table, rows, whole[0] * BLOCK_N, between, BLOCK_N)
    for block in range(whole[0], whole[1]):
        stored = tl.full([BLOCK_N], True, tl.int1)
        next_ids = load_page_ids(keys.table, rows, (block + 1) * BLOCK_N, between, BLOCK_N)
        k, v = load_block(keys, rows, page_ids, block * BLOCK_N, stored, BLOCK_N)
        maximum, total, acc = take_in(scores_of(query, k, form), v, form, maximum, total, acc)
        page_ids = next_ids
    return maximum, total, acc


@triton.jit
def _take_edge_blocks(
    query, keys, rows, form, blocks, whole, between, seen, maximum, total, acc, BLOCK_N: tl.constexpr
):
    """`blocks` but those of `whole`; a row of the tile sees the positions from seen[0] to before seen[1]."""
    first_block, first_whole = blocks[0], whole[0]
    num_whole = whole[1] - first_whole
    block = first_block + tl.where(first_block < first_whole, 0, num_whole)
    page_ids = load_page_ids(keys.table, rows, block * BLOCK_N, between, BLOCK_N)
    for edge in range(first_block, blocks[1] - num_whole):
        block = edge + tl.where(edge < first_whole, 0, num_whole)
        next_block = edge + 1 + tl.where(edge + 1 < first_whole, 0, num_whole)
        positions = block * BLOCK_N + tl.arange(0, BLOCK_N)
        stored = (positions >= between[0]) & (positions < between[1])
        next_ids = load_page_ids(keys.table, rows, next_block * BLOCK_N, between, BLOCK_N)
        k, v = load_block(keys, rows, page_ids, block * BLOCK_N, stored, BLOCK_N)
        scores = scores_of(query, k, form)
        visible = (positions[None, :] >= seen[0][:, None]) & (positions[None, :] < seen[1][:, None])
        scores = tl.where(visible, scores, float("-inf"))
        maximum, total, acc = take_in(scores, v, form, maximum, total, acc)
        page_ids = next_ids
    return maximum, total, acc


@triton.jit
def _attend(
    query,
    keys,
    rows,
    form,
    given,
    q_start,
    window,
    first_row,
    q_len,
    QUERIES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """(out, lse) of a tile of ROWS rows from first_row on, of a chunk of q_len places.

    Keys are those at positions from given[0] to before given[1], up to and with a row's own."""
    maximum, total, acc = no_keys(ROWS, rows.HEAD_PAD)
    # Of the keys [low, high) that some row of the tile sees, all rows see [whole_low, whole_high).
    oldest = q_start + first_row // QUERIES
    newest = q_start + tl.minimum((first_row + ROWS - 1) // QUERIES, q_len - 1)
    low = tl.maximum(given[0], oldest - window + 1)
    high = tl.minimum(given[1], newest + 1)
    whole_low = tl.maximum(given[0], newest - window + 1)
    whole_high = tl.minimum(given[1], oldest + 1)
    first_block = low // BLOCK_N
    stop_block = tl.cdiv(high, BLOCK_N)
    first_whole = tl.minimum(tl.cdiv(whole_low, BLOCK_N), stop_block)
    stop_whole = tl.maximum(whole_high // BLOCK_N, first_whole)
    between, whole, blocks = (low, high), (first_whole, stop_whole), (first_block, stop_block)
    maximum, total, acc = _take_whole_blocks(query, keys, rows, form, whole, between, maximum, total, acc, BLOCK_N)

    newest_seen = q_start + (first_row + tl.arange(0, ROWS)) // QUERIES
    first_seen = tl.maximum(newest_seen - window + 1, low)
    stop_seen = tl.minimum(newest_seen + 1, high)
    seen = (first_seen, stop_seen)
    maximum, total, acc = _take_edge_blocks(
        query, keys, rows, form, blocks, whole, between, seen, maximum, total, acc, BLOCK_N
    )
    return normalised(maximum, total, acc)


@Kernel
@triton.jit(do_not_specialize=["q_len", "kv_start", "kv_stop", "q_start", "window"])
def _prefill_attention_kernel(
    q,
    k_pages,
    v_pages,
    page_table,
    out,
    lse,
    scale,
    cap,
    q_len,
    kv_start,
    kv_stop,
    q_start,
    window,
    q_row_stride,
    q_head_stride,
    page_stride,
    row_stride,
    table_head_stride,
    out_row_stride,
    out_head_stride,
    lse_row_stride,
    lse_head_stride,
    QUERIES_PER_KV: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FORMAT: tl.constexpr,
    CAPPED: tl.constexpr,
):
    """grid: (num_kv_heads, cdiv(q_len * QUERIES_PER_KV, BLOCK_M)). q, out: [q_len, num_heads, head_dim]; lse: [q_len,
    num_heads]; k_pages, v_pages: [num_pages, page_size, head_dim]; page_table: [num_kv_heads, max_pages]."""
    kv_head = tl.program_id(0)
    first_row = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M  # the longest rows start first
    rows = first_row + tl.arange(0, BLOCK_M)
    places = (rows // QUERIES_PER_KV).to(tl.int64)  # in the chunk; a row is one query head at one of them
    heads = kv_head * QUERIES_PER_KV + rows % QUERIES_PER_KV
    dims = tl.arange(0, HEAD_PAD)
    live = (places < q_len)[:, None] & (dims < HEAD_DIM)[None, :]
    of_query = q + (places * q_row_stride + heads * q_head_stride)[:, None] + dims[None, :]
    query = load_queries(of_query, live, k_pages, FORMAT)
    keys = Keys(k_pages, v_pages, page_table + kv_head.to(tl.int64) * table_head_stride)
    result, result_lse = _attend(
        query,
        keys,
        PageRows(page_stride, row_stride, HEAD_DIM, HEAD_PAD, PAGE_SIZE, FORMAT),
        Scores(scale, cap, CAPPED),
        (kv_start, kv_stop),
        q_start,
        window,
        first_row,
        q_len,
        QUERIES_PER_KV,
        BLOCK_M,
        BLOCK_N,
    )
    tl.store(out + (places * out_row_stride + heads * out_head_stride)[:, None] + dims[None, :], result, mask=live)
    tl.store(lse + places * lse_row_stride + heads * lse_head_stride, result_lse, mask=places < q_len)


def prefill_attention(q: Tensor, pages: Pages, keys: ChunkKeys, scale: float, into: Partial, cap: float = 0.0) -> None:
    """Strides of keys and values are equal."""
    (k, v), (table, start, stop, q_start, window), (out, lse) = pages, keys, into
    q_len, num_heads, head_dim = q.shape
    num_kv_heads = table.shape[0]
    form = check(pages, q, num_kv_heads, scale)
    if q_len == 0:
        return
    tiles = HOPPER_PREFILL_TILES if is_hopper(q.device) else PREFILL_TILES
    tile, queries_per_kv = tile_of(tiles, k, head_dim), num_heads // num_kv_heads
    _prefill_attention_kernel.launch(
        (num_kv_heads, -(-(q_len * queries_per_kv) // tile.block_m), 1),
        (q, k, v, table, out, lse),
        (scale, cap, q_len, start, stop, q_start, window or NO_WINDOW),
        (*q.stride()[:2], *k.stride()[:2], table.stride(0), *out.stride()[:2], *lse.stride()),
        _prefill_shape(tile, queries_per_kv, head_dim, k.shape[1], form, cap > 0),
    )


@functools.cache
def _prefill_shape(tile: Tile, queries_per_kv: int, head_dim: int, page_size: int, form: str, capped: bool) -> Shape:
    return Shape(
        QUERIES_PER_KV=queries_per_kv,
        HEAD_DIM=head_dim,
        HEAD_PAD=head_pad(head_dim),
        PAGE_SIZE=page_size,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        FORMAT=form,
        CAPPED=capped,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
