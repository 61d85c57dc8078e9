"""Nothing that is reported beside a plan is better than it, more of anything is never worse, and no memory lies
idle."""

import itertools
import random
from dataclasses import replace

import pytest

from placement import BudgetError, HardwareProfile, Policy, make_plan, shipped_policies
from placement.cost.model import predict
from placement.explain import explain
from placement.machine.hardware import catalogue_names
from placement.plan.workload import ChunkChoice
from tests.support.planning_models import llama_8b, llama_70b, qwen_14b, qwen_32b, with_row_cuts

NO_WISHES = Policy()
GIB = 2**30
NOISE = 1.001
SHAPES = {"8b": llama_8b, "14b": qwen_14b, "32b": qwen_32b, "70b": llama_70b}
MACHINES = [name for name in catalogue_names() if HardwareProfile.named(name).has_gpu and name != "emulated"]
MATRIX = list(itertools.product(SHAPES, MACHINES, ("bf16", "q8", "q4"), (2048, 8192, 32768), (0.25, 0.5, 0.75, 1.0)))


def drawn(count, seed):
    """Some cases of the matrix, the same every time."""
    return random.Random(seed).sample(MATRIX, count)


def case(model, machine, dtype, context, share):
    """Workload with everything left open, machine and GPU budget."""
    shape = SHAPES[model](dtype=dtype, context=context, page_size=64)
    choices = tuple(ChunkChoice(rows, shape.resident_bytes) for rows in (256, 512, 1024, 2048))
    hardware = HardwareProfile.named(machine)
    return with_row_cuts(replace(shape, chunk_choices=choices)), hardware, int(share * hardware.gpu_memory_bytes)


def plan_of(workload, hardware, budget, policy=NO_WISHES):
    try:
        return make_plan(workload, hardware, policy, device="cuda", gpu_memory_bytes=budget)
    except BudgetError:
        return None


def assert_no_rejected_row_is_better(case_):
    workload, hardware, budget = case(*case_)
    plan = plan_of(workload, hardware, budget)
    if plan is None:
        return
    for name in shipped_policies():
        rules = Policy.named(name).rules
        other = plan_of(workload, hardware, budget, Policy(rules=rules)) if rules else None
        assert other is None or plan.predicted.objective_s <= NOISE * other.predicted.objective_s, name


def assert_more_is_never_worse(case_):
    """In the objective, and so never in decode and prefill at once."""
    workload, hardware, budget = case(*case_)
    plan = plan_of(workload, hardware, budget)
    if plan is None:
        return
    faster = replace(
        hardware, h2d_bytes_per_s=2 * hardware.h2d_bytes_per_s, d2h_bytes_per_s=2 * hardware.d2h_bytes_per_s
    )
    more = {
        "memory": plan_of(workload, hardware, budget + GIB),
        "bus": plan_of(workload, faster, budget),
        "thread": plan_of(workload, hardware, budget, Policy(threads=hardware.cores + 1)),
    }
    for name, other in more.items():
        assert other.predicted.objective_s <= NOISE * plan.predicted.objective_s, name
        both = [
            getattr(other.predicted, phase).seconds > NOISE * getattr(plan.predicted, phase).seconds
            for phase in ("decode", "prefill")
        ]
        assert both != [True, True], name


def assert_no_memory_lies_idle(case_):
    """At most 2 % of the budget, unless everything is in it."""
    workload, hardware, budget = case(*case_)
    plan = plan_of(workload, hardware, budget)
    if plan is None:
        return
    everything = all(p.dram_units == 0 for p in plan.linears) and not any(plan.memory.pinned.values())
    whole_cache = all(k.gpu_groups == k.groups for k in plan.kv)
    assert plan.memory.gpu_bytes >= 0.98 * budget or everything and whole_cache


CHECKS = [assert_no_rejected_row_is_better, assert_more_is_never_worse, assert_no_memory_lies_idle]


@pytest.mark.parametrize("case_", drawn(6, seed=14), ids=str)
@pytest.mark.parametrize("check", CHECKS)
def test_the_plan_is_the_best_that_is_known(check, case_):
    check(case_)


@pytest.mark.soak
@pytest.mark.timeout(12 * 3600)
@pytest.mark.parametrize("check", CHECKS)
def test_the_plan_is_the_best_that_is_known_over_the_whole_matrix(check):
    for case_ in MATRIX:
        check(case_)


def test_what_more_would_bring_is_what_planning_with_it_gives():
    workload, hardware, budget = case("14b", "laptop-8gb-ddr5", "q4", 4096, 0.8)
    found = explain(workload, hardware, Policy(), device="cuda", gpu_memory_bytes=budget)
    direct = plan_of(workload, hardware, budget + GIB).predicted

    gain = next(gain for gain in found.gains if gain.label == "1 GiB more GPU memory")
    assert (gain.decode_tokens_per_s, gain.prefill_tokens_per_s) == (
        direct.decode.tokens_per_s,
        direct.prefill.tokens_per_s,
    )


# (shape, machine, dtype, context, budget in GiB): the hand-made plan has the whole cache in GPU memory, or as much as
# fits.
HAND_MADE = [
    ("8b", "rtx4090-ddr5", "q4", 8192, 8),
    ("8b", "rtx3060-ddr4", "q8", 8192, 11.18),
    ("32b", "rtx4090-ddr5", "q4", 16384, 22.35),
    ("8b", "rtx4090-ddr5", "q4", 131072, 22.35),
]


@pytest.mark.parametrize("model,machine,dtype,context,gib", HAND_MADE)
def test_decode_at_full_context_is_what_a_cache_in_gpu_memory_gives(model, machine, dtype, context, gib):
    """The cases in which GPU memory was left empty while the cache lay in DRAM."""
    workload, hardware, _ = case(model, machine, dtype, context, 1)
    by_hand = Policy.parse('rules:\n  - {match: "*", kv: {gpu_heads: all, gpu_tokens: all}}\n')
    plan, hand = (plan_of(workload, hardware, int(gib * GIB), policy) for policy in (Policy(), by_hand))

    def at_full(made):
        arguments = {"phase": "decode", "rows": 1, "context": context, "on_gpu": True}
        return predict(made.workload, made.linears, made.kv, hardware, **arguments).seconds

    assert plan.predicted.objective_s <= NOISE * hand.predicted.objective_s
    assert at_full(plan) <= NOISE * at_full(hand) or plan.memory.gpu_bytes >= 0.98 * plan.gpu_memory_bytes
