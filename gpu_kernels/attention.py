"""Decode and prefill attention over pages, both returning (out, lse) of exactly the keys that they were given.

    s_j = scale * q . k_j over the visible j;  lse = log sum_j exp(s_j);  out = sum_j exp(s_j - lse) v_j

With a soft cap, cap * tanh(s_j / cap) stands in the place of s_j.

Both kernels walk blocks of positions, which begin at multiples of the block's length and so lie in one page where pages
are no shorter. An online softmax in base 2 (scale carries log2(e)) takes them in; lse becomes the natural log at the
end. Weights meet bf16 values as bf16, rounded as the reference says. A query that sees no key gives (0, -inf). The
query heads of one KV head are rows of one matrix product, so K and V are read once for all of them.

Decode splits the range of every sequence over programs (FlashDecoding). The range and the page table are read on the
device and the launch depends on capacities alone, so a captured graph stays valid while the sequence grows; programs
that a short range does not need leave at once. The last program of a KV head to arrive merges the splits, in their
order, so the answer does not depend on who that is.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cpu_kernels.contract import ChunkKeys, Pages, Partial, RowKeys
from gpu_kernels.attention_merge import merge_splits
from gpu_kernels.kv_rows import check_pages, load_block, load_page_ids
from gpu_kernels.launching import Kernel, Shape

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _capped(scores, scale, cap, CAPPED: tl.constexpr):
    """cap * tanh(scale * scores / cap) where scores are capped; near 0 by its series, 1 - exp would lose digits."""
    if CAPPED:
        x = scores * (scale / cap)
        power = tl.exp(-2.0 * tl.abs(x))
        far = (1.0 - power) / (1.0 + power)
        square = x * x
        near = (((62.0 / 2835.0 * square - 17.0 / 315.0) * square + 2.0 / 15.0) * square - 1.0 / 3.0) * square + 1.0
        scores = cap * tl.where(tl.abs(x) < 0.25, near * x, tl.where(x < 0.0, -far, far))
    return scores


@triton.jit
def _online_softmax(scores, scale, values, maximum, total, acc):
    """Take one block into the running (maximum, total, acc); scores [M, N], -inf where masked; times scale in base 2.

    maximum is whole, so it scales weights by powers of two, and they round to bf16 alike in every block and split."""
    new_maximum = tl.maximum(maximum, tl.ceil(tl.max(scores, axis=1) * scale))
    safe_maximum = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)  # nothing visible yet: avoid inf - inf
    correction = tl.exp2(maximum - safe_maximum)
    weights = tl.exp2(scores * scale - safe_maximum[:, None])
    total = total * correction + tl.sum(weights, axis=1)
    acc = tl.dot(weights.to(values.dtype), values, acc * correction[:, None], input_precision="ieee")
    return new_maximum, total, acc


@triton.jit
def _normalised(maximum, total, acc):
    """(out, natural-log lse) of the running softmax."""
    nonzero = tl.where(total == 0.0, 1.0, total)
    lse = tl.where(total == 0.0, float("-inf"), (maximum + tl.log2(nonzero)) * LN_2)
    return acc / nonzero[:, None], lse


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
    first_block = first // BLOCK_N
    num_blocks = tl.cdiv(stop, BLOCK_N) - first_block
    split_blocks = tl.maximum(tl.cdiv(num_blocks, tl.num_programs(1)), min_blocks)
    num_splits = tl.maximum(tl.cdiv(num_blocks, split_blocks), 1)
    if split >= num_splits:
        return

    rows = tl.arange(0, QUERIES_PAD)
    dims = tl.arange(0, HEAD_PAD)
    heads = kv_head * QUERIES_PER_KV + rows
    live = (rows < QUERIES_PER_KV)[:, None] & (dims < HEAD_DIM)[None, :]
    query = tl.load(q + batch * q_row_stride + heads[:, None] * q_head_stride + dims[None, :], mask=live, other=0.0)
    query = query.to(k_pages.dtype.element_ty if FORMAT == "plain" else tl.bfloat16)
    table = page_table + batch * table_row_stride + kv_head * table_head_stride
    maximum = tl.full([QUERIES_PAD], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES_PAD], tl.float32)
    acc = tl.zeros([QUERIES_PAD, HEAD_PAD], tl.float32)
    low = first_block + split * split_blocks
    page_ids = load_page_ids(table, low * BLOCK_N, first, stop, PAGE_SIZE, BLOCK_N)
    for block in range(low, tl.minimum(low + split_blocks, first_block + num_blocks)):
        positions = block * BLOCK_N + tl.arange(0, BLOCK_N)
        stored = (positions >= first) & (positions < stop)
        next_ids = load_page_ids(table, (block + 1) * BLOCK_N, first, stop, PAGE_SIZE, BLOCK_N)
        keys, values = load_block(
            k_pages,
            v_pages,
            page_ids,
            block * BLOCK_N,
            stored,
            dims,
            page_stride,
            row_stride,
            HEAD_DIM,
            HEAD_PAD,
            PAGE_SIZE,
            BLOCK_N,
            FORMAT,
        )
        scores = tl.dot(query, tl.trans(keys), input_precision="ieee")
        scores = _capped(scores, scale, cap, CAPPED)
        scores = tl.where(stored[None, :], scores, float("-inf"))
        maximum, total, acc = _online_softmax(scores, LOG2_E if CAPPED else scale * LOG2_E, values, maximum, total, acc)
        page_ids = next_ids

    result, result_lse = _normalised(maximum, total, acc)
    out += batch * out_row_stride + kv_head * QUERIES_PER_KV * out_head_stride
    lse += batch * lse_row_stride + kv_head * QUERIES_PER_KV * lse_head_stride
    if num_splits == 1:
        tl.store(out + rows[:, None] * out_head_stride + dims[None, :], result, mask=live)
        tl.store(lse + rows * lse_head_stride, result_lse, mask=rows < QUERIES_PER_KV)
    elif SPLITS:
        first_split = pair.to(tl.int64) * tl.num_programs(1)
        part = (first_split + split) * QUERIES_PER_KV + rows
        tl.store(partial + part[:, None] * HEAD_DIM + dims[None, :], result, mask=live)
        tl.store(partial_lse + part, result_lse, mask=rows < QUERIES_PER_KV)
        tl.debug_barrier()  # every thread has stored its part before one of them says so
        if tl.atomic_add(arrivals + pair, 1, sem="acq_rel", scope="gpu") == num_splits - 1:
            merge_splits(
                partial,
                partial_lse,
                first_split,
                num_splits,
                out,
                lse,
                out_head_stride,
                lse_head_stride,
                QUERIES_PER_KV,
                HEAD_DIM,
                HEAD_PAD,
                MERGE_STEP,
            )
            tl.store(arrivals + pair, 0)


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
    query = tl.load(q + (places * q_row_stride + heads * q_head_stride)[:, None] + dims[None, :], mask=live, other=0.0)
    query = query.to(k_pages.dtype.element_ty if FORMAT == "plain" else tl.bfloat16)
    table = page_table + kv_head.to(tl.int64) * table_head_stride
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, HEAD_PAD], tl.float32)

    # Of the keys [low, high) that some row of the tile sees, all rows see [whole_low, whole_high).
    oldest = q_start + first_row // QUERIES_PER_KV
    newest = q_start + tl.minimum((first_row + BLOCK_M - 1) // QUERIES_PER_KV, q_len - 1)
    low = tl.maximum(kv_start, oldest - window + 1)
    high = tl.minimum(kv_stop, newest + 1)
    whole_low = tl.maximum(kv_start, newest - window + 1)
    whole_high = tl.minimum(kv_stop, oldest + 1)
    first_block = low // BLOCK_N
    stop_block = tl.cdiv(high, BLOCK_N)
    first_whole = tl.minimum(tl.cdiv(whole_low, BLOCK_N), stop_block)
    stop_whole = tl.maximum(whole_high // BLOCK_N, first_whole)
    page_ids = load_page_ids(table, first_whole * BLOCK_N, low, high, PAGE_SIZE, BLOCK_N)
    for block in range(first_whole, stop_whole):
        stored = tl.full([BLOCK_N], True, tl.int1)
        next_ids = load_page_ids(table, (block + 1) * BLOCK_N, low, high, PAGE_SIZE, BLOCK_N)
        keys, values = load_block(
            k_pages,
            v_pages,
            page_ids,
            block * BLOCK_N,
            stored,
            dims,
            page_stride,
            row_stride,
            HEAD_DIM,
            HEAD_PAD,
            PAGE_SIZE,
            BLOCK_N,
            FORMAT,
        )
        scores = tl.dot(query, tl.trans(keys), input_precision="ieee")
        scores = _capped(scores, scale, cap, CAPPED)
        maximum, total, acc = _online_softmax(scores, LOG2_E if CAPPED else scale * LOG2_E, values, maximum, total, acc)
        page_ids = next_ids

    newest_seen = q_start + rows // QUERIES_PER_KV
    first_seen = tl.maximum(newest_seen - window + 1, low)
    stop_seen = tl.minimum(newest_seen + 1, high)
    num_whole = stop_whole - first_whole
    block = first_block + tl.where(first_block < first_whole, 0, num_whole)
    page_ids = load_page_ids(table, block * BLOCK_N, low, high, PAGE_SIZE, BLOCK_N)
    for edge in range(first_block, stop_block - num_whole):
        block = edge + tl.where(edge < first_whole, 0, num_whole)
        next_block = edge + 1 + tl.where(edge + 1 < first_whole, 0, num_whole)
        positions = block * BLOCK_N + tl.arange(0, BLOCK_N)
        stored = (positions >= low) & (positions < high)
        next_ids = load_page_ids(table, next_block * BLOCK_N, low, high, PAGE_SIZE, BLOCK_N)
        keys, values = load_block(
            k_pages,
            v_pages,
            page_ids,
            block * BLOCK_N,
            stored,
            dims,
            page_stride,
            row_stride,
            HEAD_DIM,
            HEAD_PAD,
            PAGE_SIZE,
            BLOCK_N,
            FORMAT,
        )
        scores = tl.dot(query, tl.trans(keys), input_precision="ieee")
        scores = _capped(scores, scale, cap, CAPPED)
        visible = (positions[None, :] >= first_seen[:, None]) & (positions[None, :] < stop_seen[:, None])
        scores = tl.where(visible, scores, float("-inf"))
        maximum, total, acc = _online_softmax(scores, LOG2_E if CAPPED else scale * LOG2_E, values, maximum, total, acc)
        page_ids = next_ids

    result, result_lse = _normalised(maximum, total, acc)
    tl.store(out + (places * out_row_stride + heads * out_head_stride)[:, None] + dims[None, :], result, mask=live)
    tl.store(lse + places * lse_row_stride + heads * lse_head_stride, result_lse, mask=places < q_len)


class Tile(NamedTuple):
    """Launch shape of an attention kernel: rows and keys a step, warps, pipeline stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# By dtype of the pages (uint8 as int8) and padded head_dim. Chosen so that the K and V tiles of every stage fit the 99
