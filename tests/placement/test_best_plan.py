"""Nothing that is reported beside a plan is better than it, more of anything is never worse, and no memory lies
idle."""

import functools
import itertools
import random
from dataclasses import replace

import pytest

from placement import BudgetError, HardwareProfile, Policy, make_plan, shipped_policies
from placement.cost.model import predict, working_set_bytes
from placement.cost.objective import MODEL_ERROR, judged_s, objective_s, reference_calls, reference_context
from placement.explain.explain import explain
from placement.machine.hardware import catalogue_names
from placement.plan.workload import ChunkChoice
from tests.support.names import case_name
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
        assert other is None or judged(plan) <= NOISE * judged(other), name


def assert_more_is_never_worse(case_):
    """In the objective, and so never in decode and prefill at once: but by less than the model's error where more
    leaves the other lanes nothing to do."""
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
        assert judged(other) <= NOISE * judged(plan), name
        is_simpler = other.is_all_on_gpu and not plan.is_all_on_gpu
        least = NOISE * (1 + MODEL_ERROR if is_simpler else 1)
        both = [
            getattr(other.predicted, phase).seconds > least * getattr(plan.predicted, phase).seconds
            for phase in ("decode", "prefill")
        ]
        assert both != [True, True], name


def assert_no_memory_lies_idle(case_):
    """At most 2 % of the budget, unless nothing that lies in DRAM would gain from it: memory is for speed.

    A part of the head that the CPU computes while the GPU has the rest, or linears of a board whose two sides share one
    memory, are faster where they are. By the cost model itself, beside the search.
    """
    _, hardware, budget = case(*case_)
    plan = plan_of_case(case_)
    if plan is None or plan.memory.gpu_bytes >= 0.98 * budget:
        return
    assert better_in(plan, hardware, budget - plan.memory.gpu_bytes) == []


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


CHECKS = [assert_no_rejected_row_is_better, assert_more_is_never_worse, assert_no_memory_lies_idle]


@pytest.mark.parametrize("case_", drawn(6, seed=14), ids=str)
@pytest.mark.parametrize("check", CHECKS)
def test_the_plan_is_the_best_that_is_known(check, case_):
    check(case_)


def assert_other_lanes_gain_more_than_the_model_errs(case_):
    """Where everything fits in GPU memory, anything else is chosen only for more than the model's error."""
    workload, hardware, budget = case(*case_)
    plan = plan_of(workload, hardware, budget)
    whole = plan_of(workload, hardware, budget, Policy(rules=Policy.named("gpu_only").rules)) if plan else None
    if whole is not None and not plan.is_all_on_gpu:
        assert whole.predicted.objective_s * NOISE > (1 + MODEL_ERROR) * plan.predicted.objective_s


FITS_WHOLE = [each for each in MATRIX if each[-1] == 1.0 and each[0] in ("8b", "14b") and each[2] != "bf16"]


@pytest.mark.parametrize("case_", random.Random(4).sample(FITS_WHOLE, 5), ids=str)
def test_what_goes_to_other_lanes_gains_more_than_the_model_errs(case_):
    assert_other_lanes_gain_more_than_the_model_errs(case_)


def test_a_share_of_the_cpu_for_a_gain_within_the_error_is_noticed(monkeypatch):
    """An EPYC beside one card took a share of the head for 0.15 %; on a board with one memory it is 3 %."""
    monkeypatch.setattr("placement.cost.objective.MODEL_ERROR", 0.0)
    plans = [plan_of(*case("8b", *machine, 1.0)) for machine in FOR_LITTLE]
    monkeypatch.undo()

    assert [plan.is_all_on_gpu for plan in plans] == [False, False]
    assert [plan_of(*case("8b", *machine, 1.0)).is_all_on_gpu for machine in FOR_LITTLE] == [True, True]


FOR_LITTLE = [("rtx3090-epyc", "bf16", 2048), ("jetson-agx-orin", "q4", 8192)]


def test_a_simpler_plan_is_said_to_be_one_and_nothing_faster_is_called_beaten():
    workload, hardware, budget = case("8b", *FOR_LITTLE[0], 1.0)
    found = explain(workload, hardware, NO_WISHES, device="cuda", gpu_memory_bytes=budget)

    assert any("less than the model's own error of 5%" in note for note in found.notes)
    beaten = set(found.alternatives) - set(found.within_error)
    seconds = [other.objective_s for other in beaten if other.objective_s is not None]
    assert seconds and min(seconds) * NOISE >= found.plan.predicted.objective_s


# Cases of the matrix in which a run over it found fault: what each stands for.
FOUND_AT_FAULT = [
    # Twice the bus gave a slower plan: rounding to whole units lost more of the better program's solution.
    (assert_more_is_never_worse, ("8b", "rtx3090-epyc", "q4", 32768, 0.25)),
    # Twice the bus gave a plan 1.2 % slower: of a paired block the program had the CPU's parts of qkv and of o in
    # different layers, which no layout has.
    (assert_more_is_never_worse, ("32b", "rtx5090-ddr5", "q8", 32768, 1.0)),
    # And where what was streamed hid behind what Python needs to queue a prompt, which the program did not know.
    (assert_more_is_never_worse, ("14b", "rtx5090-ddr5", "bf16", 2048, 0.75)),
    # GPU memory is left where the CPU computes a part of the head beside the GPU,
    (assert_no_memory_lies_idle, ("8b", "rtx4060ti-ddr5", "q8", 2048, 0.75)),
    (assert_no_memory_lies_idle, ("14b", "rtx3090-epyc", "bf16", 2048, 1.0)),
    # where a fast host computes paired parts of layers,
    (assert_no_memory_lies_idle, ("14b", "rtx3090-epyc", "q8", 2048, 0.75)),
    # and where both sides read one memory.
    (assert_no_memory_lies_idle, ("8b", "jetson-agx-orin", "q4", 32768, 0.25)),
    (assert_no_memory_lies_idle, ("32b", "jetson-agx-orin", "q8", 2048, 1.0)),
    # What is streamed there is read, written and read again, which was counted once.
    (assert_no_rejected_row_is_better, ("70b", "jetson-agx-orin", "q4", 2048, 0.25)),
]


@pytest.mark.parametrize("check,case_", FOUND_AT_FAULT, ids=case_name)
def test_the_plan_is_the_best_where_a_run_over_the_matrix_found_fault(check, case_):
    check(case_)


@pytest.mark.parametrize("machine,kind", [("rtx4070-ddr5", "cache"), ("rtx3060-ddr4", "mlp")])
def test_memory_that_lies_idle_is_noticed(machine, kind):
    """A plan that had less to work with, beside the rest."""
    workload, hardware, budget = case("8b", machine, "q8", 32768, 0.5)
    starved = plan_of(workload, hardware, budget)

    assert any(kind in what for what in better_in(starved, hardware, budget // 2))


@pytest.mark.soak
@pytest.mark.timeout(12 * 3600)
@pytest.mark.parametrize("check", CHECKS)
def test_the_plan_is_the_best_that_is_known_over_the_whole_matrix(check):
    for case_ in MATRIX:
        check(case_)
        plan_of_case.cache_clear()


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
