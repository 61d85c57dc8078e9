"""Decode attention over pages: (out, lse) of exactly the keys that it was given, one query of every head a sequence.

Splits the range of every sequence over programs (FlashDecoding). The range and the page table are read on the device
and the launch depends on capacities alone, so a captured graph stays valid while the sequence grows; programs that a
short range does not need leave at once. The last program of a KV head to arrive merges the splits, in their order, so
the answer does not depend on who that is. The query heads of one KV head are rows of one matrix product, so K and V
are read once for all of them.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from cpu_kernels.contract import Pages, Partial, RowKeys
from gpu_kernels.attention.keys import Keys, check, load_block, load_page_ids, load_queries
from gpu_kernels.attention.merge_splits import Heads, merge_splits
from gpu_kernels.attention.softmax import Scores, no_keys, normalised, scores_of, take_in
from gpu_kernels.attention.tiles import DECODE_TILES, Tile, head_pad, tile_of
from gpu_kernels.kv_rows import PageRows
from gpu_kernels.launching import Kernel, Shape

TARGET_PROGRAMS = 256  # about two for each of the 132 multiprocessors of the largest target; more only adds merging
MAX_SPLITS = 64
MIN_BLOCKS_PER_SPLIT = 1
MERGE_ITEMS = 64  # of the partials that a thread holds at once while it merges: loads in flight, and registers


@triton.jit
def _attend(query, keys, rows, form, split, between, QUERIES: tl.constexpr, BLOCK_N: tl.constexpr):
    """(out, lse) of the positions from between[0] to before between[1] in one split: (first block, most blocks of a
    split, the block behind the last split's end)."""
    low, split_blocks, stop_block = split
    maximum, total, acc = no_keys(QUERIES, rows.HEAD_PAD)
    page_ids = load_page_ids(keys.table, rows, low * BLOCK_N, between, BLOCK_N)
    for block in range(low, tl.minimum(low + split_blocks, stop_block)):
        positions = block * BLOCK_N + tl.arange(0, BLOCK_N)
        stored = (positions >= between[0]) & (positions < between[1])
        next_ids = load_page_ids(keys.table, rows, (block + 1) * BLOCK_N, between, BLOCK_N)
        k, v = load_block(keys, rows, page_ids, block * BLOCK_N, stored, BLOCK_N)
        scores = scores_of(query, k, form)
        scores = tl.where(stored[None, :], scores, float("-inf"))
        maximum, total, acc = take_in(scores, v, form, maximum, total, acc)
        page_ids = next_ids
    return normalised(maximum, total, acc)


@triton.jit
def _splits_of(first, stop, min_blocks, BLOCK_N: tl.constexpr):
    """(first block, blocks, blocks of a split, splits) of the positions from `first` to before `stop`."""
    first_block = first // BLOCK_N
    num_blocks = tl.cdiv(stop, BLOCK_N) - first_block
    split_blocks = tl.maximum(tl.cdiv(num_blocks, tl.num_programs(1)), min_blocks)
    return first_block, num_blocks, split_blocks, tl.maximum(tl.cdiv(num_blocks, split_blocks), 1)


@triton.jit
def _arrive(result, parts, pair, split, num_splits, target, MERGE_STEP: tl.constexpr):
    """Store the (out, lse) of a split; the last split of KV head `pair` to arrive merges all into `target`. parts:
    (partial, partial_lse, arrivals)."""
    partial, partial_lse, arrivals = parts
    QUERIES_PER_KV: tl.constexpr = target.QUERIES_PER_KV
    rows, dims = tl.arange(0, result[0].shape[0]), tl.arange(0, target.HEAD_PAD)
    live = (rows < QUERIES_PER_KV)[:, None] & (dims < target.HEAD_DIM)[None, :]
    first_split = pair.to(tl.int64) * tl.num_programs(1)
    part = (first_split + split) * QUERIES_PER_KV + rows
    tl.store(partial + part[:, None] * target.HEAD_DIM + dims[None, :], result[0], mask=live)
    tl.store(partial_lse + part, result[1], mask=rows < QUERIES_PER_KV)
    tl.debug_barrier()  # every thread has stored its part before one of them says so
    if tl.atomic_add(arrivals + pair, 1, sem="acq_rel", scope="gpu") == num_splits - 1:
        merge_splits(partial, partial_lse, first_split, num_splits, target, MERGE_STEP)
        tl.store(arrivals + pair, 0)


@Kernel
@triton.jit(do_not_specialize=["num_kv_heads", "min_blocks"])
def _decode_attention_kernel(
    q,
    k_pages,
    v_pages,
    page_table,
    kv_start,
    kv_stop,
    out,
    lse,
    partial,
    partial_lse,
    arrivals,
    scale,
    cap,
    num_kv_heads,
    min_blocks,
    q_row_stride,
    q_head_stride,
    page_stride,
    row_stride,
    table_row_stride,
    table_head_stride,
    out_row_stride,
    out_head_stride,
    lse_row_stride,
    lse_head_stride,
    QUERIES_PER_KV: tl.constexpr,
    QUERIES_PAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MERGE_STEP: tl.constexpr,
    FORMAT: tl.constexpr,
    CAPPED: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """grid: (batch * num_kv_heads, most splits). q, out: [batch, num_heads, head_dim]; lse: [batch, num_heads];
    k_pages, v_pages: [num_pages, page_size, head_dim]; page_table: [batch, num_kv_heads, max_pages]. partial: [batch *
    num_kv_heads, most splits, QUERIES_PER_KV, head_dim], partial_lse: the same without head_dim, both contiguous;
    arrivals: int32 [batch * num_kv_heads], 0 before and after. Those three are not touched unless SPLITS: the grid has
    more than one split."""
    pair, split = tl.program_id(0), tl.program_id(1)
    batch = (pair // num_kv_heads).to(tl.int64)
    kv_head = pair % num_kv_heads
    first = tl.load(kv_start + batch)
    stop = tl.load(kv_stop + batch)
    first_block, num_blocks, split_blocks, num_splits = _splits_of(first, stop, min_blocks, BLOCK_N)
    if split >= num_splits:
        return
    rows = tl.arange(0, QUERIES_PAD)
    dims = tl.arange(0, HEAD_PAD)
    heads = kv_head * QUERIES_PER_KV + rows
    live = (rows < QUERIES_PER_KV)[:, None] & (dims < HEAD_DIM)[None, :]
    of_query = q + batch * q_row_stride + heads[:, None] * q_head_stride + dims[None, :]
    query = load_queries(of_query, live, k_pages, FORMAT)
    keys = Keys(k_pages, v_pages, page_table + batch * table_row_stride + kv_head * table_head_stride)
    result, result_lse = _attend(
        query,
        keys,
        PageRows(page_stride, row_stride, HEAD_DIM, HEAD_PAD, PAGE_SIZE, FORMAT),
        Scores(scale, cap, CAPPED),
        (first_block + split * split_blocks, split_blocks, first_block + num_blocks),
        (first, stop),
        QUERIES_PAD,
        BLOCK_N,
    )

    out += batch * out_row_stride + kv_head * QUERIES_PER_KV * out_head_stride
    lse += batch * lse_row_stride + kv_head * QUERIES_PER_KV * lse_head_stride
    if num_splits == 1:
        tl.store(out + rows[:, None] * out_head_stride + dims[None, :], result, mask=live)
        tl.store(lse + rows * lse_head_stride, result_lse, mask=rows < QUERIES_PER_KV)
    elif SPLITS:
        _arrive(
            (result, result_lse),
            (partial, partial_lse, arrivals),
            pair,
            split,
            num_splits,
            Heads(out, lse, out_head_stride, lse_head_stride, QUERIES_PER_KV, HEAD_DIM, HEAD_PAD),
            MERGE_STEP,
        )


def decode_attention(q: Tensor, pages: Pages, keys: RowKeys, scale: float, into: Partial, cap: float = 0.0) -> None:
    """Allocates the partials of the splits and clears the counters of their arrival, which costs a memset (see
    `DeviceOps`); nothing is read on the host. Strides of keys and values are equal."""
    pairs = keys.table.shape[0] * keys.table.shape[1]
    counted = _num_splits(keys.table, pages.k, q.shape[2]) > 1
    arrivals = torch.zeros(pairs if counted else 0, dtype=torch.int32, device=q.device)
    counted_decode_attention(arrivals, q, pages, keys, scale, into, cap)


def counted_decode_attention(
    arrivals: Tensor, q: Tensor, pages: Pages, keys: RowKeys, scale: float, into: Partial, cap: float = 0.0
) -> None:
    """decode_attention with counters of the caller's.

    arrivals: int32, one for each sequence and KV head, 0 before and after, which no other call uses at the same time.
    With fewer of them than that nothing is split.
    """
    (k, v), (table, start, stop), (out, lse) = pages, keys, into
    batch, num_heads, head_dim = q.shape
    num_kv_heads = table.shape[1]
    form = check(pages, q, num_kv_heads, scale)
    if batch == 0:
        return
    queries_per_kv, pairs = num_heads // num_kv_heads, batch * num_kv_heads
    num_splits = _num_splits(table, k, head_dim) if pairs <= arrivals.numel() else 1
    tile = tile_of(DECODE_TILES, k, head_dim)
    shape = _decode_shape(tile, queries_per_kv, head_dim, k.shape[1], form, (cap > 0, num_splits > 1), MERGE_ITEMS)
    parts = (out, lse, start)  # not touched where nothing is split
    if num_splits > 1:
        sizes = (pairs, num_splits, queries_per_kv)
        parts = (
            torch.empty(*sizes, head_dim, dtype=torch.float32, device=q.device),
            torch.empty(*sizes, dtype=torch.float32, device=q.device),
            arrivals,
        )
    _decode_attention_kernel.launch(
        (pairs, num_splits, 1),
        (q, k, v, table, start, stop, out, lse, *parts),
        (scale, cap, num_kv_heads, MIN_BLOCKS_PER_SPLIT),
        (*q.stride()[:2], *k.stride()[:2], *table.stride()[:2], *out.stride()[:2], *lse.stride()),
        shape,
    )


@functools.cache
def _decode_shape(
    tile: Tile,
    queries_per_kv: int,
    head_dim: int,
    page_size: int,
    form: str,
    switches: tuple[bool, bool],
    merge_items: int,
) -> Shape:
    padded = head_pad(head_dim)
    merge_step = tile.num_warps * 32 * merge_items // (triton.next_power_of_2(queries_per_kv) * padded)
    return Shape(
        QUERIES_PER_KV=queries_per_kv,
        QUERIES_PAD=max(16, triton.next_power_of_2(queries_per_kv)),
        HEAD_DIM=head_dim,
        HEAD_PAD=padded,
        PAGE_SIZE=page_size,
        BLOCK_N=tile.block_n,
        MERGE_STEP=max(1, min(merge_step, triton.next_power_of_2(MAX_SPLITS))),
        FORMAT=form,
        CAPPED=switches[0],
        SPLITS=switches[1],
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def _num_splits(page_table: Tensor, pages: Tensor, head_dim: int) -> int:
    """The most splits of a sequence; what a device-side range needs of them is found on the device."""
    pairs, capacity = page_table.shape[0] * page_table.shape[1], page_table.shape[2] * pages.shape[1]
    block_n = tile_of(DECODE_TILES, pages, head_dim).block_n
    return max(1, min(TARGET_PROGRAMS // max(pairs, 1), MAX_SPLITS, capacity // (block_n * MIN_BLOCKS_PER_SPLIT)))