# KiB of shared memory that compute capability 8.6, 8.9 and 12.0 give a program, and so that nothing spills
# (tests/gpu_kernels/test_aot.py). float32 products run on the CUDA cores and want small tiles; codes are unpacked in
# registers.
DECODE_TILES = {
    torch.bfloat16: {
        16: Tile(0, 64, 4, 3),
        32: Tile(0, 64, 4, 3),
        64: Tile(0, 64, 4, 4),
        128: Tile(0, 64, 4, 3),
        256: Tile(0, 32, 8, 3),
    },
    torch.int8: {
        16: Tile(0, 64, 4, 3),
        32: Tile(0, 64, 4, 3),
        64: Tile(0, 64, 4, 4),
        128: Tile(0, 64, 4, 4),
        256: Tile(0, 32, 8, 3),
    },
    torch.float32: {
        16: Tile(0, 32, 4, 2),
        32: Tile(0, 32, 4, 2),
        64: Tile(0, 32, 4, 2),
        128: Tile(0, 16, 4, 2),
        256: Tile(0, 16, 8, 1),
    },
}
PREFILL_TILES = {
    torch.bfloat16: {
        16: Tile(64, 64, 4, 3),
        32: Tile(64, 64, 4, 3),
        64: Tile(64, 64, 4, 3),
        128: Tile(128, 32, 8, 3),
        256: Tile(64, 32, 8, 2),
    },
    torch.int8: {
        16: Tile(64, 64, 4, 3),
        32: Tile(64, 64, 4, 3),
        64: Tile(64, 64, 4, 3),
        128: Tile(64, 64, 4, 2),
        256: Tile(64, 32, 8, 2),
    },
    torch.float32: {
        16: Tile(32, 32, 4, 2),
        32: Tile(32, 32, 4, 2),
        64: Tile(32, 32, 8, 2),
        128: Tile(32, 16, 8, 1),
        256: Tile(16, 16, 8, 1),
    },
}
# Compute capability 9.0 multiplies out of shared memory, of which it has more, so larger tiles fit its registers.
HOPPER_PREFILL_TILES = PREFILL_TILES | {
    torch.bfloat16: PREFILL_TILES[torch.bfloat16] | {64: Tile(128, 64, 8, 3), 128: Tile(128, 64, 8, 3)},
    torch.int8: PREFILL_TILES[torch.int8] | {64: Tile(128, 64, 8, 3), 128: Tile(128, 64, 8, 3)},
}
TARGET_PROGRAMS = 256  # about two for each of the 132 multiprocessors of the largest target; more only adds merging
MAX_SPLITS = 64
MIN_BLOCKS_PER_SPLIT = 1
MERGE_ITEMS = 64  # of the partials that a thread holds at once while it merges: loads in flight, and registers
NO_WINDOW = 2**30


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
    form = _check(pages, head_dim, num_heads, num_kv_heads, scale)
    if batch == 0:
        return
    queries_per_kv, pairs = num_heads // num_kv_heads, batch * num_kv_heads
    num_splits = _num_splits(table, k, head_dim) if pairs <= arrivals.numel() else 1
    tile = _tile(DECODE_TILES, k, head_dim)
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
    head_pad = _head_pad(head_dim)
    merge_step = tile.num_warps * 32 * merge_items // (triton.next_power_of_2(queries_per_kv) * head_pad)
    return Shape(
        QUERIES_PER_KV=queries_per_kv,
        QUERIES_PAD=max(16, triton.next_power_of_2(queries_per_kv)),
        HEAD_DIM=head_dim,
        HEAD_PAD=head_pad,
        PAGE_SIZE=page_size,
        BLOCK_N=tile.block_n,
        MERGE_STEP=max(1, min(merge_step, triton.next_power_of_2(MAX_SPLITS))),
        FORMAT=form,
        CAPPED=switches[0],
        SPLITS=switches[1],
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def prefill_attention(q: Tensor, pages: Pages, keys: ChunkKeys, scale: float, into: Partial, cap: float = 0.0) -> None:
    """Strides of keys and values are equal."""
    (k, v), (table, start, stop, q_start, window), (out, lse) = pages, keys, into
    q_len, num_heads, head_dim = q.shape
    num_kv_heads = table.shape[0]
    form = _check(pages, head_dim, num_heads, num_kv_heads, scale)
    if q_len == 0:
        return
    tiles = HOPPER_PREFILL_TILES if _is_hopper(q.device) else PREFILL_TILES
    tile, queries_per_kv = _tile(tiles, k, head_dim), num_heads // num_kv_heads
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
        HEAD_PAD=_head_pad(head_dim),
        PAGE_SIZE=page_size,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        FORMAT=form,
        CAPPED=capped,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def _num_splits(page_table: Tensor, pages: Tensor, head_dim: int) -> int:
    """The most splits of a sequence; what a device-side range needs of them is found on the device."""
    pairs, capacity = page_table.shape[0] * page_table.shape[1], page_table.shape[2] * pages.shape[1]
    block_n = _tile(DECODE_TILES, pages, head_dim).block_n
    return max(1, min(TARGET_PROGRAMS // max(pairs, 1), MAX_SPLITS, capacity // (block_n * MIN_BLOCKS_PER_SPLIT)))


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    if device.type == "meta" and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())  # for which a launch without memory compiles
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


@functools.cache
def _head_pad(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))


def _tile(tiles: dict[torch.dtype, dict[int, Tile]], pages: Tensor, head_dim: int) -> Tile:
    by_head = tiles[torch.int8 if pages.dtype == torch.uint8 else pages.dtype]
    if _head_pad(head_dim) not in by_head:
        raise ValueError(f"head_dim {head_dim} has no attention kernel: the largest is {max(by_head)}")
    return by_head[_head_pad(head_dim)]


def _check(pages: Pages, head_dim: int, num_heads: int, num_kv_heads: int, scale: float) -> str:
    assert num_heads % num_kv_heads == 0, (num_heads, num_kv_heads)
    assert scale > 0, f"the largest score is looked for before it is multiplied by {scale}"
    return check_pages(pages, head_dim)
