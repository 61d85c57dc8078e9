"""The plan serves the requests that people send: decode, a short prompt and a long one, none at the cost of the
others."""

import functools
from dataclasses import replace
from pathlib import Path

import pytest

from placement import HardwareProfile, Policy, make_plan
from placement.cost import objective
from placement.cost.model import predict
from placement.cost.objective import tier_call
from placement.cost.terms import linear_cost
from placement.plan.workload import NUM_ROW_TIERS, ChunkChoice
from tests.support.planning.planning_models import llama_8b, qwen_14b, qwen_32b

H100 = Path(__file__).parents[2] / "support" / "planning" / "h100_true_rates.json"
GIB = 2**30
LONG_PROMPT = 4096
CASES = [
    *(pytest.param("8b", None, gib, id=f"8b h100 {gib}") for gib in (4.45, 3.47, 2.48)),
    *(pytest.param("14b", name, 7, id=f"14b {name}") for name in ("rtx4060ti-ddr5", "rtx4090-ddr5", "laptop-8gb-ddr5")),
    *(
        pytest.param("32b", name, gib, id=f"32b {name} {gib}")
        for name, gib in (("rtx4060ti-ddr5", 14), ("rtx4090-ddr5", 16))
    ),
]


def machine_of(name):
    if name is not None:
        return HardwareProfile.named(name)
    return HardwareProfile.from_json(H100.read_text(encoding="utf-8"))


def workload_of(model):
    """The q4 shape with what a row of activations takes in the runtime, and the chunks that it may choose from."""
    shape = {"8b": llama_8b, "14b": qwen_14b, "32b": qwen_32b}[model]
    workload = shape(dtype="q4", context=2 * LONG_PROMPT, page_size=64)
    choices = tuple(ChunkChoice(rows, workload.resident_bytes) for rows in (512, 1024, 2048))
    return replace(workload, chunk_choices=choices)


@functools.cache
def plan_of_case(model, name, gib):
    """What several tests look at."""
    return planned(model, machine_of(name), gib)


def planned(model, machine, gib, prefill_chunk=None, **policy):
    workload = workload_of(model)
    if prefill_chunk is not None:
        workload = replace(workload, prefill_chunk=prefill_chunk, chunk_choices=())
    return make_plan(workload, machine, Policy(**policy), device="cuda", gpu_memory_bytes=int(gib * GIB))


def prompt_cost(plan, machine):
    return predict(
        plan.workload, plan.linears, plan.kv, machine, phase="prefill", rows=LONG_PROMPT, context=0, on_gpu=True
    )


@pytest.mark.parametrize("model,name,gib", CASES)
def test_a_long_prompt_runs_at_its_bound(model, name, gib):
    """At least 80 % of what its busiest lane allows, Python's queueing left out, which no placement changes."""
    machine = machine_of(name)
    cost = prompt_cost(plan_of_case(model, name, gib), machine)

    assert cost.busiest_s >= 0.8 * (cost.seconds - dict(cost.terms)["step"])


@pytest.mark.parametrize("model,name,gib", CASES)
def test_a_long_prompt_costs_decode_next_to_nothing(model, name, gib, monkeypatch):
    """With the same chunk, decode is within 2 % of a plan that looks at short prompts only."""
    machine = machine_of(name)
    plan = plan_of_case(model, name, gib)
    short_only = objective.Requests(128, 1.0, 0.0)
    monkeypatch.setattr(objective, "REQUESTS", {"latency": short_only})
    short = planned(model, machine, gib, prefill_chunk=plan.prefill_chunk)

    assert plan.predicted.decode.seconds <= 1.02 * short.predicted.decode.seconds


@pytest.mark.parametrize("model,name,gib", CASES)
def test_no_share_of_the_cpu_takes_less_than_its_hand_over(model, name, gib):
    """In no row tier: what the CPU computes sooner than its inputs arrive is done sooner where it is streamed."""
    machine = machine_of(name)
    plan = plan_of_case(model, name, gib)
    workload, small = plan.workload, []
    attends = {kv.name.split(".kv")[0] for kv in plan.kv if kv.gpu_kv_heads < kv.kv_heads}
    for shard, placement in zip(workload.linears, plan.linears, strict=True):
        if shard.kind == "qkv" and f"layers.{shard.layer}" in attends:
            continue  # its heads go where their cache is
        for tier in range(NUM_ROW_TIERS if placement.streams else 0):
            on_cpu, call = placement.cut(tier)[2], tier_call(workload, tier).call
            rows = call.sequences if shard.kind == "head" else call.rows
            cost = linear_cost(shard, rows, workload.weight_dtype, machine, True)
            if on_cpu and not shard.row_cut and on_cpu * cost.cpu_s_per_unit < cost.handover_s:
                small.append(f"{shard.name} in tier {tier}: {on_cpu} of {placement.units} units")

    assert small == []


def test_each_objective_is_best_at_what_it_is_for():
    machine = machine_of(None)
    latency, prefill = (planned("8b", machine, 2.48, objective=name) for name in ("latency", "prefill"))

    assert latency.predicted.decode.seconds < prefill.predicted.decode.seconds
    assert prompt_cost(prefill, machine).seconds < prompt_cost(latency, machine).seconds
