"""A context that grows from one token to 32k: is the answer exact, does the budget hold, is the speed as predicted?

    python examples/benchmarks/growth.py --out FILE.json

Two runs over toy models of random weights, each looked at in 20 places between the first token and the last:

exact   three lanes on the emulated device, under a GPU budget whose cache holds a few per cent of the final one. Logits
        are compared with those of the CPU lane alone, the squared error over the square (NMSE); the most bytes ever in
        use are compared with the budget. fp32 and bf16.
speed   the CPU lane, whose cache grows until it outweighs the weights: seconds of a decode step beside the curve that
        the cost model draws from this machine's profile. The cache is filled with random keys and values. The emulated
        device is not timed: its GPU lane runs at the speed of plain torch, which says nothing.

The profile is the kept one (`hetero-attn profile`), or is measured first. On a machine shared with others memory may be
half as fast a second later, which no profile knows. So every timed step lies between two plain reads of as many bytes
as it reads itself, and is compared with what the same cost model predicts for memory as fast as these reads found it
(`HardwareProfile.as_now`; nothing is fitted to the steps). The error of the prediction as the profile stands is printed
beside it: where the two differ, the machine has changed. The last line is one line of JSON.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil
import torch
from models.random_checkpoint import Shape, write_checkpoint

from hetero_attn import LLM, HardwareProfile, Policy
from hetero_attn.engine.measure import profile_machine
from hetero_attn.engine.timed_steps import fill
from hetero_attn.planning.profiles import stored_profile
from hetero_attn.planning.settle import plan_model
from placement.cost.model import predict, working_set_bytes
from placement.profilers.timing import host_memory

EXACT = Shape(64, 2, 4, 2, 32, 128, 512, 32_768)
SPEED = Shape(1536, 8, 24, 8, 64, 4096, 4096, 32_768)
CHUNK = 512
NMSE_LIMITS = {"fp32": 1e-10, "bf16": 1e-4}
SPEED_LIMIT = 0.25
STEPS = 12
WARM_STEPS = 100  # the first second of a process, in which memory is still being mapped
# The cache of both KV heads is the GPU's, 1024 tokens of it stay there; every lane has columns to compute.
SPLIT = f"""
prefill_chunk: {CHUNK}
batch: 1
rules:
  - {{match: layers.*.kv, kv: {{gpu_heads: all, gpu_tokens: 1024}}}}
  - {{match: "*", gpu: 0.4, stream: 0.3, cpu: 0.3}}
