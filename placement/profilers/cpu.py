"""Measure one machine's CPU lane with the runtime's own kernels: the numbers that the planner works with.

Every rate is what an op reaches, not what a data sheet says: bytes of weights or cache a second with one row,
operations a second by row count, on buffers larger than the last-level cache and, apart from that, on a small one that
stays in it.
Medians of repetitions, because machines are shared. The GPU, the bus and both sides at once: placement.profilers.gpu.
"""

import statistics
from collections.abc import Sequence
from typing import Any

import torch

from cpu_kernels import CpuKernels
from cpu_kernels.formats.weights import WEIGHT_DTYPES
from placement.machine.fingerprint import cpu_name, last_level_cache_bytes, machine_fingerprint
from placement.machine.hardware import HardwareProfile
from placement.machine.rates import DtypeRates, ThreadRate
from placement.profilers.ahead import compile_all
from placement.profilers.cpu_attention import Cache, attention_rates
from placement.profilers.cpu_linear import (
    SWEEP_BYTES,
    activation_s,
    cached_rates,
    row_rates,
    share_of_sweep,
    thread_sweep,
)
from placement.profilers.cpu_small import calls, small_rate
from placement.profilers.timing import (
    FLOAT32,
    Progress,
    beyond_caches,
    host_memory,
    seconds,
)

CLEARLY_SLOWER = 0.95  # of the best one-row rate: a larger count below this is left out


def measure(
    max_threads: int,
    dram_bytes: int,
    on_progress: Progress = lambda what: None,
    threads: int | None = None,
    formats: Sequence[str] = (),
    caches: Sequence[Cache] = (),
) -> HardwareProfile:
    """Measure the CPU lane with the thread count that serves it best; takes some ten seconds once its kernels are
    compiled, which is done first, by as many processes as there are threads.

    max_threads: physical cores to try. dram_bytes: host memory that a plan may use. threads: measure with this count
    and sweep none. formats: weight formats to measure beside the four that every profile has. caches: the same
    for attention. on_progress(what) is called before each measurement.
    """
    counts = thread_counts(max_threads) if threads is None else (threads,)
    formats = tuple(dict.fromkeys((*WEIGHT_DTYPES, *formats)))
    compile_all(max(counts), formats, caches, on_progress)
    memory = host_memory(beyond_caches(SWEEP_BYTES))
    sweep = thread_sweep(counts, memory, on_progress)
    threads = best_threads(sweep)
    with CpuKernels(threads) as ops:
        dram = max(rate.sweep_bytes_per_s for rate in sweep if rate.threads == threads)
        linears = _linears(ops, dram, formats, memory, on_progress)
        attention = _attention(ops, dram, caches, memory, on_progress)
        small = _small_operations(ops, on_progress)
    best_linears = (linears["cpu_linear_bytes_per_s"].of(dtype) for dtype in WEIGHT_DTYPES)
    return HardwareProfile(
        name=cpu_name(),
        source="measured",
        cores=threads,
        dram_bytes=dram_bytes,
        dram_bytes_per_s=max(max(rate.sweep_bytes_per_s for rate in sweep), *best_linears),
        cpu_cache_bytes=last_level_cache_bytes(),
        logits_s_per_token=logits_s(),
        thread_sweep=sweep,
        fingerprint=machine_fingerprint(max_threads),
        **linears,
        **attention,
        **small,
    )


def _linears(
    ops: CpuKernels, dram: float, formats: Sequence[str], memory: torch.Tensor, on_progress: Progress
) -> dict[str, Any]:
    """The profile's rates of linears, where a plain read reaches `dram`."""
    few = DtypeRates.of_formats({dtype: dram * share_of_sweep(ops, dtype, memory, on_progress) for dtype in formats})
    activations = activation_s(ops, formats, memory, on_progress)
    rows = row_rates(ops, few, activations, memory, on_progress)
    return {
        "cpu_linear_bytes_per_s": few,
        "cpu_activation_s": activations,
        "cpu_rows": rows,
        "cpu_ops_per_s": DtypeRates.of_formats(
            {dtype: max(rate.ops_per_s.of(dtype) for rate in rows) for dtype in formats}
        ),
        "cpu_cached_bytes_per_s": cached_rates(ops, formats, memory, on_progress),
    }


def _attention(
    ops: CpuKernels, dram: float, caches: Sequence[Cache], memory: torch.Tensor, on_progress: Progress
) -> dict[str, Any]:
    """The profile's rates of attention."""
    rates = attention_rates(ops, dram, caches, memory, on_progress)
    return {
        "cpu_attention": rates,
        "cpu_attention_bytes_per_s": statistics.median(rate.bytes_per_s for rate in rates),
        "cpu_attention_ops_per_s": max(rate.ops_per_s for rate in rates),
    }


def _small_operations(ops: CpuKernels, on_progress: Progress) -> dict[str, Any]:
    """What the small operations cost, and each call."""
    on_progress("small operations")
    call_s, recorded_s = calls(ops)
    return {"cpu_call_s": call_s, "cpu_recorded_call_s": recorded_s, "cpu_small_bytes_per_s": small_rate(ops)}


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


def logits_s(vocab_size: int = 128_256) -> float:
    """Seconds per entry of the vocabulary to find the greatest of a row of logits where it lies, by numpy as the
    runtime does: torch takes 30 times as long on one thread."""
    logits = torch.randn(vocab_size, **FLOAT32)
    return seconds(lambda: int(logits.numpy().argmax())) / vocab_size
