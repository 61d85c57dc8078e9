"""Decode and prefill attention over pages, both returning (out, lse) of exactly the keys that they were given.

    s_j = scale * q . k_j over the visible j;  lse = log sum_j exp(s_j);  out = sum_j exp(s_j - lse) v_j

Both kernels walk blocks of positions with an online softmax in base 2 (scale carries log2(e)) and convert lse to the
natural log at the end. Weights meet bf16 values as bf16, rounded as the reference says. A query that sees no key gives (0, -inf).

Decode splits the range of every sequence over programs (FlashDecoding) and merges them in a second launch. The range
and the page table are read on the device and the launch depends on capacities alone, so a captured graph stays valid
while the sequence grows. The query heads of one KV head are the rows of one matrix product, so K and V are read once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpu_kernels.attention_merge import merge_splits
from gpu_kernels.kv_rows import check_pages, load_rows

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _online_softmax(scores, values, maximum, total, acc):
    """Take one block into the running (maximum, total, acc); scores [M, N] in base 2, -inf where masked.

    maximum is whole, so it scales weights by powers of two, and they round to bf16 alike in every block and split."""
    new_maximum = tl.maximum(maximum, tl.ceil(tl.max(scores, axis=1)))
    safe_maximum = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)  # nothing visible yet: avoid inf - inf
    correction = tl.exp2(maximum - safe_maximum)
    weights = tl.exp2(scores - safe_maximum[:, None])
    total = total * correction + tl.sum(weights, axis=1)
    acc = tl.dot(weights.to(values.dtype), values, acc * correction[:, None], input_precision="ieee")
    return new_maximum, total, acc


@triton.jit
def _normalised(maximum, total, acc):
    """(out, natural-log lse) of the running softmax."""
    nonzero = tl.where(total == 0.0, 1.0, total)
    lse = tl.where(total == 0.0, float("-inf"), (maximum + tl.log2(nonzero)) * LN_2)
    return acc / nonzero[:, None], lse


@triton.jit(do_not_specialize=["num_kv_heads"])
def _decode_attention_kernel(
        q, k_pages, v_pages, page_table, kv_start, kv_stop, out, lse, scale, num_kv_heads,
        q_row_stride, q_head_stride, page_stride, row_stride, table_row_stride, table_head_stride,
        out_row_stride, out_head_stride, out_split_stride, lse_row_stride, lse_head_stride, lse_split_stride,
        GROUP_SIZE: tl.constexpr, GROUP_PAD: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr,
        PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, FORMAT: tl.constexpr):
    """grid: (batch * num_kv_heads, num_splits). q: [batch, num_heads, head_dim]; k_pages, v_pages: [num_pages,
    page_size, head_dim]; page_table: [batch, num_kv_heads, max_pages]; out: [batch, num_heads, num_splits, head_dim];
    lse: [batch, num_heads, num_splits]."""
    batch = (tl.program_id(0) // num_kv_heads).to(tl.int64)
    kv_head = tl.program_id(0) % num_kv_heads
    split = tl.program_id(1)
    first = tl.load(kv_start + batch)
    stop = tl.load(kv_stop + batch)
    split_len = tl.cdiv(tl.cdiv(stop - first, tl.num_programs(1)), BLOCK_N) * BLOCK_N
    low = first + split * split_len
    high = tl.minimum(low + split_len, stop)

    rows = tl.arange(0, GROUP_PAD)
    dims = tl.arange(0, HEAD_PAD)
    heads = kv_head * GROUP_SIZE + rows
    live = (rows < GROUP_SIZE)[:, None] & (dims < HEAD_DIM)[None, :]
    query = tl.load(q + batch * q_row_stride + heads[:, None] * q_head_stride + dims[None, :], mask=live, other=0.0)
    query = query.to(k_pages.dtype.element_ty if FORMAT == "plain" else tl.bfloat16)
    table = page_table + batch * table_row_stride + kv_head * table_head_stride
    maximum = tl.full([GROUP_PAD], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PAD], tl.float32)
    acc = tl.zeros([GROUP_PAD, HEAD_PAD], tl.float32)
    for start in range(low, high, BLOCK_N):
        positions = start + tl.arange(0, BLOCK_N)
        stored = positions < high
        keys = load_rows(k_pages, table, positions, stored, dims, page_stride, row_stride, HEAD_DIM, HEAD_PAD,
                         PAGE_SIZE, FORMAT)
        values = load_rows(v_pages, table, positions, stored, dims, page_stride, row_stride, HEAD_DIM, HEAD_PAD,
                           PAGE_SIZE, FORMAT)
        scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * (scale * LOG2_E)
        scores = tl.where(stored[None, :], scores, float("-inf"))
        maximum, total, acc = _online_softmax(scores, values, maximum, total, acc)

    result, result_lse = _normalised(maximum, total, acc)
    target = out + batch * out_row_stride + split * out_split_stride
    tl.store(target + heads[:, None] * out_head_stride + dims[None, :], result, mask=live)
    target_lse = lse + batch * lse_row_stride + split * lse_split_stride
    tl.store(target_lse + heads * lse_head_stride, result_lse, mask=rows < GROUP_SIZE)


@triton.jit(do_not_specialize=["q_len", "kv_start", "kv_stop", "q_start", "window"])
def _prefill_attention_kernel(
        q, k_pages, v_pages, page_table, out, lse, scale, q_len, kv_start, kv_stop, q_start, window,
        q_row_stride, q_head_stride, page_stride, row_stride, table_head_stride,
        out_row_stride, out_head_stride, lse_row_stride, lse_head_stride,
        GROUP_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr, PAGE_SIZE: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FORMAT: tl.constexpr):
    """grid: (cdiv(q_len, BLOCK_M), num_heads). q, out: [q_len, num_heads, head_dim]; lse: [q_len, num_heads];
    k_pages, v_pages: [num_pages, page_size, head_dim]; page_table: [num_kv_heads, max_pages]."""
    first_row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M  # the longest rows start first
    head = tl.program_id(1)
    rows = first_row + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, HEAD_PAD)
    live = (rows < q_len)[:, None] & (dims < HEAD_DIM)[None, :]
    wide_rows = rows.to(tl.int64)[:, None]
    query = tl.load(q + wide_rows * q_row_stride + head * q_head_stride + dims[None, :], mask=live, other=0.0)
    query = query.to(k_pages.dtype.element_ty if FORMAT == "plain" else tl.bfloat16)
    table = page_table + (head // GROUP_SIZE).to(tl.int64) * table_head_stride
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, HEAD_PAD], tl.float32)
    low = tl.maximum(kv_start, q_start + first_row - window + 1)
    high = tl.minimum(kv_stop, q_start + first_row + BLOCK_M)
    for start in range(low, high, BLOCK_N):
        positions = start + tl.arange(0, BLOCK_N)
        stored = positions < high
        keys = load_rows(k_pages, table, positions, stored, dims, page_stride, row_stride, HEAD_DIM, HEAD_PAD,
                         PAGE_SIZE, FORMAT)
        values = load_rows(v_pages, table, positions, stored, dims, page_stride, row_stride, HEAD_DIM, HEAD_PAD,
                           PAGE_SIZE, FORMAT)
        age = (q_start + rows)[:, None] - positions[None, :]
        scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * (scale * LOG2_E)
        scores = tl.where(stored[None, :] & (age >= 0) & (age < window), scores, float("-inf"))
        maximum, total, acc = _online_softmax(scores, values, maximum, total, acc)

    result, result_lse = _normalised(maximum, total, acc)
    tl.store(out + wide_rows * out_row_stride + head * out_head_stride + dims[None, :], result, mask=live)
    tl.store(lse + rows.to(tl.int64) * lse_row_stride + head * lse_head_stride, result_lse, mask=rows < q_len)


class Tile(NamedTuple):
    """Launch shape of an attention kernel: rows and keys a step, warps, pipeline stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# Keyed by the padded head_dim. Chosen so that the K and V tiles of every stage fit the 99 KiB of shared memory that
