"""Plans of elastic models: copies are counted, owners of the cache stay, and long contexts get memory from weights."""

from dataclasses import replace

import pytest

from placement import BudgetError, HardwareProfile, Policy, make_plan
from placement.adapt import elastic
from placement.adapt.elastic import decode_s, plan_for_budget, plan_for_context
from tests.support.planning.planning_models import decoder

MACHINE = HardwareProfile.named("rtx4090-ddr5")
SLOW_ATTENTION = replace(MACHINE, cpu_attention_bytes_per_s=MACHINE.cpu_attention_bytes_per_s / 4)
ELASTIC = Policy(elastic=True)
GIB = 2**30


WORKLOAD = decoder(
    "llama-8-layers",
    layers=8,
    hidden=4096,
    intermediate=14336,
    heads=32,
    kv_heads=8,
    head_dim=128,
    vocab=32000,
    context=32768,
)


@pytest.fixture(scope="module")
def plan():
    return make_plan(WORKLOAD, MACHINE, ELASTIC, device="cuda", gpu_memory_bytes=3 * GIB)


def test_every_weight_of_an_elastic_plan_is_counted_in_pinned_memory(plan):
    rigid = make_plan(WORKLOAD, MACHINE, Policy(), device="cuda", gpu_memory_bytes=3 * GIB)
    in_dram = rigid.memory.pinned["weights"] + rigid.memory.host["weights"]

    assert plan.memory.pinned["weights"] == plan.workload.weight_bytes
    assert plan.memory.host["weights"] == 0
    assert in_dram + rigid.memory.gpu["weights"] == plan.workload.weight_bytes
    assert plan.memory.gpu == rigid.memory.gpu


def test_a_pinned_budget_below_the_copies_is_refused(plan):
    small = Policy(elastic=True, pinned_memory=plan.workload.weight_bytes - 1)
    with pytest.raises(BudgetError, match="pinned_memory"):
        make_plan(plan.workload, MACHINE, small, device="cuda", gpu_memory_bytes=3 * GIB)


def test_another_budget_keeps_the_owners_of_the_cache(plan):
    smaller = plan_for_budget(plan, MACHINE, ELASTIC, 2 * GIB)

    assert [kv.gpu_kv_heads for kv in smaller.kv] == [kv.gpu_kv_heads for kv in plan.kv]
    assert smaller.memory.gpu_bytes <= 2 * GIB < plan.memory.gpu_bytes <= 3 * GIB
    assert plan_for_budget(smaller, MACHINE, ELASTIC, 3 * GIB).memory.gpu_bytes > smaller.memory.gpu_bytes


def test_a_long_context_gets_memory_from_the_weights():
    """Where the CPU attends slowly; each plan is faster than the other at the context that it was made for."""
    plan = make_plan(WORKLOAD, SLOW_ATTENTION, ELASTIC, device="cuda", gpu_memory_bytes=3 * GIB)
    short, long = (plan_for_context(plan, SLOW_ATTENTION, ELASTIC, context) for context in (1024, 32768))

    assert short.memory.gpu["weights"] > long.memory.gpu["weights"]
    assert short.memory.gpu["kv"] < long.memory.gpu["kv"]
    assert decode_s(short, SLOW_ATTENTION, 800) < decode_s(long, SLOW_ATTENTION, 800)
    assert decode_s(long, SLOW_ATTENTION, 30_000) < decode_s(short, SLOW_ATTENTION, 30_000)
    assert max(short.memory.gpu_bytes, long.memory.gpu_bytes) <= 3 * GIB
    assert short.workload == long.workload == plan.workload


def test_rules_of_the_user_hold_in_every_plan(plan):
    text = (
        "elastic: true\nrules:\n  - {match: layers.0.kv, kv: {gpu_tokens: 4096}}\n  - {match: layers.1.qkv, gpu: 1}\n"
    )
    policy = Policy.parse(text)
    first = make_plan(plan.workload, MACHINE, policy, device="cuda", gpu_memory_bytes=3 * GIB)
    other = plan_for_context(first, MACHINE, policy, 2048)

    assert other.kv[0].gpu_tokens in (0, 4096)
    assert other.linear("layers.1.qkv").dram_units == 0


def test_an_elastic_plan_fed_back_as_a_policy_is_the_same(plan):
    again = make_plan(replace(plan.workload, elastic=False), MACHINE, Policy.parse(plan.to_yaml()), device="cuda")

    assert again == plan


@pytest.mark.parametrize(("slower", "is_taken"), [(1.02, True), (1.08, False)])
def test_a_plan_for_a_context_is_judged_as_every_plan_is(monkeypatch, slower, is_taken):
    """One that leaves the other lanes nothing to do is taken unless another gains more than the model errs."""
    budget, made = 16 * GIB, []

    def predicted_slower(*arguments, **sizes):
        plan = make_plan(*arguments, **sizes)
        seconds = slower * made[0].predicted.objective_s if plan.is_all_on_gpu else 1.0
        made.append(replace(plan, predicted=replace(plan.predicted, objective_s=seconds)))
        return made[-1]

    first = make_plan(WORKLOAD, MACHINE, ELASTIC, device="cuda", gpu_memory_bytes=budget)
    monkeypatch.setattr(elastic, "make_plan", predicted_slower)
    chosen = plan_for_context(first, MACHINE, ELASTIC, 4096)

    assert [plan.is_all_on_gpu for plan in made] == [False, False, True]
    assert (chosen.kv == made[-1].kv) == is_taken
