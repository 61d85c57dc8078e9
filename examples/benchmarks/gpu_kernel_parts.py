"""GPU kernels alone: bytes and operations a second beside what memory gives and what torch's own attention reaches."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from gpu_run import Run


def linear_kernel(run: Run, dtype: str) -> dict[str, Any]:
    """The GPU's linear by rows, weight bytes and operations a second; the bytes of two layers, larger than any cache."""
    from cpu_kernels.layout import BLOCK_FEATURES, block_bytes

    features = 256 if run.quick else 32_768
    device, ops = tensor_device(run)
    weight = torch.full((features // BLOCK_FEATURES, block_bytes(dtype, 4096)), 60, dtype=torch.uint8, device=device)
    rows = []
    for count in (1, 4, 16, 64, 512) if not run.quick else (1, 16):
        x, out = torch.randn(count, 4096, device=device), torch.empty(count, features, device=device)
        seconds = device_seconds(run, lambda x=x, out=out: ops.linear(x, weight, dtype, None, out))
        operations = 2 * count * features * 4096
        rows.append({"rows": count, "bytes_per_s": weight.numel() / seconds, "ops_per_s": operations / seconds})
    return {"rows": rows, "copy_bytes_per_s": copy_rate(run)}


def attention_kernels(run: Run) -> dict[str, Any]:
    """Decode over 16k tokens in bytes a second, prefill in operations a second, each beside torch's own attention."""
    device, ops = tensor_device(run)
    heads, groups, head_dim, page = 32, 8, 128, 64
    tokens, rows = (256, 32) if run.quick else (16_384, 4096)
    pages = tokens // page * groups
    k, v = (torch.randn(pages, page, head_dim, device=device).bfloat16() for _ in range(2))
    table = torch.arange(pages, dtype=torch.int32, device=device).view(-1, groups).T.contiguous()
    start, stop = (torch.full((1,), value, dtype=torch.int32, device=device) for value in (0, tokens))
    q, out = (torch.randn(rows, heads, head_dim, device=device) for _ in range(2))
    lse = torch.empty(rows, heads, device=device)
    scale = head_dim**-0.5
    decode = device_seconds(
        run, lambda: ops.decode_attention(q[:1], k, v, table[None], start, stop, scale, out[:1], lse[:1])
    )
    prefill = device_seconds(run, lambda: ops.prefill_attention(q, k, v, table, 0, rows, 0, 0, scale, out, lse))
    dense = [
        torch.randn(1, count, length, head_dim, device=device).bfloat16()
        for count, length in ((heads, rows), (groups, tokens))
    ]
    attend = torch.nn.functional.scaled_dot_product_attention
    flash_decode = device_seconds(run, lambda: attend(dense[0][:, :, :1], dense[1], dense[1], enable_gqa=True))
    short = dense[1][:, :, :rows]
    flash_prefill = device_seconds(run, lambda: attend(dense[0], short, short, is_causal=True, enable_gqa=True))
    operations = 2 * rows * rows * heads * head_dim  # half of 4 MNK: causal
    return {
        "decode_bytes_per_s": 2 * k.nbytes / decode,
        "torch_decode_bytes_per_s": 2 * k.nbytes / flash_decode,
        "prefill_ops_per_s": operations / prefill,
        "torch_prefill_ops_per_s": operations / flash_prefill,
        "copy_bytes_per_s": copy_rate(run),
    }


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


def device_seconds(run: Run, work: Callable[[], object]) -> float:
    """Median seconds of one call, all of its kernels ended."""

    def settled() -> None:
        work()
        if run.device != "emulated":
            torch.cuda.synchronize()

    calls = 1 if run.quick else 20

    def many() -> None:
        for _ in range(calls):
            work()
        settled()

    return median_seconds(many, 1 if run.quick else 5) / (calls + 1)


def median_seconds(work: Callable[[], object], repetitions: int) -> float:
    """Median time of `work`, warmed up once."""
    work()
    times = []
    for _ in range(repetitions):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)