# compute capability 8.6, 8.9 and 12.0 give a program, and so that nothing spills (tests/gpu/test_aot.py). float32
# products run on the CUDA cores and want small tiles.
DECODE_TILES = {
    torch.bfloat16: {16: Tile(0, 64, 4, 3), 32: Tile(0, 64, 4, 3), 64: Tile(0, 64, 4, 3), 128: Tile(0, 64, 4, 3),
                     256: Tile(0, 32, 8, 2)},
    torch.float32: {16: Tile(0, 32, 4, 2), 32: Tile(0, 32, 4, 2), 64: Tile(0, 32, 4, 2), 128: Tile(0, 16, 4, 2),
                    256: Tile(0, 16, 8, 1)},
}
PREFILL_TILES = {
    torch.bfloat16: {16: Tile(64, 64, 4, 3), 32: Tile(64, 64, 4, 3), 64: Tile(64, 64, 4, 3), 128: Tile(64, 64, 4, 2),
                     256: Tile(64, 32, 8, 2)},
    torch.float32: {16: Tile(32, 32, 4, 2), 32: Tile(32, 32, 4, 2), 64: Tile(32, 32, 4, 2), 128: Tile(32, 16, 8, 1),
                    256: Tile(16, 16, 8, 1)},
}
TARGET_PROGRAMS = 264  # two for each of the 132 multiprocessors of the largest target; more only adds merging
MAX_SPLITS = 32
MIN_BLOCKS_PER_SPLIT = 4
NO_WINDOW = 2**30


