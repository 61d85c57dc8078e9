"""Measure one machine with the runtime's own kernels: the numbers that the planner works with.

Every rate is what an op reaches, not what a data sheet says: bytes of weights or cache a second with one row, operations
a second with many, on buffers larger than the last-level cache. Medians of interleaved repetitions, because machines are
shared. The one module of this package that knows tensors and the kernel packages.
"""

import importlib.metadata
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from cpu_kernels import CpuKernels
from cpu_kernels.layout import BLOCK_FEATURES, WEIGHT_DTYPES, block_bytes
from placement.hardware import DtypeRates, HardwareProfile

SWEEP_BYTES = 96 << 20  # three times the largest last-level cache that a few cores share
IN_FEATURES = 2048
MANY_ROWS = 256
MANY_FEATURES = 2048
CONTEXT = 8192
HEAD_DIM = 128
KV_HEADS = 8
HEADS = 32
REPETITIONS = 5
# Bytes of a packed weight: as bfloat16, float32 or a float16 scale they are finite numbers of ordinary size, which is all
# that timing asks of them.
WEIGHT_BYTE = 0x3C
ENOUGH_FASTER = 1.03  # a thread must gain this much, or the smaller count is kept


@dataclass(frozen=True, slots=True)
class ThreadRate:
    """Bytes a second of a one-row q4 linear and of a plain sweep, by thread count."""

    threads: int
    linear_bytes_per_s: float
    sweep_bytes_per_s: float


def machine_fingerprint() -> tuple[tuple[str, str], ...]:
    """What a measured profile depends on; a profile with another fingerprint is stale or foreign."""
    fields = {
        "cpu": _cpu_name(),
        "machine": platform.machine(),
        "system": platform.system(),
        "torch": torch.__version__,
        "numba": importlib.metadata.version("numba"),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none",
    }
    return tuple(sorted(fields.items()))


def measure(
    max_threads: int, dram_bytes: int, on_progress: Callable[[str], None] = lambda what: None
) -> tuple[HardwareProfile, tuple[ThreadRate, ...]]:
    """Measure the CPU lane with the thread count that serves it best; takes some seconds.

    max_threads: physical cores to try. dram_bytes: host memory that a plan may use. on_progress(what) is called before each
    measurement. Returns the profile and the sweep over thread counts.
    """
    weight = _weight("q4", SWEEP_BYTES)
    sweep = tuple(_thread_rate(threads, weight, on_progress) for threads in thread_counts(max_threads))
    threads = best_threads(sweep)
    del weight
    with CpuKernels(threads) as ops:
        rates = {name: rate() for name, rate in _rates(ops, on_progress)}
    profile = HardwareProfile(
        name=_cpu_name(),
        source="measured",
        cores=threads,
        dram_bytes=dram_bytes,
        dram_bytes_per_s=max(rate.sweep_bytes_per_s for rate in sweep),
        cpu_linear_bytes_per_s=DtypeRates(*(rates[f"few {dtype}"] for dtype in WEIGHT_DTYPES)),
        cpu_ops_per_s=DtypeRates(*(rates[f"many {dtype}"] for dtype in WEIGHT_DTYPES)),
        cpu_attention_bytes_per_s=rates["decode attention"],
        cpu_attention_ops_per_s=rates["prefill attention"],
        cpu_call_s=rates["call"],
        step_overhead_s=rates["step"],
        fingerprint=machine_fingerprint(),
    )
    return profile, sweep


def thread_counts(max_threads: int) -> tuple[int, ...]:
    """1, 2, 4, ... and the maximum."""
    counts = {1 << power for power in range(max_threads.bit_length()) if 1 << power <= max_threads}
    return tuple(sorted(counts | {max_threads}))


def best_threads(sweep: tuple[ThreadRate, ...]) -> int:
    """The smallest count that no larger one beats by more than a few per cent."""
    best = sweep[0]
    for rate in sweep[1:]:
        if rate.linear_bytes_per_s > best.linear_bytes_per_s * ENOUGH_FASTER:
            best = rate
    return best.threads


