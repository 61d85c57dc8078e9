"""What the best plan is held to, over a matrix of models, machines, dtypes, contexts and budgets: nothing that is
reported beside it is better, more of anything is never worse, and no memory lies idle."""

import functools
import itertools
import random
from dataclasses import replace

import pytest

from placement import BudgetError, HardwareProfile, Policy, make_plan, shipped_policies
from placement.cost.model import working_set_bytes
from placement.cost.objective import MODEL_ERROR, judged_s, objective_s, reference_calls, reference_context
from placement.explain.comparisons import gains
from placement.machine.hardware import catalogue_names
from placement.plan.workload import ChunkChoice
from placement.solve.improve.expert_slots import MOST_TRIED_INSERTS
from tests.support.models.published_configs import CONFIGS, published
from tests.support.planning.planning_models import llama_8b, llama_70b, qwen_14b, qwen_32b, with_row_cuts

NO_WISHES = Policy()
GIB = 2**30
NOISE = 1.001
MORE = {"memory": "GPU memory", "bus": "PCIe", "thread": "thread"}  # as an explanation calls it
SHAPES = {"8b": llama_8b, "14b": qwen_14b, "32b": qwen_32b, "70b": llama_70b}
MACHINES = [name for name in catalogue_names() if HardwareProfile.named(name).has_gpu and name != "emulated"]
MODELS = (*SHAPES, *CONFIGS)
MATRIX = list(itertools.product(MODELS, MACHINES, ("bf16", "q8", "q4"), (2048, 8192, 32768), (0.25, 0.5, 0.75, 1.0)))


def drawn(count, seed):
    """Some cases of the matrix, the same every time."""
    return random.Random(seed).sample(MATRIX, count)


def case(model, machine, dtype, context, share):
    """Workload with everything left open, machine and GPU budget."""
    hardware = HardwareProfile.named(machine)
    budget = int(share * hardware.gpu_memory_bytes)
    if model in CONFIGS:
        return published(model, dtype, context, hardware, budget), hardware, budget
    shape = SHAPES[model](dtype=dtype, context=context, page_size=64)
    choices = tuple(ChunkChoice(rows, shape.resident_bytes) for rows in (256, 512, 1024, 2048))
    return with_row_cuts(replace(shape, chunk_choices=choices)), hardware, budget


def plan_of(workload, hardware, budget, policy=NO_WISHES):
    try:
        return make_plan(workload, hardware, policy, device="cuda", gpu_memory_bytes=budget)
    except BudgetError:
        return None


def judged(plan):
    """What plans are compared by: the seconds of the objective, with the model's error on top where not everything is
    in GPU memory."""
    return judged_s(plan.predicted.objective_s, plan.is_all_on_gpu)


@functools.cache
def plan_of_case(case_):
    """The plan that every check of a case looks at."""
    return plan_of(*case(*case_))


def assert_no_rejected_row_is_better(case_):
    workload, hardware, budget = case(*case_)
    plan = plan_of_case(case_)
    if plan is None:
        return
    for name in shipped_policies():
        rules = Policy.named(name).rules
        other = plan_of(workload, hardware, budget, Policy(rules=rules)) if rules else None
        assert other is None or judged(plan) <= NOISE * judged(other), f"{name} is {_more(plan, other)} better"


def assert_more_is_never_worse(case_):
    """In the objective, and so never in decode and prefill at once: but by less than the model's error where more
    leaves the other lanes nothing to do, or where it is said for which long prompts both were traded."""
    workload, hardware, budget = case(*case_)
    plan = plan_of_case(case_)
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
        assert judged(other) <= NOISE * judged(plan), f"more {name} is {_more(other, plan)} worse"
        is_simpler = other.is_all_on_gpu and not plan.is_all_on_gpu
        least = NOISE * (1 + MODEL_ERROR if is_simpler else 1)
        both = [
            getattr(other.predicted, phase).seconds > least * getattr(plan.predicted, phase).seconds
            for phase in ("decode", "prefill")
        ]
        assert both != [True, True] or is_said_to_be_traded(plan, workload, hardware, name), (
            f"more {name} is worse in both phases"
        )