"""


@dataclass(frozen=True, slots=True)
class Exactness:
    """Of one dtype. cache_share: of the final cache, in GPU memory; nmse: at each checkpoint."""

    dtype: str
    budget_bytes: int
    peak_bytes: int
    cache_share: float
    nmse: tuple[float, ...]

    @property
    def is_met(self) -> bool:
        """Whether every checkpoint is exact enough and the budget held."""
        return max(self.nmse) <= NMSE_LIMITS[self.dtype] and self.peak_bytes <= self.budget_bytes


@dataclass(frozen=True, slots=True)
class Speed:
    """One checkpoint: seconds of a decode step, the median of several, and what was predicted.

    predicted_s: by the profile as it stands; predicted_now_s: for memory that is read at swept_bytes_per_s, the median
    of what the plain reads around the steps reached. error_now: the median of every step's own, as memory may change
    its
    speed between two of them. others: share of the cores that other processes took meanwhile.
    """

    tokens: int
    measured_s: float
    predicted_s: float
    swept_bytes_per_s: float
    predicted_now_s: float
    error_now: float
    others: float

    @property
    def error(self) -> float:
        """Of the prediction by the profile as it stands, over the measurement."""
        return self.predicted_s / self.measured_s - 1


def busy_seconds() -> tuple[float, float, float]:
    """Wall time, busy seconds of all cores, busy seconds of this process."""
    busy, own = psutil.cpu_times(), psutil.Process().cpu_times()
    total = sum(busy) - busy.idle - getattr(busy, "iowait", 0.0) - getattr(busy, "guest", 0.0)
    return time.perf_counter(), total, own.user + own.system


def others_share(before: tuple[float, float, float], after: tuple[float, float, float]) -> float:
    """Share of all cores that other processes used between two `busy_seconds`."""
    wall, busy, own = (end - start for start, end in zip(before, after, strict=True))
    return max(0.0, busy - own) / (wall * (psutil.cpu_count() or 1))


def checkpoints(context: int, count: int = 20) -> list[int]:
    """Token counts from 1 to `context`, each about the same factor above the one before."""
    return sorted({max(i + 1, round(context ** (i / (count - 1)))) for i in range(count - 1)} | {context})


def logits_along(llm: LLM, token_ids: list[int], places: list[int]) -> Iterator[torch.Tensor]:
    """Grow one sequence by prompt chunks, and by one decode step where it is looked at; logits of those steps."""
    engine = llm.engine
    sequence = engine.kv_cache.open()
    for place in places:
        while sequence.length < place - 1:
            stop = min(sequence.length + engine.prefill_chunk, place - 1)
            engine.prefill(sequence, token_ids[sequence.length : stop])
        yield engine.decode_step([sequence], [token_ids[place - 1]])[0].clone()
    engine.kv_cache.close(sequence)


def exactness(path: Path, dtype: str, context: int) -> Exactness:
    """Compare the three lanes with the CPU alone while a sequence grows."""
    generator = torch.Generator().manual_seed(0)
    token_ids = torch.randint(EXACT.vocab_size, (context,), generator=generator).tolist()
    places, policy = checkpoints(context), Policy.parse(SPLIT)
    budget = plan_model(path, policy, "1GiB", dtype, "emulated", max_context=context).memory.gpu_bytes
    with LLM(path, dtype=dtype, device="cpu", max_context=context, max_batch=1, progress=False) as alone:
        expected = list(logits_along(alone, token_ids, places))
    with LLM(path, policy, budget, dtype, "emulated", context, progress=False) as llm:
        errors = [
            nmse(actual, wanted) for actual, wanted in zip(logits_along(llm, token_ids, places), expected, strict=True)
        ]
        kept = llm.plan.kv[0].gpu_tokens / context
        return Exactness(dtype, budget, llm.engine.lanes.device.arena.peak_bytes, kept, tuple(errors))


def nmse(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Squared error over squared norm."""
    return ((actual.double() - expected.double()).pow(2).sum() / expected.double().pow(2).sum()).item()


def speeds(path: Path, context: int, hardware: HardwareProfile) -> list[Speed]:
    """Time decode steps at every checkpoint of a growing sequence."""
    with LLM(
        path, dtype="bf16", device="cpu", max_context=context, max_batch=1, hardware=hardware, progress=False
    ) as llm:
        sequence = llm.engine.kv_cache.open()
        memory = host_memory(working_set_bytes(llm.plan.workload, context))
        rows = []
        for place in checkpoints(context - STEPS):
            fill(llm.engine, sequence, max(0, place - sequence.length))
            for _ in range(1 if rows else WARM_STEPS):
                llm.engine.decode_step([sequence], [1])
                llm.engine.kv_cache.rewind(sequence, place)
            read = memory[: working_set_bytes(llm.plan.workload, place)]
            before = busy_seconds()
            turns = _turns(llm, sequence, read)
            rows.append(_speed(llm, place, turns, others_share(before, busy_seconds())))
            llm.engine.kv_cache.rewind(sequence, place)
        return rows


def _turns(llm: LLM, sequence: object, memory: torch.Tensor) -> list[tuple[float, float]]:
    """Seconds of each of several decode steps, and bytes a second of the plain reads before and after it."""

    def clock(work: Callable[[], object]) -> float:
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    def sweep() -> None:
        llm.engine.lanes.host_ops.sweep(memory)

    turns, before = [], clock(sweep)
    for _ in range(STEPS):
        step = clock(lambda: llm.engine.decode_step([sequence], [1]))
        after = clock(sweep)
        turns.append((step, 2 * memory.nbytes / (before + after)))
        before = after
    return turns