def _rates(ops: CpuKernels, on_progress: Callable[[str], None]) -> Iterator[tuple[str, Callable[[], float]]]:
    """Name and measurement of every rate, in the order they run."""
    measurements: dict[str, Callable[[], float]] = {}
    for dtype in WEIGHT_DTYPES:
        measurements[f"few {dtype}"] = lambda dtype=dtype: _few_rows(ops, dtype)
        measurements[f"many {dtype}"] = lambda dtype=dtype: _many_rows(ops, dtype)
    measurements["decode attention"] = lambda: _decode_attention(ops)
    measurements["prefill attention"] = lambda: _prefill_attention(ops)
    measurements["call"] = lambda: _call(ops)
    measurements["step"] = _step
    for name, measurement in measurements.items():
        on_progress(name)
        yield name, measurement


def _seconds(work: Callable[[], object]) -> float:
    """Median time of one call, warmed up."""
    work()
    times = []
    for _ in range(REPETITIONS):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def _weight(dtype: str, total_bytes: int) -> torch.Tensor:
    row_bytes = block_bytes(dtype, IN_FEATURES)
    return torch.full((total_bytes // row_bytes, row_bytes), WEIGHT_BYTE, dtype=torch.uint8)


def _thread_rate(threads: int, weight: torch.Tensor, on_progress: Callable[[str], None]) -> ThreadRate:
    on_progress(f"{threads} threads")
    x, out = torch.randn(1, IN_FEATURES), torch.empty(1, weight.shape[0] * BLOCK_FEATURES)
    with CpuKernels(threads) as ops:
        linear = _seconds(lambda: ops.linear(x, weight, "q4", None, out))
        sweep = _seconds(lambda: ops.sweep(weight))
    return ThreadRate(threads, weight.numel() / linear, weight.numel() / sweep)


def _few_rows(ops: CpuKernels, dtype: str) -> float:
    weight = _weight(dtype, SWEEP_BYTES)
    x, out = torch.randn(1, IN_FEATURES), torch.empty(1, weight.shape[0] * BLOCK_FEATURES)
    return weight.numel() / _seconds(lambda: ops.linear(x, weight, dtype, None, out))


def _many_rows(ops: CpuKernels, dtype: str) -> float:
    weight = _weight(dtype, MANY_FEATURES // BLOCK_FEATURES * block_bytes(dtype, IN_FEATURES))
    x, out = torch.randn(MANY_ROWS, IN_FEATURES), torch.empty(MANY_ROWS, MANY_FEATURES)
    return 2 * MANY_ROWS * MANY_FEATURES * IN_FEATURES / _seconds(lambda: ops.linear(x, weight, dtype, None, out))


def _pages() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    pages = CONTEXT // 64 * KV_HEADS
    k_pages, v_pages = (torch.randn(pages, 64, HEAD_DIM).to(torch.bfloat16) for _ in range(2))
    return k_pages, v_pages, torch.arange(pages, dtype=torch.int32).view(-1, KV_HEADS).T.contiguous()


def _decode_attention(ops: CpuKernels) -> float:
    k_pages, v_pages, table = _pages()
    q, out, lse = torch.randn(1, HEADS, HEAD_DIM), torch.empty(1, HEADS, HEAD_DIM), torch.empty(1, HEADS)
    start, stop = torch.zeros(1, dtype=torch.int32), torch.full((1,), CONTEXT, dtype=torch.int32)
    seconds = _seconds(lambda: ops.decode_attention(q, k_pages, v_pages, table[None], start, stop, 0.1, out, lse))
    return (k_pages.nbytes + v_pages.nbytes) / seconds


def _prefill_attention(ops: CpuKernels) -> float:
    k_pages, v_pages, table = _pages()
    rows, keys = MANY_ROWS, CONTEXT // 4
    q, out, lse = torch.randn(rows, HEADS, HEAD_DIM), torch.empty(rows, HEADS, HEAD_DIM), torch.empty(rows, HEADS)
    seconds = _seconds(
        lambda: ops.prefill_attention(q, k_pages, v_pages, table, 0, keys, keys - rows, 0, 0.1, out, lse)
    )
    return 4 * HEAD_DIM * HEADS * rows * (keys - rows // 2) / seconds


def _call(ops: CpuKernels) -> float:
    x, weight, out = torch.randn(1, IN_FEATURES), torch.ones(IN_FEATURES), torch.empty(1, IN_FEATURES)

    def many() -> None:
        for _ in range(100):
            ops.rms_norm(x, weight, 1e-6, out)

    return _seconds(many) / 100


def _step() -> float:
    logits = torch.randn(1, 128_256)
    return _seconds(lambda: int(logits.clone()[0].argmax()))


def _cpu_name() -> str:
    """The processor's own name where the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