def assert_no_number_of_copies_is_better(case_):
    """Of those that the search may choose, given by the policy."""
    workload, hardware, budget = case(*case_)
    plan = plan_of_case(case_)
    if plan is None or not any(shard.picks for shard in workload.linears):
        return
    for inserts in range(MOST_TRIED_INSERTS + 1):
        other = plan_of(workload, hardware, budget, Policy(inserts=inserts))
        assert judged(plan) <= NOISE * judged(other), f"{inserts} inserts are {_more(plan, other)} better"


def is_said_to_be_traded(plan, workload, hardware, name):
    """Whether what more of something would bring tells what both phases are worse for, and that they are."""
    estimates = {each.label: each for each in gains(workload, hardware, NO_WISHES, plan)}
    return "traded for prompts of" in next(each.note for label, each in estimates.items() if MORE[name] in label)


def assert_no_memory_lies_idle(case_):
    """At most 2 % of the budget, unless nothing that lies in DRAM would gain from it: memory is for speed.

    A part of the head that the CPU computes while the GPU has the rest, or linears of a board whose two sides share one
    memory, are faster where they are. By the cost model itself, beside the search.
    """
    _, hardware, budget = case(*case_)
    plan = plan_of_case(case_)
    if plan is None or plan.memory.gpu_bytes >= 0.98 * budget:
        return
    faster = better_in(plan, hardware, budget - plan.memory.gpu_bytes)
    assert faster == [], f"{1 - plan.memory.gpu_bytes / budget:.1%} lie idle: {faster}"


def _more(slower, faster):
    return f"{judged(slower) / judged(faster) - 1:.2%}"


def better_in(plan, hardware, room_bytes):
    """What of the plan would be faster if it had so many bytes more of GPU memory."""
    machine = hardware.for_working_set(working_set_bytes(plan.workload, reference_context(plan.workload)))
    calls = reference_calls(plan.workload, plan.objective)

    def seconds(linears, kv):
        return objective_s(plan.workload, linears, kv, machine, calls, True)

    assert seconds(plan.linears, plan.kv) == pytest.approx(plan.predicted.objective_s)
    moves = moves_into(plan, room_bytes)
    return [what for what, linears, kv in moves if plan.predicted.objective_s > NOISE * seconds(linears, kv)]


def moves_into(plan, room_bytes):
    """The plan's placements with more of what it keeps in DRAM in GPU memory: of each kind of linear, with the one that
    is cut beside it, in all layers alike as many units as there is room for, half of them and one; the cache."""
    blocks = {}
    for index, (shard, placement) in enumerate(zip(plan.workload.linears, plan.linears, strict=True)):
        if placement.dram_units:
            blocks.setdefault(shard.block if plan.shape == "paired" else shard.kind, []).append(index)
    for name, indices in blocks.items():
        in_dram = sum(plan.linears[i].dram_units * plan.workload.linears[i].unit_bytes for i in indices)
        for share in (1.0, 0.5, 0.1):
            part = share * min(1.0, room_bytes / in_dram)
            moved = list(plan.linears)
            for i in indices:
                moved[i] = with_more_at_home(moved[i], int(part * moved[i].dram_units))
            yield f"{part:.0%} of what {name} has in DRAM", moved, plan.kv
    slot_bytes = sum(s.bytes_per_token * p.gpu_kv_heads for s, p in zip(plan.workload.kv, plan.kv, strict=True))
    slots = int(room_bytes / slot_bytes) if slot_bytes else 0
    if slots >= plan.workload.page_size and any(k.gpu_tokens < plan.workload.full_tokens for k in plan.kv):
        layers = zip(plan.workload.kv, plan.kv, strict=True)
        more = [
            replace(p, gpu_tokens=min(plan.workload.layer_tokens(s), p.gpu_tokens + slots)) if p.gpu_kv_heads else p
            for s, p in layers
        ]
        yield f"{slots} slots of the cache", plan.linears, more


def with_more_at_home(placement, units):
    """The linear with more units in GPU memory, taken from the CPU's part where it has one, else from what streams."""
    at_home = placement.gpu_units + units
    streams = tuple(min(streamed, placement.units - at_home) for streamed in placement.stream_units)
    return replace(placement, gpu_units=at_home, stream_units=streams)


CHECKS = [
    assert_no_rejected_row_is_better,
    assert_more_is_never_worse,
    assert_no_memory_lies_idle,
    assert_no_number_of_copies_is_better,
]
