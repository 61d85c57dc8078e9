"""Predicted against measured speed over many configurations: does the planner's cost model tell the truth?

    python examples/benchmarks/prediction.py [--out FILE.json] [--rows NAME ...] [--large DIRECTORY]

Rows on the CPU lane run as they are. Rows with three lanes run over `paced_driver`: a GPU and a bus that keep set rates
beside the real CPU lane, real Python and real hand-overs, with one CPU thread, so that the threads which stand for the
GPU do not take the CPU lane's cores. Rates are measured anew, because shared machines drift by a half within seconds:
the profile before every group of rows, the rates of DRAM and of arithmetic beside every figure. Nothing is fitted.
Models have random weights of several shapes (models/random_checkpoint.py), the shipped tiny one, and with --large one
more that is made beforehand. The last line is JSON.
"""

import argparse
import json
import platform
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import psutil
import torch
from growth import busy_seconds, others_share
from models.random_checkpoint import Shape, write_checkpoint
from simulated.paced_driver import PacedDriver

from cpu_kernels import CpuKernels
from hetero_attn.engine.build import assemble, build_engine
from hetero_attn.engine.engine import Engine
from hetero_attn.engine.runtime_costs import lanes_over, with_runtime_costs
from hetero_attn.planning.options import LoadOptions
from hetero_attn.planning.profiles import host_memory_bytes
from hetero_attn.planning.settle import PlannedModel, settle
from hetero_attn.tools.bench import measure as bench
from placement.cost.model import predict
from placement.machine.hardware import HardwareProfile
from placement.machine.rates import DtypeRates, seconds_per_operation_of_a_row, weight_bytes_of
from placement.profilers.cpu import measure as measure_cpu
from placement.profilers.cpu_linear import IN_FEATURES, MANY_WEIGHTS, SWEEP_BYTES, linear_call, packed, shape
from placement.profilers.timing import host_memory, seconds

HERE = Path(__file__).resolve().parent
TINY = HERE.parent / "tiny"
SHAPES = {
    "20m": Shape(512, 6, 8, 4, 64, 1536, 8192, 8192),
    "180m": Shape(1024, 12, 16, 8, 64, 3584, 16_384, 8192),
}
# What the paced GPU keeps to: about eight times the CPU lane's memory rate, and a narrow bus.
PACED = {
    "h2d_bytes_per_s": 6e9,
    "d2h_bytes_per_s": 6e9,
    "gpu_bytes_per_s": 120e9,
    "gpu_flops": DtypeRates(2e12, 2e12, 2e12, 2e12),
    "gpu_attention_ops_per_s": 1e12,
    "gpu_memory_bytes": 8 << 30,
}
GEMM_ROWS = 128
PHASES = ("prefill", "decode")
REPETITIONS = 3
# Other processes' share of the cores above which a row says nothing and is measured again.
DISTURBED = 0.08
# By how much the DRAM rate may change while a figure is measured.
DRIFT = 0.1
ATTEMPTS = 4


@dataclass(frozen=True, slots=True)
class Row:
    """One configuration. budget: GPU bytes as a share of the model's weights, None on the CPU."""

    name: str
    model: str
    dtype: str
    depth: int = 0
    budget: float | None = None
    policy: str = "auto"
    prompt: int = 256
    tokens: int = 24


ROWS = (
    Row("cpu tiny bf16", "tiny", "bf16"),
    Row("cpu tiny q4 d1500", "tiny", "q4", 1500),
    Row("cpu 20m fp32", "20m", "fp32"),
    Row("cpu 20m q8 d4000", "20m", "q8", 4000),
    Row("cpu 180m bf16", "180m", "bf16"),
    Row("cpu 180m q8 d2000", "180m", "q8", 2000),
    Row("cpu 180m q4", "180m", "q4"),
    Row("cpu 180m fp32", "180m", "fp32"),
    Row("paced 180m bf16 budget 30%", "180m", "bf16", 0, 0.3),
    Row("paced 180m bf16 budget 70%", "180m", "bf16", 1000, 0.7),
    Row("paced 180m q4 budget 40%", "180m", "q4", 0, 0.4),
    Row("paced 180m q8 host attention d2000", "180m", "q8", 2000, 0.6, "host_attention"),
    Row("paced 180m bf16 all streamed", "180m", "bf16", 0, 0.8, "stream_only"),
    Row("paced 180m fp32 no weight on the GPU", "180m", "fp32", 500, 0.5, "cpu_only"),
)
LARGE_ROWS = (
    Row("cpu large bf16", "large", "bf16", 0, tokens=12),
    Row("cpu large bf16 d4000", "large", "bf16", 4000, tokens=12),
)