def _speed(llm: LLM, place: int, turns: list[tuple[float, float]], others: float) -> Speed:
    """A checkpoint of its turns."""
    hardware, context = llm.planned.hardware, place + STEPS // 2
    measured, swept = (statistics.median(values) for values in zip(*turns, strict=True))
    errors = [_predicted_s(llm, context, hardware.as_now(rate)) / step - 1 for step, rate in turns]
    predicted = [_predicted_s(llm, context, machine) for machine in (hardware, hardware.as_now(swept))]
    return Speed(place, measured, predicted[0], swept, predicted[1], statistics.median(errors), others)


def _predicted_s(llm: LLM, context: int, hardware: HardwareProfile) -> float:
    plan = llm.plan
    arguments = (plan.workload, plan.linears, plan.kv, hardware)
    return predict(*arguments, phase="decode", rows=1, context=context, on_gpu=False).seconds


def main() -> None:
    """Run both parts, print tables, write the record."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--context", type=int, default=EXACT.max_positions)
    parser.add_argument("--parts", nargs="+", choices=("exact", "speed"), default=("exact", "speed"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    record = {"context": options.context, "date": datetime.now(UTC).isoformat(timespec="seconds")}
    record |= {"machine": platform.machine(), "torch": torch.__version__}
    with tempfile.TemporaryDirectory(prefix="hetero-attn-growth-") as folder:
        for part in options.parts:
            write_checkpoint({"exact": EXACT, "speed": SPEED}[part], Path(folder) / part)
        os.sync()  # what is still being written back takes time from the first steps
        if "exact" in options.parts:
            record["exact"] = [
                report_exactness(exactness(Path(folder) / "exact", dtype, options.context)) for dtype in NMSE_LIMITS
            ]
        if "speed" in options.parts:
            hardware = stored_profile() or profile_machine(save=False)
            record |= report_speed(speeds(Path(folder) / "speed", options.context, hardware), hardware)
    line = json.dumps(record)
    if options.out:
        options.out.write_text(line + "\n")
    print(line)


def report_exactness(found: Exactness) -> dict[str, object]:
    """Print one dtype's line; returns its record."""
    print(
        f"exact {found.dtype}: worst NMSE {max(found.nmse):.1e} of {len(found.nmse)} checkpoints "
        f"(limit {NMSE_LIMITS[found.dtype]:.0e}), {found.cache_share:.1%} of the final cache on the GPU, "
        f"peak {found.peak_bytes} of {found.budget_bytes} bytes: {'met' if found.is_met else 'MISSED'}",
        flush=True,
    )
    return asdict(found) | {"is_met": found.is_met}


def report_speed(rows: list[Speed], hardware: HardwareProfile) -> dict[str, object]:
    """Print the curve; returns its record."""
    print(
        f"memory by the profile: {hardware.sweep_bytes_per_s / 1e9:.1f} GB/s; `now` as it was read beside the steps; "
        "others: what other processes took of the cores"
    )
    headings = f"{'tokens':>8}{'measured ms':>13}{'predicted ms':>14}{'error':>8}"
    print(f"{headings}{'GB/s now':>10}{'predicted':>11}{'error':>8}{'others':>8}")
    for row in rows:
        cells = f"{row.tokens:>8}{1e3 * row.measured_s:>13.3f}{1e3 * row.predicted_s:>14.3f}{row.error:>+8.0%}"
        now = f"{row.swept_bytes_per_s / 1e9:>10.1f}{1e3 * row.predicted_now_s:>11.3f}{row.error_now:>+8.0%}"
        print(f"{cells}{now}{row.others:>8.0%}")
    worst = {
        "worst_error": max(abs(row.error) for row in rows),
        "worst_error_now": max(abs(row.error_now) for row in rows),
    }
    for name, error in worst.items():
        print(f"{name} {error:.0%} (limit {SPEED_LIMIT:.0%}): {'met' if error <= SPEED_LIMIT else 'MISSED'}")
    curve = [asdict(row) | {"error": row.error} for row in rows]
    about = {"threads": hardware.cores, "hardware": hardware.name, "swept_bytes_per_s": hardware.sweep_bytes_per_s}
    return {"speed": curve, **worst, **about}


if __name__ == "__main__":
    main()
