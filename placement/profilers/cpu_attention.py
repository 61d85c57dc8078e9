"""Rates of the CPU lane's attention over caches in DRAM: one row and many, by cache dtype, head sharing and head
size."""

import statistics
from collections.abc import Callable, Sequence

import torch

from cpu_kernels import CpuKernels
from cpu_kernels.contract import ChunkKeys, Pages, Partial, RowKeys
from cpu_kernels.formats.pages import row_items
from placement.machine.rates import KV_BITS, AttentionRate, beside_memory
from placement.profilers.timing import (
    CALLS,
    FLOAT32,
    MOST_PARTS,
    Progress,
    beyond_caches,
    in_rotation,
    parts_for,
    recorded_seconds,
    turns,
)

ATTENTION_BYTES = 96 << 20  # of K and V: still three caches of a few cores, and there are many shapes
CACHED_BYTES = 4 << 20
KV_HEADS = 8
PREFILL_ROWS = 256
# Query heads per KV head and their size that decode is measured with in every profile; the nearest stands for others,
# and what a model needs is measured for it when it is asked for. Compiling is what takes time: seven kernels of decode
# were half of it. So there is one a dtype, of which several heads share K and V, and bf16 stands for fp32.
SHAPES = {
    "bf16": ((4, 64), (4, 128), (8, 128)),
    "q8": ((4, 64), (4, 128), (8, 128)),
    "q4": ((4, 128), (8, 128)),
}
PREFILL_LIKE = {"q4": "q8"}  # multiplied alike once unpacked, within a tenth on three kinds of CPU; a kernel less
PREFILL_HEADS = 4  # of a KV head: a chunk's rows are many, so their number hardly matters
KV_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "q8": torch.int8, "q4": torch.uint8}
PAGE_TOKENS = 64


Cache = tuple[str, int, int]  # its dtype, query heads per KV head, head size


def all_shapes(caches: Sequence[Cache]) -> dict[str, tuple[tuple[int, int], ...]]:
    """By cache dtype, the heads of every profile and those of these caches."""
    found = dict(SHAPES)
    for kv_dtype, heads, head_dim in caches:
        found[kv_dtype] = tuple(dict.fromkeys((*found.get(kv_dtype, ()), (heads, head_dim))))
    return found


