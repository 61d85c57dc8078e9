"""Measure one machine's CPU lane with the runtime's own kernels: the numbers that the planner works with.

Every rate is what an op reaches, not what a data sheet says: bytes of weights or cache a second with one row,
operations a second by row count, on buffers larger than the last-level cache and, apart from that, on a small one that
stays in it.
Medians of repetitions, because machines are shared. The GPU, the bus and both sides at once: placement.profilers.gpu.
"""

import statistics
import time
from collections.abc import Callable

import torch

from cpu_kernels import CpuKernels
from cpu_kernels.formats.weights import WEIGHT_DTYPES
from placement.machine.fingerprint import cpu_name, last_level_cache_bytes, machine_fingerprint
from placement.machine.hardware import HardwareProfile
from placement.machine.rates import DtypeRates, ThreadRate
from placement.profilers.cpu_attention import attention_rates
from placement.profilers.cpu_linear import activation_s, cached_rates, row_rates, share_of_sweep, thread_sweep
from placement.profilers.timing import (
    CALLS,
    FLOAT32,
    REPETITIONS,
    WEIGHT_BYTE,
    Progress,
    host_full,
    recorded_seconds,
    seconds,
)

CLEARLY_SLOWER = 0.95  # of the best one-row rate: a larger count below this is left out
BETWEEN_BYTES = 16 << 20  # weights that pass through the cache between two small operations
SMALL_ROWS = 256


def measure(
    max_threads: int, dram_bytes: int, on_progress: Progress = lambda what: None, threads: int | None = None
) -> HardwareProfile:
    """Measure the CPU lane with the thread count that serves it best; takes some ten seconds.

    max_threads: physical cores to try. dram_bytes: host memory that a plan may use. threads: measure with this count
    and sweep none. on_progress(what) is called before each measurement.
    """
    counts = thread_counts(max_threads) if threads is None else (threads,)
    sweep = thread_sweep(counts, on_progress)
    threads = best_threads(sweep)
    with CpuKernels(threads) as ops:
        dram = max(rate.sweep_bytes_per_s for rate in sweep if rate.threads == threads)
        few = DtypeRates(*(dram * share_of_sweep(ops, dtype, on_progress) for dtype in WEIGHT_DTYPES))
        activations = activation_s(ops, on_progress)
        rows = row_rates(ops, few, activations, on_progress)
        attention = attention_rates(ops, dram, on_progress)
        cached = cached_rates(ops, on_progress)
        on_progress("small operations")
        call_s, recorded_s = calls(ops)
        small = small_rate(ops)
    most = max(attention, key=lambda rate: rate.ops_per_s)
    return HardwareProfile(
        name=cpu_name(),
        source="measured",
        cores=threads,
        dram_bytes=dram_bytes,
        dram_bytes_per_s=max(
            max(rate.sweep_bytes_per_s for rate in sweep), *(few.of(dtype) for dtype in WEIGHT_DTYPES)
        ),
        cpu_linear_bytes_per_s=few,
        cpu_ops_per_s=DtypeRates(*(max(rate.ops_per_s.of(dtype) for rate in rows) for dtype in WEIGHT_DTYPES)),
        cpu_attention_bytes_per_s=statistics.median(rate.bytes_per_s for rate in attention),
        cpu_attention_ops_per_s=most.ops_per_s,
        cpu_call_s=call_s,
        cpu_recorded_call_s=recorded_s,
        cpu_small_bytes_per_s=small,
        cpu_cache_bytes=last_level_cache_bytes(),
        cpu_cached_bytes_per_s=cached,
        cpu_rows=rows,
        cpu_activation_s=activations,
        cpu_attention=attention,
        logits_s_per_token=logits_s(),
        thread_sweep=sweep,
        fingerprint=machine_fingerprint(max_threads),
    )


def thread_counts(max_threads: int) -> tuple[int, ...]:
    """1, 2, 4, ... and the maximum."""
    counts = {1 << power for power in range(max_threads.bit_length()) if 1 << power <= max_threads}
    return tuple(sorted(counts | {max_threads}))


def best_threads(sweep: tuple[ThreadRate, ...]) -> int:
    """The largest count whose one-row linear is not clearly slower than the best one's.

    Where memory is the limit one row gains nothing from more cores, but prompts and attention over many heads do.
    """
    best = max(rate.linear_bytes_per_s for rate in sweep)
    return max(rate.threads for rate in sweep if rate.linear_bytes_per_s >= best * CLEARLY_SLOWER)


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
    rows, hidden, heads, kv_heads, head_dim = SMALL_ROWS, 1024, 16, 8, 64
    x, weight = torch.randn(rows, hidden, **FLOAT32), torch.ones(hidden, **FLOAT32)
    normed = torch.empty(rows, hidden, **FLOAT32)
    gate_up, activated = torch.randn(rows, 7 * hidden, **FLOAT32), torch.empty(rows, 7 * hidden // 2, **FLOAT32)
    qkv = torch.randn(rows, kv_heads, (heads // kv_heads + 2) * head_dim, **FLOAT32)
    q = torch.empty(rows, heads, head_dim, **FLOAT32)
    pages = [torch.zeros(kv_heads * rows, 1, head_dim, dtype=torch.bfloat16, device="cpu") for _ in range(2)]
    angles, positions = torch.ones(rows, head_dim // 2, **FLOAT32), torch.arange(rows, device="cpu")
    slots = torch.arange(rows * kv_heads, device="cpu").view(rows, kv_heads)
    between = host_full((BETWEEN_BYTES,), torch.uint8, WEIGHT_BYTE)
    rope = (qkv, positions, angles, angles, None, None, 1e-6, q, *pages, slots)

    def cold(work: Callable[[], None]) -> float:
        times = []
        for _ in range(REPETITIONS + 1):
            ops.sweep(between)
            started = time.perf_counter()
            work()
            times.append(time.perf_counter() - started)
        return statistics.median(times[1:])

    taken = 2 * cold(lambda: ops.rms_norm(x, weight, 1e-6, normed)) + cold(lambda: ops.rope_append(*rope))
    taken += cold(lambda: ops.silu_mul(gate_up, activated))
    moved = 2 * (x.nbytes + normed.nbytes) + qkv.nbytes + q.nbytes + gate_up.nbytes + activated.nbytes
    return moved / taken


def logits_s(vocab_size: int = 128_256) -> float:
    """Seconds per entry of the vocabulary to copy a row of logits and find its maximum."""
    logits = torch.randn(1, vocab_size, **FLOAT32)
    return seconds(lambda: int(logits.clone()[0].argmax())) / vocab_size
