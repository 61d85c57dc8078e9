"""Rates of the CPU lane's small operations, and what calling one costs."""

import statistics
import time
from collections.abc import Callable

import torch

from cpu_kernels import CpuKernels
from cpu_kernels.contract import Pages, Rotation
from placement.profilers import timing
from placement.profilers.timing import CALLS, FLOAT32, host_memory, recorded_seconds, seconds

BETWEEN_BYTES = 16 << 20  # weights that pass through the cache between two small operations
SMALL_ROWS = 256


def calls(ops: CpuKernels) -> tuple[float, float]:
    """Seconds of the smallest op, called from Python and recorded."""
    x, weight, out = torch.randn(1, 64, **FLOAT32), torch.ones(64, **FLOAT32), torch.empty(1, 64, **FLOAT32)

    def call() -> None:
        ops.rms_norm(x, weight, 1e-6, out)

    def many() -> None:
        for _ in range(CALLS):
            call()

    return seconds(many) / CALLS, recorded_seconds(ops, call, CALLS)


def small_rate(ops: CpuKernels) -> float:
    """Activation bytes a second, in and out, through two norms, the rotary embedding and the gated activation of a
    layer, each after weights have passed through the cache as they do between them."""
    between = host_memory(BETWEEN_BYTES)

    def cold(work: Callable[[], None]) -> float:
        times = []
        for _ in range(timing.REPETITIONS + 1):
            ops.sweep(between)
            started = time.perf_counter()
            work()
            times.append(time.perf_counter() - started)
        return statistics.median(times[1:])

    works, moved_bytes = small_calls(ops, SMALL_ROWS)
    return moved_bytes / sum(map(cold, works))


def small_calls(ops: CpuKernels, rows: int) -> tuple[list[Callable[[], None]], int]:
    """Two norms, the rotary embedding and the gated activation of a layer, ready to be called, and the bytes of
    activations that they move."""
    hidden, heads, kv_heads, head_dim = 1024, 16, 8, 64
    x, weight = torch.randn(rows, hidden, **FLOAT32), torch.ones(hidden, **FLOAT32)
    normed = torch.empty(rows, hidden, **FLOAT32)
    gate_up, activated = torch.randn(rows, 7 * hidden, **FLOAT32), torch.empty(rows, 7 * hidden // 2, **FLOAT32)
    qkv = torch.randn(rows, kv_heads, (heads // kv_heads + 2) * head_dim, **FLOAT32)
    q = torch.empty(rows, heads, head_dim, **FLOAT32)
    k_pages, v_pages = (torch.zeros(kv_heads * rows, 1, head_dim, dtype=torch.bfloat16, device="cpu") for _ in range(2))
    angles, positions = torch.ones(rows, head_dim // 2, **FLOAT32), torch.arange(rows, device="cpu")
    slots = torch.arange(rows * kv_heads, device="cpu").view(rows, kv_heads)

    def norm() -> None:
        ops.rms_norm(x, weight, 1e-6, normed)

    def rope() -> None:
        ops.rope_append(qkv, positions, Rotation(angles, angles, None, None, 1e-6), q, Pages(k_pages, v_pages), slots)

    moved_bytes = 2 * (x.nbytes + normed.nbytes) + qkv.nbytes + q.nbytes + gate_up.nbytes + activated.nbytes
    return [norm, norm, rope, lambda: ops.silu_mul(gate_up, activated)], moved_bytes
