"""The CPU kernels of experts on one layer of Qwen3-30B-A3B: 128 experts of 2048 x 768, 8 a row.

    decode    bytes a second of scattered experts, recorded as in a decode step, other routes in every call, beside a
              plain sweep of as many bytes at random places
    prompt    operations a second of the grouped product of 512 rows, beside `linear` with the rows that an expert has,
              on weights as cold; and as many picks with 30 % of them at one expert (of eight picks of a row it can
              have one, so some rows have it more than once)

Calls are interleaved and the best of each is taken, since other programs may use the machine: trust the ratios. With
one thread CPU time is what counts.

    python examples/benchmarks/experts_cpu.py [--threads 2] [--dtypes q4,q8,mxfp4,bf16]
"""

import argparse
import time
from collections.abc import Callable

import torch

from cpu_kernels import CpuKernels
from cpu_kernels.contract import Picks
from cpu_kernels.formats import format_of
from cpu_kernels.formats.weights import WEIGHT_DTYPES

EXPERTS, PICKS, HIDDEN, WIDTH, ROWS = 128, 8, 2048, 768, 512
REPEATS = 40


def best(ops: CpuKernels, calls: dict[str, Callable[[], None]], repeats: int = REPEATS) -> dict[str, float]:
    """Fewest seconds of each call, all of them in turn."""
    clock = time.process_time if ops.num_threads == 1 else time.perf_counter
    seconds = dict.fromkeys(calls, float("inf"))
    for _ in range(repeats):
        for name, call in calls.items():
            started = clock()
            call()
            seconds[name] = min(seconds[name], clock() - started)
    return seconds


def routes(rows: int, skew: float, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """(sources, starts) of rows that choose uniformly, but for a share `skew` of all picks at expert 5."""
    scores = torch.rand(rows, EXPERTS, generator=generator)
    picks = scores.topk(PICKS, -1).indices.flatten()
    picks[torch.randperm(rows * PICKS, generator=generator)[: int(skew * rows * PICKS)]] = 5
    order = torch.sort(picks, stable=True).indices
    starts = torch.zeros(EXPERTS + 1, dtype=torch.int32)
    starts[1:] = torch.bincount(picks, minlength=EXPERTS).cumsum(0)
    return (order // PICKS).int(), starts


def weights(ops: CpuKernels, dtype: str) -> torch.Tensor:
    """gate_up of every expert, uint8 [experts, blocks, block_bytes]: the same random numbers in each, of a form of
    files bytes that are ordinary numbers as codes and as scales."""
    packed = torch.empty(2 * WIDTH // 16, format_of(dtype).block_bytes(HIDDEN), dtype=torch.uint8)
    if dtype in WEIGHT_DTYPES:
        ops.pack(torch.randn(2 * WIDTH, HIDDEN) * HIDDEN**-0.5, dtype, packed)
    else:
        packed.fill_(0x3C)
    arena = torch.empty(EXPERTS, *packed.shape, dtype=torch.uint8)
    arena[:] = packed
    return arena


def decode(ops: CpuKernels, dtype: str, arena: torch.Tensor) -> None:
    """One row: eight experts, others every call."""
    generator = torch.Generator().manual_seed(0)
    drawn = [routes(1, 0.0, generator) for _ in range(REPEATS)]
    x, out = torch.randn(1, HIDDEN), torch.empty(PICKS, 2 * WIDTH)
    size = PICKS * arena[0].numel()
    flat, places = arena.view(-1), torch.randint(0, arena.numel() - size, (REPEATS,)).tolist()

    def scattered() -> None:
        for sources, starts in drawn:
            ops.expert_linear(x, Picks(sources, starts, 0), arena, dtype, out)

    def sweep() -> None:
        for place in places:
            start = place // 64 * 64
            ops.sweep(flat[start : start + size])

    programs = {name: ops.record(calls).run for name, calls in (("experts", scattered), ("sweep", sweep))}
    rates = {name: REPEATS * size / value / 1e9 for name, value in best(ops, programs, 12).items()}
    print(
        f"{dtype:5s} decode  {rates['experts']:6.1f} GB/s, sweep {rates['sweep']:6.1f} GB/s: "
        f"{rates['experts'] / rates['sweep']:.0%}"
    )


def prompt(ops: CpuKernels, dtype: str, arena: torch.Tensor) -> None:
    """512 rows, 32 an expert on average."""
    generator = torch.Generator().manual_seed(0)
    x, out = torch.randn(ROWS, HIDDEN), torch.empty(ROWS * PICKS, 2 * WIDTH)
    even, skewed = routes(ROWS, 0.0, generator), routes(ROWS, 0.3, generator)
    rows = ROWS * PICKS // EXPERTS
    few, few_out = x[:rows], torch.empty(rows, 2 * WIDTH)

    def dense() -> None:
        for weight in arena:
            ops.linear(few, weight, dtype, None, few_out)

    calls = {
        "even": lambda: ops.expert_linear(x, Picks(*even, 0), arena, dtype, out),
        "skewed": lambda: ops.expert_linear(x, Picks(*skewed, 0), arena, dtype, out),
        "dense": dense,
    }
    seconds = best(ops, calls, 4)
    rates = {name: 2 * ROWS * PICKS * HIDDEN * 2 * WIDTH / value / 1e9 for name, value in seconds.items()}
    print(
        f"{dtype:5s} prompt  {rates['even']:6.0f} Gop/s, dense of {rows} rows {rates['dense']:6.0f} Gop/s: "
        f"{rates['even'] / rates['dense']:.0%}; with 30 % at one expert {rates['skewed'] / rates['even']:.0%} of that"
    )


def main() -> None:
    """Measure every dtype."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtypes", default="q4,q8,mxfp4,bf16")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with CpuKernels(options.threads) as ops:
        for dtype in options.dtypes.split(","):
            arena = weights(ops, dtype)
            decode(ops, dtype, arena)
            prompt(ops, dtype, arena)


if __name__ == "__main__":
    main()