def decode_attention(q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, kv_start: Tensor,
                     kv_stop: Tensor, scale: float, out: Tensor, lse: Tensor) -> None:
    """Attention of one query per sequence over the positions [kv_start, kv_stop) of its cache.

    q, out: f32 [batch, num_heads, head_dim]. k_pages, v_pages: [num_pages, page_size, row_items] as kv_pages says,
    equal strides. page_table: int32 [batch, num_kv_heads, max_pages], page id of logical page position // page_size; entries
    outside the range are never read. kv_start, kv_stop: int32 [batch]. lse: f32 [batch, num_heads], natural log.
    Allocates the partials of the splits; nothing is read on the host.
    """
    batch, num_heads, head_dim = q.shape
    num_kv_heads, max_pages = page_table.shape[1:]
    form = _check(k_pages, v_pages, head_dim, num_heads, num_kv_heads)
    if batch == 0:
        return
    tile = _tiles(DECODE_TILES, k_pages)[_head_pad(head_dim)]
    num_splits = _num_splits(batch * num_kv_heads, max_pages * k_pages.shape[1], tile.block_n)
    partial, partial_lse = out[:, :, None], lse[:, :, None]
    if num_splits > 1:
        partial = torch.empty(batch, num_heads, num_splits, head_dim, dtype=torch.float32, device=q.device)
        partial_lse = torch.empty(batch, num_heads, num_splits, dtype=torch.float32, device=q.device)
    group_size = num_heads // num_kv_heads
    _decode_attention_kernel[(batch * num_kv_heads, num_splits)](
        q, k_pages, v_pages, page_table, kv_start, kv_stop, partial, partial_lse, scale, num_kv_heads,
        *q.stride()[:2], *k_pages.stride()[:2], *page_table.stride()[:2], *partial.stride()[:3], *partial_lse.stride(),
        GROUP_SIZE=group_size, GROUP_PAD=max(16, triton.next_power_of_2(group_size)), HEAD_DIM=head_dim,
        HEAD_PAD=_head_pad(head_dim), PAGE_SIZE=k_pages.shape[1], BLOCK_N=tile.block_n, FORMAT=form,
        num_warps=tile.num_warps, num_stages=tile.num_stages)
    if num_splits > 1:
        merge_splits(partial, partial_lse, out, lse)


def prefill_attention(q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, kv_start: int, kv_stop: int,
                      q_start: int, window: int, scale: float, out: Tensor, lse: Tensor) -> None:
    """Causal attention of a chunk of one sequence; row i of `q` is position q_start + i.

    q, out: f32 [q_len, num_heads, head_dim]. k_pages, v_pages: [num_pages, page_size, row_items] as kv_pages says,
    equal strides. page_table: int32 [num_kv_heads, max_pages]. lse: f32 [q_len, num_heads], natural log. Key j is visible to
    row i iff kv_start <= j < kv_stop, j <= q_start + i and (window == 0 or j > q_start + i - window).
    """
    q_len, num_heads, head_dim = q.shape
    num_kv_heads = page_table.shape[0]
    form = _check(k_pages, v_pages, head_dim, num_heads, num_kv_heads)
    if q_len == 0:
        return
    tile = _tiles(PREFILL_TILES, k_pages)[_head_pad(head_dim)]
    _prefill_attention_kernel[(triton.cdiv(q_len, tile.block_m), num_heads)](
        q, k_pages, v_pages, page_table, out, lse, scale, q_len, kv_start, kv_stop, q_start, window or NO_WINDOW,
        *q.stride()[:2], *k_pages.stride()[:2], page_table.stride(0), *out.stride()[:2], *lse.stride(),
        GROUP_SIZE=num_heads // num_kv_heads, HEAD_DIM=head_dim, HEAD_PAD=_head_pad(head_dim),
        PAGE_SIZE=k_pages.shape[1], BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, FORMAT=form, num_warps=tile.num_warps,
        num_stages=tile.num_stages)


def _num_splits(programs: int, capacity: int, block_n: int) -> int:
    wanted = triton.cdiv(TARGET_PROGRAMS, programs)
    return max(1, min(wanted, MAX_SPLITS, capacity // (block_n * MIN_BLOCKS_PER_SPLIT)))


def _head_pad(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))


def _tiles(tiles: dict[torch.dtype, dict[int, Tile]], pages: Tensor) -> dict[int, Tile]:
    """Rows of codes are multiplied as bf16."""
    return tiles[torch.float32 if pages.dtype == torch.float32 else torch.bfloat16]


def _check(k_pages: Tensor, v_pages: Tensor, head_dim: int, num_heads: int, num_kv_heads: int) -> str:
    form, tiles = check_pages(k_pages, v_pages, head_dim), _tiles(DECODE_TILES, k_pages)
    assert num_heads % num_kv_heads == 0, (num_heads, num_kv_heads)
    if _head_pad(head_dim) not in tiles:
        raise ValueError(f"head_dim {head_dim} has no attention kernel: the largest is {max(tiles)}")
    return form