def attention_rates(
    ops: CpuKernels, dram: float, caches: Sequence[Cache], memory: torch.Tensor, on_progress: Progress
) -> tuple[AttentionRate, ...]:
    """Attention over a cache in DRAM, one row and many, by cache dtype, head sharing and head size: those of every
    profile and of `caches`. memory: more than caches keep."""
    rates = []
    for kv_dtype, shapes in all_shapes(caches).items():
        for head_dim in sorted({head_dim for _, head_dim in shapes}):
            on_progress(f"attention over {kv_dtype}, heads of {head_dim}")
            sizes = min(beyond_caches(ATTENTION_BYTES), memory.numel()), CACHED_BYTES
            pages, cached = (kv_pages(kv_dtype, head_dim, memory[:size]) for size in sizes)
            many = prefill_rates(ops, pages_of_many(kv_dtype, head_dim, memory[: sizes[0]]), PREFILL_HEADS, head_dim)
            for heads in (heads for heads, of_size in shapes if of_size == head_dim):
                near_s = recorded_seconds(ops, decode_call(ops, cached, heads, head_dim), CALLS // 10)
                near = 2 * cached[0].nbytes / near_s
                decode = decode_rate(ops, pages, heads, head_dim, dram, near)
                rates.append(AttentionRate(KV_BITS[kv_dtype], heads, head_dim, decode, *many, near))
    return tuple(rates)


def pages_of_many(kv_dtype: str, head_dim: int, memory: torch.Tensor) -> tuple:
    """The pages that many rows are measured over for a cache dtype."""
    return kv_pages(PREFILL_LIKE.get(kv_dtype, kv_dtype), head_dim, memory)


def kv_pages(kv_dtype: str, head_dim: int, memory: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """K and V pages in all of `memory` together and their table, int32 [KV_HEADS, pages]."""
    dtype, items = KV_DTYPES[kv_dtype], PAGE_TOKENS * row_items(kv_dtype, head_dim)
    count = memory.numel() // (2 * dtype.itemsize * items * KV_HEADS) * KV_HEADS
    both = memory[: 2 * count * items * dtype.itemsize].view(dtype).view(2, count, PAGE_TOKENS, -1)
    return *both, torch.arange(count, dtype=torch.int32, device="cpu").view(-1, KV_HEADS).T.contiguous()


def cut_pages(pages: tuple, parts: int) -> list[tuple]:
    """Pages in so many equal parts, each with a table of its own."""
    k_pages, v_pages, table = pages
    of_each = max(1, table.shape[1] // parts)
    size, own = of_each * KV_HEADS, table[:, :of_each].contiguous()
    return [(k_pages[at : at + size], v_pages[at : at + size], own) for at in range(0, len(k_pages), size)][:parts]


def decode_rate(ops: CpuKernels, pages: tuple, queries_per_kv: int, head_dim: int, dram: float, cached: float) -> float:
    """Bytes of K and V a second with one row, where a plain read reaches `dram` and the kernel `cached` from the cache;
    measured beside plain reads of them, for memory may be faster or slower meanwhile."""
    smallest = decode_call(ops, cut_pages(pages, MOST_PARTS)[0], queries_per_kv, head_dim)
    parts = cut_pages(pages, parts_for(smallest))
    read = 2 * parts[0][0].nbytes
    work = in_rotation([decode_call(ops, part, queries_per_kv, head_dim) for part in parts])
    sweeps = [lambda k=k, v=v: (ops.sweep(k), ops.sweep(v)) for k, v, _ in parts]
    found = turns(work, in_rotation(sweeps, len(parts) // 2))
    return statistics.median(beside_memory(read / worked, read / swept, dram, cached) for swept, worked in found)


def decode_call(ops: CpuKernels, pages: tuple, queries_per_kv: int, head_dim: int) -> Callable[[], None]:
    """A call of `decode_attention` with one row over every page, ready to be timed or recorded."""
    k_pages, v_pages, table = pages
    heads, tables = KV_HEADS * queries_per_kv, table[None]
    q = torch.randn(1, heads, head_dim, **FLOAT32)
    into = Partial(torch.empty(1, heads, head_dim, **FLOAT32), torch.empty(1, heads, **FLOAT32))
    bounds = (0, table.shape[1] * PAGE_TOKENS)
    start, stop = (torch.full((1,), tokens, dtype=torch.int32, device="cpu") for tokens in bounds)
    cached, keys = Pages(k_pages, v_pages), RowKeys(tables, start, stop)
    return lambda: ops.decode_attention(q, cached, keys, 0.1, into)


def prefill_rates(ops: CpuKernels, pages: tuple, queries_per_kv: int, head_dim: int) -> tuple[float, float]:
    """Operations a second over tokens before a chunk, and how many keys more than it sees the chunk itself costs a row:
    a chunk alone and with as many tokens before it."""
    heads, rows = KV_HEADS * queries_per_kv, min(PREFILL_ROWS, pages[2].shape[1] * PAGE_TOKENS // 2)
    both_call, alone_call = (prefill_call(ops, pages, queries_per_kv, head_dim, rows, n) for n in (rows, 0))
    found = turns(both_call, alone_call)  # the difference counts, so both meet the same moments
    both = statistics.median(taken for _, taken in found)
    alone = both * statistics.median(first / taken for first, taken in found)
    a_key = 4 * head_dim * heads * rows
    rate = a_key * rows / max(both - alone, 0.2 * both)
    return rate, max(0.0, alone * rate / a_key - (rows + 1) / 2)


def prefill_call(
    ops: CpuKernels, pages: tuple, queries_per_kv: int, head_dim: int, rows: int, before: int
) -> Callable[[], None]:
    """A call of `prefill_attention` with a chunk of `rows` after `before` tokens, ready to be timed."""
    k_pages, v_pages, table = pages
    heads, keys = KV_HEADS * queries_per_kv, ChunkKeys(table, 0, before + rows, before)
    q = torch.randn(rows, heads, head_dim, **FLOAT32)
    into = Partial(torch.empty(rows, heads, head_dim, **FLOAT32), torch.empty(rows, heads, **FLOAT32))
    cached = Pages(k_pages, v_pages)
    return lambda: ops.prefill_attention(q, cached, keys, 0.1, into)
