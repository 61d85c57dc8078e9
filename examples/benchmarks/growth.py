"""A context that grows from one token to 32k: is the answer exact, does the budget hold, is the speed as predicted?

    python growth.py --out FILE.json

Two runs over toy models of random weights, each looked at in 20 places between the first token and the last:

exact   three lanes on the emulated device, under a GPU budget whose cache holds a few per cent of the final one. Logits
        are compared with those of the CPU lane alone, the squared error over the square (NMSE); the most bytes ever in
        use are compared with the budget. fp32 and bf16.
speed   the CPU lane, whose cache grows until it outweighs the weights: seconds of a decode step beside the curve that the
        cost model draws from this machine's profile. The cache is filled with random keys and values. The emulated
        device is not timed: its GPU lane runs at the speed of plain torch, which says nothing.

The profile is the kept one (`hetero-attn profile`), or is measured first. On a machine shared with others its memory may
be half as fast a minute later, which moves the whole curve; so the error of the curve as predicted is printed, and beside
it that of its shape: the same curve, scaled to the median of the measurements. The last line is one line of JSON.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import torch
from random_checkpoint import Shape, write_checkpoint

from hetero_attn import LLM, HardwareProfile, Policy
from hetero_attn.planning import plan_model
from hetero_attn.profiles import profile_machine, stored_profile
from placement.cost import predict

EXACT = Shape(64, 2, 4, 2, 32, 128, 512, 32_768)
SPEED = Shape(1536, 8, 24, 8, 64, 4096, 4096, 32_768)
CHUNK = 512
NMSE_LIMITS = {"fp32": 1e-10, "bf16": 1e-4}
SPEED_LIMIT = 0.25
STEPS = 12
WARM_STEPS = 100  # the first second of a process, in which memory is still being mapped
# The cache of both KV-head groups is the GPU's, 1024 tokens of it stay there; every lane has columns to compute.
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
    """One checkpoint: seconds of a decode step, the median of several, and what was predicted."""

    tokens: int
    measured_s: float
    predicted_s: float

    @property
    def error(self) -> float:
        """Of the prediction, over the measurement."""
        return self.predicted_s / self.measured_s - 1


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
        rows = []
        for place in checkpoints(context - STEPS):
            llm.engine.fill(sequence, max(0, place - sequence.length))
            for _ in range(1 if rows else WARM_STEPS):
                llm.engine.decode_step([sequence], [1])
                llm.engine.kv_cache.rewind(sequence, place)
            rows.append(Speed(place, _step_s(llm, sequence), _predicted_s(llm, place + STEPS // 2)))
            llm.engine.kv_cache.rewind(sequence, place)
        return rows


def _step_s(llm: LLM, sequence: object) -> float:
    times = []
    for _ in range(STEPS):
        started = time.perf_counter()
        llm.engine.decode_step([sequence], [1])
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def _predicted_s(llm: LLM, context: int) -> float:
    plan, hardware = llm.plan, llm.planned.hardware
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
    scale = statistics.median(row.measured_s / row.predicted_s for row in rows)
    shape = [replace(row, predicted_s=scale * row.predicted_s).error for row in rows]
    print(f"{'tokens':>8}{'measured ms':>13}{'predicted ms':>14}{'error':>8}{'of shape':>10}")
    for row, error in zip(rows, shape, strict=True):
        cells = f"{row.tokens:>8}{1e3 * row.measured_s:>13.3f}{1e3 * row.predicted_s:>14.3f}"
        print(f"{cells}{row.error:>+8.0%}{error:>+10.0%}")
    worst = {"worst_error": max(abs(row.error) for row in rows), "worst_shape_error": max(map(abs, shape))}
    for name, error in worst.items():
        print(f"{name} {error:.0%} (limit {SPEED_LIMIT:.0%}): {'met' if error <= SPEED_LIMIT else 'MISSED'}")
    curve = [asdict(row) | {"error": row.error} for row in rows]
    return {"speed": curve, **worst, "threads": hardware.cores, "hardware": hardware.name}


if __name__ == "__main__":
    main()
