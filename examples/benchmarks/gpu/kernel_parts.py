"""GPU kernels alone: the q4 linear by rows and by stages, products into columns, attention beside torch's own."""

import statistics
import time
from collections.abc import Callable
from itertools import cycle
from typing import Any

import torch

from cpu_kernels.contract import ChunkKeys, Pages, Partial, RowKeys

from .run import Run

HEADS, KV_HEADS, HEAD_DIM, PAGE_TOKENS = 32, 8, 128, 64
SHAPES = ((4096, 6144), (4096, 28_672), (14_336, 4096))
ROW_COUNTS = (1, 512, 1024, 2048)
STAGE_ROWS = (512, 2048)
MODEL_WEIGHTS = 32 * (4096 * (6144 + 4096 + 28_672) + 14_336 * 4096)  # of the 8B shape's layers
BEYOND_CACHE = 160 << 20  # bytes, three times the largest GPU's last cache


def linear_kernel(run: Run) -> dict[str, Any]:
    """The GPU's q4 linear by shape and rows: weight bytes and operations a second."""
    from cpu_kernels.formats.weights import BLOCK_FEATURES, block_bytes

    device, ops = tensor_device(run)
    rows = []
    for inputs, features in ((4096, 256),) if run.quick else SHAPES:
        block = (features // BLOCK_FEATURES, block_bytes("q4", inputs))
        copies = 1 if run.quick else 1 + BEYOND_CACHE // (block[0] * block[1])
        weights = [torch.full(block, 60, dtype=torch.uint8, device=device) for _ in range(copies)]
        for count in (1, 16) if run.quick else ROW_COUNTS:
            x, out = (torch.randn(count, inputs, device=device), torch.empty(count, features, device=device))
            weight = in_turn(weights)
            seconds = device_seconds(run, lambda x=x, w=weight, out=out: ops.linear(x, w(), "q4", None, out))
            operations = 2 * count * features * inputs
            rows.append(
                {"shape": [inputs, features], "rows": count, "bytes_per_s": weights[0].numel() / seconds,
                 "ops_per_s": operations / seconds}
            )  # fmt: skip
    return {"rows": rows}


def linear_stages(run: Run) -> dict[str, Any]:
    """Milliseconds that each stage of a product of many rows takes for all layers of the model, and a product whose
    result goes straight into its columns, or onto what is there, beside the product and copy of today."""
    if not run.has_gpu:
        return {"skipped": "no GPU: the reference has no stages"}
    from cpu_kernels.formats.weights import BLOCK_FEATURES, block_bytes
    from gpu_kernels.activation import round_activation
    from gpu_kernels.dequantize import dequantize

    inputs, features = 4096, 8192  # a piece of 64 MiB as bf16, as `linear` takes them
    packed = torch.full((features // BLOCK_FEATURES, block_bytes("q4", inputs)), 60, dtype=torch.uint8)
    weight, found = packed.to(run.device), []
    dense, scale = dequantize(weight, "q4"), 1e3 * MODEL_WEIGHTS / (inputs * features)
    for rows in STAGE_ROWS:
        x, wide = (torch.randn(rows, inputs, device=run.device), torch.zeros(rows, 2 * features, device=run.device))
        rounded, target = round_activation(x), wide[:, features:]
        result = torch.mm(rounded, dense.T, out_dtype=torch.float32)
        stages: dict[str, Callable[[], object]] = {
            "round": lambda x=x: round_activation(x),
            "dequantise": lambda: dequantize(weight, "q4"),
            "mm": lambda r=rounded: torch.mm(r, dense.T, out_dtype=torch.float32),
            "copy": lambda t=target, r=result: t.copy_(r),
            "add": lambda t=target, r=result: t.add_(r),
            "mm into columns": lambda t=target, r=rounded: torch.mm(r, dense.T, out_dtype=torch.float32, out=t),
            "addmm onto columns": lambda t=target, r=rounded: torch.addmm(
                t, r, dense.T, out_dtype=torch.float32, out=t
            ),
        }
        found.append({"rows": rows} | {f"{name} ms": _attempt(run, stage, scale) for name, stage in stages.items()})
        try:
            torch.mm(rounded, dense.T, out_dtype=torch.float32, out=target)
            found[-1]["mm into columns is right"] = bool(torch.equal(target, result))
        except Exception as error:  # an overload that this torch lacks is an answer
            found[-1]["mm into columns is right"] = f"{type(error).__name__}: {error}"[:300]
    return {"rows": found}


def _attempt(run: Run, work: Callable[[], object], scale: float) -> float | str:
    """Seconds times `scale`; what went wrong where it cannot be done."""
    try:
        return scale * device_seconds(run, work)
    except Exception as error:  # of whatever kind: the other stages count
        torch.cuda.synchronize()
        return f"{type(error).__name__}: {error}"[:300]


def attention_kernels(run: Run) -> dict[str, Any]:
    """Decode in microseconds by tokens, prefill in operations a second, each beside torch's own attention."""
    lengths, prompts = ((256,), ((64, 0),)) if run.quick else ((1024, 16_384), ((4096, 0), (1024, 3072)))
    return {
        "decode": [decode_kernel(run, tokens) for tokens in lengths],
        "prefill": [prefill_kernel(run, rows, before) for rows, before in prompts],
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
        ops.decode_attention(q, Pages(k, v), RowKeys(table[None], start, stop), scale, Partial(out, lse))

    dense = [torch.randn(2, 1, KV_HEADS, tokens, HEAD_DIM, device=device).bfloat16() for _ in caches]
    query, pair = (torch.randn(1, HEADS, 1, HEAD_DIM, device=device).bfloat16(), in_turn(dense))
    seconds, read = device_seconds(run, decode), 2 * caches[0][0].nbytes
    return {
        "tokens": tokens,
        "us": 1e6 * seconds,
        "bytes_per_s": read / seconds,
        "torch_bytes_per_s": read / device_seconds(run, lambda: _attend(query, *pair())),
    }


def prefill_kernel(run: Run, rows: int, before: int) -> dict[str, Any]:
    """A chunk behind `before` tokens, causal: operations a second of ours and of torch's flash attention."""
    device, ops = tensor_device(run)
    tokens = before + rows
    k, v, table = _pages(tokens, device)
    q, (out, lse) = (torch.randn(rows, HEADS, HEAD_DIM, device=device), _results(rows, device))
    scale, operations = (HEAD_DIM**-0.5, 4 * HEADS * HEAD_DIM * rows * (before + (rows + 1) / 2))
    keys, into = ChunkKeys(table, 0, tokens, before), Partial(out, lse)
    own = device_seconds(run, lambda: ops.prefill_attention(q, Pages(k, v), keys, scale, into), 4)
    found = {"rows": rows, "before": before, "ops_per_s": operations / own}
    if not run.has_gpu:
        return found
    pages = (k, v)
    keys, values = (side.view(-1, KV_HEADS, PAGE_TOKENS, HEAD_DIM).transpose(1, 2).flatten(0, 1) for side in pages)
    dense = [each[None].contiguous() for each in (q.bfloat16(), keys, values)]

    def flash() -> tuple[torch.Tensor, ...]:
        arguments = (*dense, None, None, rows, tokens, 0.0, True, False)
        return torch.ops.aten._flash_attention_forward(*arguments, scale=scale)

    try:
        found["torch_ops_per_s"] = operations / device_seconds(run, flash, 4)
        theirs, their_lse = flash()[:2]
        found["torch_nmse"] = _nmse(theirs[0].float(), out)
        found["torch_lse_error"] = float((their_lse[0].T.float() - lse).abs().max().item())
    except Exception as error:  # another torch names or orders it otherwise: ours counts all the same
        found["torch_error"] = f"{type(error).__name__}: {error}"[:500]
    return found


def _nmse(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((found - expected).square().mean() / expected.square().mean()).item())


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def _pages(tokens: int, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """bf16 pages of K and of V, and their table [KV_HEADS, pages]."""
    pages = tokens // PAGE_TOKENS * KV_HEADS
    k, v = (torch.randn(pages, PAGE_TOKENS, HEAD_DIM, device=device).bfloat16() for _ in range(2))
    return (k, v, torch.arange(pages, dtype=torch.int32, device=device).view(-1, KV_HEADS).T.contiguous())


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

    return (run.device, DeviceOps(run.device)) if run.has_gpu else ("cpu", reference)


def device_seconds(run: Run, work: Callable[[], object], calls: int = 12) -> float:
    """Median seconds of one call in a captured graph of several, so that no launch by Python counts."""
    if not run.has_gpu:
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
