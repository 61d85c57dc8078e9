"""The runs of whole models on an H100 that examples/benchmarks/results/gpu keeps, as plans, profiles and figures.

A result holds the table that its plan printed. From that and the shape of the model the plan itself comes back: units
of every linear in decode and for many rows, and the cache in GPU memory.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hetero_attn.models.decoder import decoder
from hetero_attn.spec.config import ModelConfig
from hetero_attn.spec.workload import Sizes, build_workload
from placement.machine.hardware import HardwareProfile
from placement.plan.memory import KvPlacement, LinearPlacement
from placement.plan.plan import Means, Plan, build_plan
from placement.plan.workload import NUM_ROW_TIERS, Workload

RESULTS = Path(__file__).resolve().parents[3] / "examples/benchmarks/results/gpu"
CONTEXT, PAGE_TOKENS = 4097, 64
FIGURES = ("decode", "pp512", "pp4096", "memory")
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 14_336,
    "vocab_size": 128_256,
    "max_position_embeddings": 131_072,
    "rope_theta": 500_000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}  # fmt: skip
LINEAR = re.compile(
    r"^(head|layers\.(\d+)(?:-(\d+))?\.(\w+))\s+\d+\s+\d+\s+(\d+)\s+(\d+)/(\d+)/(\d+)\s+(\d+)/(\d+)/(\d+)\s"
)
KV = re.compile(r"^layers\.(\d+)-(\d+)\.kv\s+\d+\s+\d+\s+(\d+) \((\d+) tok\)")


@dataclass(frozen=True, slots=True)
class RecordedRun:
    """A model as it was loaded then. measured: results by figure, one of FIGURES."""

    name: str
    plan: Plan
    profile: HardwareProfile
    measured: dict[str, dict[str, Any]]


def recorded_runs(
    file: str = "gpu_h100_2026-11-27.json", parts: tuple[str, ...] = ("before", "after")
) -> list[RecordedRun]:
    """Every model of a results file, in order."""
    record = json.loads((RESULTS / file).read_text())
    return [run for part in parts for run in _runs(part, record[part])]


def _runs(part: str, results: list[dict[str, Any]]) -> Iterator[RecordedRun]:
    by_name = {result["name"]: result for result in results}
    profile = HardwareProfile.from_dict(by_name["rates"]["profile"])
    for name, result in by_name.items():
        if not name.endswith(": loaded"):
            continue
        model = name.removesuffix(": loaded")
        measured = {figure: by_name[f"{model}: {figure}"] for figure in FIGURES}
        yield RecordedRun(f"{part}, {model}", plan_of(result), profile, measured)


def first_run() -> tuple[Plan, HardwareProfile, float]:
    """The older run at 75 % of the weights: its plan, the machine's true rates, and seconds of a decode step."""
    record = json.loads((RESULTS / "gpu_h100.json").read_text())["last_run"]
    result = next(each for each in record if each["name"] == "offload 8b q4 75% @ 1024")
    profile = HardwareProfile.from_json((Path(__file__).parent / "h100_true_rates.json").read_text())
    return plan_of({"prefill_chunk": 1024, "shape": "column"} | result), profile, 1 / result["rows"][0]["tokens_per_s"]


def plan_of(result: dict[str, Any]) -> Plan:
    """The plan whose table a result holds."""
    workload = llama_8b(result["prefill_chunk"], result["shape"] == "paired")
    linears, kv = {}, {}
    for line in result["plan"].splitlines():
        if match := LINEAR.match(line):
            linears |= _linears(match)
        elif match := KV.match(line):
            first, last, groups, tokens = map(int, match.groups())
            kv |= {f"layers.{layer}.kv": (groups, tokens) for layer in range(first, last + 1)}
    placements = [_placement(shard.name, shard.units, linears[shard.name]) for shard in workload.linears]
    cache = [KvPlacement(shard.name, *kv[shard.name], shard.kv_heads) for shard in workload.kv]
    threads = int(re.search(r"(\d+) CPU threads?", result["plan"])[1])
    return build_plan(
        workload,
        placements,
        cache,
        Means(device="cuda", gpu_memory_bytes=5 << 30, staging_slots=4, num_threads=threads),
    )


def llama_8b(prefill_chunk: int, paired: bool = False) -> Workload:
    """The 8B shape in q4 for one sequence, as the runs had it."""
    sizes = Sizes(max_context=CONTEXT, max_batch=1, page_size=PAGE_TOKENS, prefill_chunk=prefill_chunk)
    return build_workload(decoder(llama_8b_config(), "q4"), "q4", "8b", sizes, paired=paired)


@cache
def llama_8b_config() -> ModelConfig:
    """The shape's own config."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(LLAMA_8B))
        return ModelConfig.from_dir(folder)


def _linears(match: re.Match[str]) -> dict[str, tuple[int, int, int]]:
    """Units at home, streamed in decode and streamed for many rows, of every linear of a row of the table."""
    label, first, last, kind, home, _, decode, _, _, prefill, _ = match.groups()
    widths = int(home), int(decode), int(prefill)
    if label == "head":
        return {"head": widths}
    return {f"layers.{layer}.{kind}": widths for layer in range(int(first), int(last or first) + 1)}


def _placement(name: str, units: int, widths: tuple[int, int, int]) -> LinearPlacement:
    home, decode, prefill = widths
    return LinearPlacement(name, home, (decode, *[prefill] * (NUM_ROW_TIERS - 1)), units)