def machine(lanes: str) -> HardwareProfile:
    """Rates of this machine now: all its cores for the CPU alone, one beside the paced GPU."""
    cores = psutil.cpu_count(logical=False) or 1
    threads = cores if lanes == "cpu" else max(1, cores - 1)
    profile = measure_cpu(cores, host_memory_bytes(), threads=threads)
    if lanes == "cpu":
        return with_runtime_costs(profile, "cpu")
    paced = replace(profile, name="paced", **PACED)
    return with_runtime_costs(paced, "emulated", lambda: PacedDriver(paced))


def planned(row: Row, path: Path, hardware: HardwareProfile) -> PlannedModel:
    """The plan of a row."""
    device = "cpu" if row.budget is None else "emulated"
    context = row.depth + row.prompt + 64
    wishes = LoadOptions(
        model=path,
        dtype=row.dtype,
        device="cpu",
        hardware=hardware,
        max_context=context,
        max_batch=1,
        num_threads=hardware.cores,
    )
    plan = settle(wishes)
    if device == "cpu":
        return plan
    budget = int(row.budget * plan.plan.workload.weight_bytes) + (64 << 20)
    return settle(replace(wishes, policy=row.policy, gpu_memory=budget, device=device))


def run(row: Row, path: Path, hardware: HardwareProfile) -> list[dict[str, object]]:
    """Both phases of a row, predicted and measured, with every term."""
    plan = planned(row, path, hardware)
    if row.budget is None:
        engine = build_engine(plan)
    else:
        engine = assemble(plan, lanes_over(plan.plan, PacedDriver(hardware)))
    try:
        turns = [turn(row, plan, engine, hardware) for _ in range(REPETITIONS)]
    finally:
        engine.close()
    return [middle([figures[phase] for figures in turns]) for phase in PHASES]


def turn(row: Row, plan: PlannedModel, engine: Engine, hardware: HardwareProfile) -> dict[str, dict[str, object]]:
    """Both phases once, each beside the prediction for the DRAM rate of that moment; again if others disturbed it."""
    ops, figures = engine.lanes.host_ops, {}
    for phase, (prompt, tokens) in zip(PHASES, ((row.prompt, 0), (0, row.tokens)), strict=True):
        for _ in range(ATTEMPTS):
            before, swept = busy_seconds(), dram_rate(ops)
            arithmetic = arithmetic_rate(ops, row.dtype) / yardstick(hardware, row.dtype)
            now = replace(plan, hardware=hardware.as_now(swept, arithmetic))
            figure = bench(now, engine, prompt, tokens, (row.depth,), 1).to_dict()["rows"][0]
            others = others_share(before, busy_seconds())
            again = dram_rate(ops)
            figure |= predicted(row, plan, hardware.as_now((swept + again) / 2, arithmetic), phase, figure)
            if others < DISTURBED and abs(swept / again - 1) < DRIFT:
                break
        figures[phase] = {
            "row": row.name,
            "phase": phase,
            "others": others,
            "dram_bytes_per_s": swept,
            "arithmetic": arithmetic,
            **figure,
        }
    return figures


