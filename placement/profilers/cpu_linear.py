"""Rates of the CPU lane's linears: by dtype, by rows, by threads, from DRAM and from the cache."""

from collections.abc import Callable, Sequence

import torch

from cpu_kernels import CpuKernels
from cpu_kernels.formats.weights import BLOCK_FEATURES, block_bytes
from placement.machine.rates import DtypeRates, RowRate, ThreadRate, weight_bytes_of
from placement.profilers.timing import (
    CALLS,
    FLOAT32,
    MOST_PARTS,
    Progress,
    in_rotation,
    least_seconds,
    parts_for,
    recorded_seconds,
    seconds,
    turn_by_turn,
)

# Many times what a few cores get of a last-level cache, so that none of it is found again; where the cache is larger
# than that (servers have some of 300 MiB), CACHES of it.
SWEEP_BYTES = 256 << 20
CACHED_BYTES = 4 << 20
IN_FEATURES = 2048
ROW_COUNTS = (1, 2, 4, 5, 8, 16, 17, 32, 64, 65, 128, 512)
MANY_WEIGHTS = 16 << 20  # weights of the linear with many rows
MANY_ROWS = 256
SMALL_LINEAR = 512  # inputs of one that is mostly activations


def thread_sweep(counts: tuple[int, ...], memory: torch.Tensor, on_progress: Progress) -> tuple[ThreadRate, ...]:
    """A one-row q4 linear and a plain read of the same bytes with every thread count. memory: more than caches keep."""
    weight, rates = packed("q4", memory), []
    for threads in counts:
        on_progress(f"{threads} threads")
        with CpuKernels(threads) as ops:
            linear = seconds(linear_call(ops, weight, "q4", 1))
            sweep = seconds(lambda ops=ops: ops.sweep(weight))
        rates.append(ThreadRate(threads, weight.numel() / linear, weight.numel() / sweep))
    return tuple(rates)


