"""Measure the linears of a GPU by token rows, and up to how many rows q8 and q4 weights are multiplied best in int8."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from cpu_kernels.formats.weights import BLOCK_FEATURES, WEIGHT_DTYPES, block_bytes
from placement.machine.rates import ANY_ROWS, DtypeRates, RowRate
from placement.profilers.timing import WEIGHT_BYTE, Progress

# Larger than the GPU's own caches, so that one row reads its memory.
GPU_WEIGHTS = 256 << 20
IN_FEATURES = 4096
ROW_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 512)
INT8_ROW_COUNTS = (16, 64, 128, 512)
# Time grows with the rows once a linear takes this much longer than with one.
FLAT = 1.5
# A GEMM has arrived where it reaches this share of the best rate.
NEARLY_ALL = 0.8


class Int8Products(NamedTuple):
    """rows: the most for which int8 is faster than bf16, by weight format. ops_per_s: of many rows of q4 in int8."""

    rows: dict[str, int]
    ops_per_s: float


def few_rows(gpu: Any, dtype: str, on_progress: Progress) -> float:
    """Weight bytes a second of a linear with one row."""
    on_progress(f"GPU linear {dtype}")
    weight = _weight(gpu, dtype)
    return weight.nbytes / kernels_s(gpu, linear_call(gpu, weight, dtype, 1))


def row_rates(gpu: Any, few: DtypeRates, int8_rows: Mapping[str, int], on_progress: Progress) -> tuple[RowRate, ...]:
    """Operations a second by row count: one row waits for memory, some cost no more, many are bound by arithmetic."""
    rates: dict[str, list[float]] = {}
    for dtype in WEIGHT_DTYPES:
        on_progress(f"GPU linear {dtype} by rows")
        weight = _weight(gpu, dtype)
        work = 2 * weight.shape[0] * BLOCK_FEATURES * IN_FEATURES
        rates[dtype] = [work * few.of(dtype) / weight.nbytes]
        for rows in ROW_COUNTS[1:]:
            rates[dtype].append(rows * work / kernels_s(gpu, linear_call(gpu, weight, dtype, rows, int8_rows)))
    return tuple(
        RowRate(rows, DtypeRates(*(rates[dtype][i] for dtype in WEIGHT_DTYPES))) for i, rows in enumerate(ROW_COUNTS)
    )


def crossovers(rates: tuple[RowRate, ...], dtype: str) -> tuple[int, int]:
    """(flat, gemm): the most rows that cost hardly more than one, and the fewest that reach nearly the best rate."""
    times = {rate.rows: rate.rows / rate.ops_per_s.of(dtype) for rate in rates}
    best = max(rate.ops_per_s.of(dtype) for rate in rates)
    flat = max(rows for rows, taken in times.items() if taken <= FLAT * times[rates[0].rows])
    return flat, min(rate.rows for rate in rates if rate.ops_per_s.of(dtype) >= NEARLY_ALL * best)


def int8_products(gpu: Any, on_progress: Progress) -> Int8Products:
    """Both ways to multiply q8 and q4 weights at some row counts, and where the faster one changes."""
    rows, ops_per_s = {}, 0.0
    for dtype in ("q8", "q4"):
        on_progress(f"GPU linear {dtype} in int8 and in bf16")
        weight, times = _weight(gpu, dtype), {}
        for path, limit in (("int8", ANY_ROWS), ("bf16", 0)):
            calls = (linear_call(gpu, weight, dtype, count, {dtype: limit}) for count in INT8_ROW_COUNTS)
            times[path] = [kernels_s(gpu, call) for call in calls]
        rows[dtype] = crossing(INT8_ROW_COUNTS, times["int8"], times["bf16"])
        work = 2 * weight.shape[0] * BLOCK_FEATURES * IN_FEATURES
        ops_per_s = INT8_ROW_COUNTS[-1] * work / times["int8"][-1]
    return Int8Products(rows, ops_per_s)


def crossing(counts: Sequence[int], first_s: Sequence[float], second_s: Sequence[float]) -> int:
    """The most rows for which the first of two ways takes no longer, of seconds at ascending row counts.

    Between two counts, and beyond the last ones, both ways are taken for straight lines. 1 where the second is faster
    from the beginning, ANY_ROWS where the first always stays ahead.
    """
    ahead = [second - first for first, second in zip(first_s, second_s, strict=True)]
    behind = next((index for index, gain in enumerate(ahead) if gain < 0), len(counts))
    if behind == 0:
        return 1
    low, high = (behind - 1, behind) if behind < len(counts) else (behind - 2, behind - 1)
    slope = (ahead[high] - ahead[low]) / (counts[high] - counts[low])
    if slope >= 0:
        return ANY_ROWS
    return min(ANY_ROWS, int(counts[low] - ahead[low] / slope))


def kernels_s(gpu: Any, work: Callable[[], object]) -> float:
    """Seconds of kernels, warmed up."""
    work()
    return gpu.kernel_seconds(work)


def _weight(gpu: Any, dtype: str) -> torch.Tensor:
    size = min(GPU_WEIGHTS, gpu.free_bytes // 8)
    row_bytes = block_bytes(dtype, IN_FEATURES)
    return gpu.empty((max(1, size // row_bytes), row_bytes), torch.uint8).fill_(WEIGHT_BYTE)


def linear_call(
    gpu: Any, weight: torch.Tensor, dtype: str, rows: int, int8_rows: Mapping[str, int] = MappingProxyType({})
) -> Callable[[], None]:
    """A linear of so many rows over a weight that is there. int8_rows: see `gpu_kernels.rounded`; none, its own."""
    x = gpu.empty((rows, IN_FEATURES), torch.float32)
    out = gpu.empty((rows, weight.shape[0] * BLOCK_FEATURES), torch.float32)
    named = {"int8_rows": int8_rows[dtype]} if dtype in int8_rows else {}
    return lambda: gpu.ops.linear(gpu.ops.rounded(x, dtype, **named), weight, dtype, None, out)