def predicted(
    row: Row, plan: PlannedModel, hardware: HardwareProfile, phase: str, figure: dict[str, object]
) -> dict[str, object]:
    """The prediction for rates between those before and those after the measurement."""
    rows, context = (row.prompt, row.depth) if phase == "prefill" else (1, row.depth + row.tokens // 2)
    made, on_gpu = plan.plan, row.budget is not None
    cost = predict(
        made.workload, made.linears, made.kv, hardware, phase=phase, rows=rows, context=context, on_gpu=on_gpu
    )
    error = cost.tokens_per_s / figure["tokens_per_s"] - 1
    return {"predicted_tokens_per_s": cost.tokens_per_s, "prediction_error": error}


def middle(figures: list[dict[str, object]]) -> dict[str, object]:
    """The turn whose error is the median."""
    return sorted(figures, key=lambda figure: figure["prediction_error"])[len(figures) // 2]


def dram_rate(ops: CpuKernels) -> float:
    """What a plain read of memory reaches just now."""
    memory = torch.ones(SWEEP_BYTES, dtype=torch.uint8)
    return SWEEP_BYTES / seconds(lambda: ops.sweep(memory))


def arithmetic_rate(ops: CpuKernels, dtype: str) -> float:
    """Operations a second of a linear with many rows just now."""
    weight = packed(dtype, host_memory(int(MANY_WEIGHTS * weight_bytes_of(dtype))))
    work, _ = shape(weight, dtype)
    return GEMM_ROWS * work / seconds(linear_call(ops, weight, dtype, GEMM_ROWS), 3)


def yardstick(hardware: HardwareProfile, dtype: str) -> float:
    """The same by the profile."""
    work, activations = 2 * MANY_WEIGHTS, IN_FEATURES + MANY_WEIGHTS / IN_FEATURES
    taken = work * seconds_per_operation_of_a_row(hardware.cpu_rows, GEMM_ROWS, dtype)
    return GEMM_ROWS * work / (taken + GEMM_ROWS * activations * hardware.cpu_activation_s.of(dtype))


def groups(rows: tuple[Row, ...]) -> Iterator[tuple[str, list[Row]]]:
    """Rows of the same model, dtype and lanes together, so that their rates are measured together."""
    keyed: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        keyed.setdefault(("cpu" if row.budget is None else "paced", row.model), []).append(row)
    for (lanes, _), members in keyed.items():
        yield lanes, members


def line(figure: dict[str, object]) -> str:
    """One figure for people."""
    return (
        f"{figure['row']:38s} {figure['phase']:8s} predicted {figure['predicted_tokens_per_s']:9.1f}  "
        f"measured {figure['tokens_per_s']:9.1f}  error {figure['prediction_error']:+6.1%}"
    )


def medians(figures: list[dict[str, object]]) -> dict[str, float]:
    """Median absolute error by phase."""
    return {
        phase: statistics.median(abs(f["prediction_error"]) for f in figures if f["phase"] == phase)
        for phase in ("decode", "prefill")
    }


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="also write the result here, as JSON")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="rows whose names contain one of these")
    parser.add_argument("--large", type=Path, help="a checkpoint of random_checkpoint.py for two more rows")
    parser.add_argument("--models", type=Path, help="where the random checkpoints are made and kept")
    parser.add_argument("--only-make", action="store_true", help="make the checkpoints and stop")
    parser.add_argument("--terms", action="store_true", help="print the terms of every figure too")
    return parser.parse_args()


def checkpoints(options: argparse.Namespace, rows: tuple[Row, ...], folder: Path) -> dict[str, Path]:
    """Directories by model name; random ones are made where they are missing."""
    paths = {"tiny": TINY, "large": options.large}
    for name in {row.model for row in rows} & set(SHAPES):
        paths[name] = (options.models or folder) / name
        if not (paths[name] / "config.json").exists():
            write_checkpoint(SHAPES[name], paths[name])
    return paths


def main() -> None:
    """Measure the rows that were asked for."""
    options = parse_options()
    rows = ROWS + (LARGE_ROWS if options.large else ())
    rows = tuple(row for row in rows if not options.rows or any(part in row.name for part in options.rows))
    figures, profiles = [], []
    with tempfile.TemporaryDirectory() as folder:
        paths = checkpoints(options, rows, Path(folder))
        for lanes, members in groups(()) if options.only_make else groups(rows):
            hardware = machine(lanes)
            profiles.append({"lanes": lanes, "rows": [row.name for row in members], "profile": hardware.to_dict()})
            for row in members:
                for figure in run(row, paths[row.model], hardware):
                    figures.append(figure)
                    print(line(figure), flush=True)
                    for term in figure["terms"] if options.terms else ():
                        measured = float("nan") if term["measured_s"] is None else term["measured_s"]
                        print(f"    {term['name']:14s} {1e3 * term['predicted_s']:9.3f} {1e3 * measured:9.3f} ms")
    if not figures:
        return
    record = {
        "benchmark": "prediction",
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": profiles[0]["profile"]["name"],
        "system": platform.platform(),
        "rows": {row.name: asdict(row) for row in rows},
        "median_error": medians(figures),
        "figures": figures,
        "profiles": profiles,
    }
    print(
        f"median error: decode {record['median_error']['decode']:.1%}, prefill {record['median_error']['prefill']:.1%}"
    )
    if options.out:
        options.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({key: record[key] for key in ("benchmark", "time", "median_error")}))


if __name__ == "__main__":
    main()