def share_of_sweep(ops: CpuKernels, dtype: str, memory: torch.Tensor, on_progress: Progress) -> float:
    """Rate of a one-row linear that is larger than the cache, as a share of a plain read of the same bytes.

    Turn by turn: where others use the same memory its speed changes within seconds, this share does not.
    """
    on_progress(f"linear {dtype}, one row")
    weight = packed(dtype, memory)
    parts = _parts(ops, weight, dtype, 1)
    sweeps = [lambda part=part: ops.sweep(part) for part in cut(weight, parts)]
    return turn_by_turn(_in_parts(ops, weight, dtype, 1, parts), in_rotation(sweeps, parts // 2))


def activation_s(ops: CpuKernels, formats: Sequence[str], memory: torch.Tensor, on_progress: Progress) -> DtypeRates:
    """Seconds of a linear per activation, in or out, of a row: rounding them, writing them.

    From a wide and a small linear, whose times are operations / rate + rows * (inputs + outputs) * this.
    """
    found = {}
    for dtype in formats:
        on_progress(f"linear {dtype}, small and wide")
        wide, small = many_weights(dtype, memory), packed(dtype, memory, SMALL_LINEAR)
        parts = _parts(ops, wide, dtype, MANY_ROWS)
        calls = _in_parts(ops, wide, dtype, MANY_ROWS, parts), linear_call(ops, small, dtype, MANY_ROWS)
        times = [least_seconds(call) / MANY_ROWS for call in calls]
        (work, values), (less, fewer) = (shape(weight, dtype) for weight in (cut(wide, parts)[0], small))
        found[dtype] = max(0.0, (times[1] * work - times[0] * less) / (fewer * work - values * less))
    return DtypeRates.of_formats(found)


def row_rates(
    ops: CpuKernels, few: DtypeRates, activations: DtypeRates, memory: torch.Tensor, on_progress: Progress
) -> tuple[RowRate, ...]:
    """Operations a second by row count, activations apart, of the formats of `few`, bytes of weights a second, which
    is what one row takes."""
    times: dict[str, list[float]] = {}
    for dtype in few.by_format:
        on_progress(f"linear {dtype} by rows")
        # Few rows read the weight from memory, so it must not fit in the cache; many reuse it while they compute.
        large, small = packed(dtype, memory), many_weights(dtype, memory)
        times[dtype] = [large.numel() / few.of(dtype) / shape(large, dtype)[0]]
        for rows in ROW_COUNTS[1:]:
            weight = large if rows < 32 else small
            parts = _parts(ops, weight, dtype, rows)
            part, call = cut(weight, parts)[0], _in_parts(ops, weight, dtype, rows, parts)
            if rows < 8:  # while memory decides, time is known as a multiple of one row's, whatever else uses it now
                one_row = _in_parts(ops, weight, dtype, 1, parts, parts // 2)
                taken = part.numel() / few.of(dtype) / turn_by_turn(call, one_row)
            else:
                taken = seconds(call)
            work, values = shape(part, dtype)
            times[dtype].append(max(0.5 * taken, taken - rows * values * activations.of(dtype)) / work)
    return tuple(
        RowRate(rows, DtypeRates.of_formats({dtype: rows / taken[i] for dtype, taken in times.items()}))
        for i, rows in enumerate(ROW_COUNTS)
    )


def cached_rates(ops: CpuKernels, formats: Sequence[str], memory: torch.Tensor, on_progress: Progress) -> DtypeRates:
    """Weight bytes a second of one row when they stay in the cache."""
    on_progress("linears in the cache")
    cached = {}
    for dtype in formats:
        weight = packed(dtype, memory[:CACHED_BYTES])
        cached[dtype] = weight.numel() / recorded_seconds(ops, linear_call(ops, weight, dtype, 1), CALLS)
    return DtypeRates.of_formats(cached)


def packed(dtype: str, memory: torch.Tensor, square: int | None = None) -> torch.Tensor:
    """A packed weight, uint8 [blocks, block_bytes], in all of `memory` with IN_FEATURES inputs; or a square one."""
    row_bytes = block_bytes(dtype, square or IN_FEATURES)
    blocks = square // BLOCK_FEATURES if square else memory.numel() // row_bytes
    return memory[: blocks * row_bytes].view(blocks, row_bytes)


def many_weights(dtype: str, memory: torch.Tensor) -> torch.Tensor:
    """A packed weight of MANY_WEIGHTS."""
    return packed(dtype, memory[: int(MANY_WEIGHTS * weight_bytes_of(dtype))])


def cut(weight: torch.Tensor, parts: int) -> list[torch.Tensor]:
    """A packed weight's blocks in so many equal parts; what is left over goes to none."""
    return list(weight.split(max(1, weight.shape[0] // parts))[:parts])


def _parts(ops: CpuKernels, weight: torch.Tensor, dtype: str, rows: int) -> int:
    """How many parts to cut a packed weight into for calls of `linear` with so many rows."""
    return parts_for(linear_call(ops, cut(weight, MOST_PARTS)[0], dtype, rows))


def _in_parts(
    ops: CpuKernels, weight: torch.Tensor, dtype: str, rows: int, parts: int, first: int = 0
) -> Callable[[], None]:
    """A call of `linear` over one part of a packed weight after the other, from part `first` on."""
    return in_rotation([linear_call(ops, part, dtype, rows) for part in cut(weight, parts)], first)


def inputs_of(weight: torch.Tensor, dtype: str) -> int:
    """Input features of a packed weight of this module."""
    return IN_FEATURES if weight.shape[1] == block_bytes(dtype, IN_FEATURES) else SMALL_LINEAR


def shape(weight: torch.Tensor, dtype: str) -> tuple[int, int]:
    """Operations of one row (multiplications plus additions), and its activations, in and out."""
    inputs, outputs = inputs_of(weight, dtype), weight.shape[0] * BLOCK_FEATURES
    return 2 * inputs * outputs, inputs + outputs


def linear_call(ops: CpuKernels, weight: torch.Tensor, dtype: str, rows: int) -> Callable[[], None]:
    """A call of `linear` over a packed weight, ready to be timed or recorded."""
    x = torch.randn(rows, inputs_of(weight, dtype), **FLOAT32)
    out = torch.empty(rows, weight.shape[0] * BLOCK_FEATURES, **FLOAT32)
    return lambda: ops.linear(x, weight, dtype, None, out)
