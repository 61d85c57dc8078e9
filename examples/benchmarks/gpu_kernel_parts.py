"""GPU kernels alone: bytes and operations a second beside what memory gives and what torch's own attention reaches."""

import statistics
import time
from collections.abc import Callable
from itertools import cycle
from typing import Any

import torch
from gpu_run import Run

HEADS, KV_HEADS, HEAD_DIM, PAGE_TOKENS = 32, 8, 128, 64
SHAPES = ((4096, 4096), (4096, 28_672), (14_336, 4096), (4096, 256))  # the last for --quick
BEYOND_CACHE = 160 << 20  # bytes, three times the largest GPU's last cache


def linear_kernel(run: Run, dtype: str) -> dict[str, Any]:
    """The GPU's linear by shape and rows: weight bytes and operations a second."""
    from cpu_kernels.layout import BLOCK_FEATURES, block_bytes

    device, ops = tensor_device(run)
    rows = []
    for inputs, features in SHAPES[-1:] if run.quick else SHAPES[:-1]:
        block = (features // BLOCK_FEATURES, block_bytes(dtype, inputs))
        copies = 1 if run.quick else 1 + BEYOND_CACHE // (block[0] * block[1])
        weights = [torch.full(block, 60, dtype=torch.uint8, device=device) for _ in range(copies)]
        for count in (1, 2, 4, 8, 16, 32, 64, 128, 512) if not run.quick else (1, 16):
            x, out = torch.randn(count, inputs, device=device), torch.empty(count, features, device=device)
            weight = in_turn(weights)
            seconds = device_seconds(run, lambda x=x, w=weight, out=out: ops.linear(x, w(), dtype, None, out))
            operations = 2 * count * features * inputs
            rows.append(
                {"shape": [inputs, features], "rows": count, "bytes_per_s": weights[0].numel() / seconds,
                 "ops_per_s": operations / seconds}
            )  # fmt: skip
    return {"rows": rows, "copy_bytes_per_s": copy_rate(run)}


def attention_kernels(run: Run) -> dict[str, Any]:
    """Decode in bytes a second by tokens, prefill in operations a second, each beside torch's own attention."""
    lengths, rows = ((256,), 64) if run.quick else ((1024, 4096, 16_384, 65_536), 4096)
    return {
        "decode": [decode_kernel(run, tokens) for tokens in lengths],
        "prefill": prefill_kernel(run, rows),
        "copy_bytes_per_s": copy_rate(run),
    }


def decode_kernel(run: Run, tokens: int) -> dict[str, float]:
    """One query over `tokens` tokens in pages, and torch's attention over them in one piece."""
    device, ops = tensor_device(run)
    q, out, lse = torch.randn(1, HEADS, HEAD_DIM, device=device), *_results(1, device)
    caches = [_pages(tokens, device) for _ in range(1 if run.quick else 1 + BEYOND_CACHE // (tokens * 4096))]
    start, stop = (torch.full((1,), value, dtype=torch.int32, device=device) for value in (0, tokens))
    cache, scale = in_turn(caches), HEAD_DIM**-0.5

    def decode() -> None:
        k, v, table = cache()
        ops.decode_attention(q, k, v, table[None], start, stop, scale, out, lse)

    dense = [torch.randn(2, 1, KV_HEADS, tokens, HEAD_DIM, device=device).bfloat16() for _ in caches]
    query, pair = torch.randn(1, HEADS, 1, HEAD_DIM, device=device).bfloat16(), in_turn(dense)
    read = 2 * caches[0][0].nbytes
    return {
        "tokens": tokens,
        "bytes_per_s": read / device_seconds(run, decode),
        "torch_bytes_per_s": read / device_seconds(run, lambda: _attend(query, *pair())),
    }


def prefill_kernel(run: Run, rows: int) -> dict[str, float]:
    """A prompt over itself, causal: operations a second, half of a full product's."""
    device, ops = tensor_device(run)
    k, v, table = _pages(rows, device)
    q, (out, lse) = torch.randn(rows, HEADS, HEAD_DIM, device=device), _results(rows, device)
    scale, operations = HEAD_DIM**-0.5, 2 * rows * rows * HEADS * HEAD_DIM
    own = device_seconds(run, lambda: ops.prefill_attention(q, k, v, table, 0, rows, 0, 0, scale, out, lse), 4)
    shapes = [(1, heads, rows, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    dense = [torch.randn(shape, device=device).bfloat16() for shape in shapes]
    flash = device_seconds(run, lambda: _attend(*dense, is_causal=True), 4)
    return {"rows": rows, "ops_per_s": operations / own, "torch_ops_per_s": operations / flash}


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, is_causal: bool = False) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True)


def _pages(tokens: int, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """bf16 pages of K and of V, and their table [KV_HEADS, pages]."""
    pages = tokens // PAGE_TOKENS * KV_HEADS
    k, v = (torch.randn(pages, PAGE_TOKENS, HEAD_DIM, device=device).bfloat16() for _ in range(2))
    return k, v, torch.arange(pages, dtype=torch.int32, device=device).view(-1, KV_HEADS).T.contiguous()


def _results(rows: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty(rows, HEADS, HEAD_DIM, device=device), torch.empty(rows, HEADS, device=device)


def copy_rate(run: Run) -> float:
    """Bytes a second read and written by a copy within the memory that kernels use: the ceiling."""
    device, _ = tensor_device(run)
    source = torch.zeros((1 << 20) if run.quick else (1 << 30), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / device_seconds(run, lambda: target.copy_(source))


def tensor_device(run: Run) -> tuple[str, Any]:
    """Where kernel tensors live, and the operations there."""
    from gpu_kernels import reference
    from gpu_kernels.device_ops import DeviceOps

    return ("cpu", reference) if run.device == "emulated" else (run.device, DeviceOps(run.device))


def device_seconds(run: Run, work: Callable[[], object], calls: int = 12) -> float:
    """Median seconds of one call in a captured graph of several, so that no launch by Python counts."""
    if run.device == "emulated":
        return median_seconds(work, 1)
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            work()

    def settled() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return median_seconds(settled, 7) / calls


def in_turn(things: list[Any]) -> Callable[[], Any]:
    """The next of several equal things at each call: together they are larger than the GPU's cache."""
    turns = cycle(things)
    return lambda: next(turns)


def median_seconds(work: Callable[[], object], repetitions: int) -> float:
    """Median time of `work`, warmed up once."""
    work()
    times = []
    for _ in range(repetitions):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)
