"""The planner against exhaustive search, its promises (budgets, determinism, monotony), and its own policies."""

import itertools
import random
from dataclasses import replace

import pytest

from placement import BudgetError, HardwareProfile, Policy, PolicyError, make_plan
from placement.cost.objective import objective_s, reference_calls
from placement.machine.rates import DtypeRates
from placement.plan.workload import NUM_ROW_TIERS
from placement.solve.formulation import formulation
from placement.solve.make_plan import problem_of
from placement.solve.request import requested
from tests.support.planning.exhaustive import every_placement
from tests.support.planning.planning_models import linear, llama_8b, llama_70b, random_machine, random_workload, tiny

EMULATED = HardwareProfile.named("emulated")
LANES = ("gpu", "stream", "cpu")
MIB = 2**20
# Solutions are optimal within the solver's gap of 1e-4; rounding to whole units adds as much again.
SOLVER_NOISE = 1.001
SLOTS = 2
POLICY = Policy(staging_slots=SLOTS)


def exhaustive_best(workload, machine, budget):
    """Seconds of the best of all placements within the budget, by trying every one; infinity if there is none."""
    calls = reference_calls(workload, "latency")
    return min(
        (
            objective_s(workload, linears, kv, machine, calls, True)
            for linears, kv, gpu_bytes in every_placement(workload, calls, SLOTS)
            if gpu_bytes <= budget
        ),
        default=float("inf"),
    )


def everything_bytes(workload):
    """GPU memory that holds the whole workload."""
    return make_plan(
        workload, EMULATED, Policy.named("gpu_only"), device="emulated", gpu_memory_bytes=2**50
    ).memory.gpu_bytes


def least_bytes(workload):
    """The smallest GPU budget, as the error for an impossible one states it."""
    with pytest.raises(BudgetError) as error:
        make_plan(workload, EMULATED, POLICY, device="emulated", gpu_memory_bytes=1)
    return error.value.needed_bytes


def random_instance(seed):
    rng = random.Random(seed)
    workload, machine = random_workload(rng, with_head=rng.random() < 0.3), random_machine(rng)
    least, most = least_bytes(workload), everything_bytes(workload)
    return workload, machine, rng.randint(least, int(1.1 * most))


@pytest.mark.parametrize("block", [0, 1, *(pytest.param(block, marks=pytest.mark.matrix) for block in range(2, 10))])
def test_within_one_per_cent_of_exhaustive_search(block):
    worst = 1.0
    for seed in range(20 * block, 20 * block + 20):
        workload, machine, budget = random_instance(seed)
        plan = make_plan(workload, machine, POLICY, device="emulated", gpu_memory_bytes=budget)
        assert plan.memory.gpu_bytes <= budget
        worst = max(worst, plan.predicted.objective_s / exhaustive_best(workload, machine, budget))

    assert worst <= 1.01


@pytest.mark.parametrize("seed", range(8))
def test_no_placement_is_faster_than_a_program_says_any_can_be(seed):
    """The head's time beside copies that wait for what the CPU reads was charged where there were no copies, up to a
    quarter too much: placements that stream were taken for better ones that do not."""
    rng = random.Random(seed)
    workload, machine = random_workload(rng), random_machine(rng)
    large_head = linear("head", "head", None, workload.linears[-1].units, 512, 64)
    workload = replace(workload, linears=(*workload.linears[:-1], large_head))
    machine = replace(machine, cpu_slowdown_while_copying=0.6, copy_slowdown_while_computing=0.5)
    tokens, calls = workload.min_gpu_tokens, reference_calls(workload, "latency")
    budget = (3 * least_bytes(workload) + everything_bytes(workload)) // 4
    problem = problem_of(requested(workload, machine, POLICY, device="emulated", gpu_memory_bytes=budget))
    bound = formulation(problem, calls, tokens).relaxed().cost + problem.once_s

    assert bound <= SOLVER_NOISE * min(
        objective_s(workload, linears, kv, machine, calls, True)
        for linears, kv, gpu_bytes in every_placement(workload, calls, SLOTS)
        if kv[0].gpu_tokens in (0, tokens) and gpu_bytes <= budget
    )


def random_policy(rng, layers):
    """Text of a policy with budgets and rules that may or may not be met."""
    lines = [f"objective: {rng.choice(['latency', 'throughput'])}", f"staging_slots: {rng.choice(['auto', 0, 2, 8])}"]
    lines += [
        f"pinned_memory: {rng.choice(['auto', 'auto', 50_000, 10**8])}",
        f"host_memory: {rng.choice(['auto', 10**6])}",
    ]
    lines.append("rules:")
    for kind in rng.sample(["qkv", "o", "gate_up", "down"], rng.randint(0, 3)):
        lanes = {
            lane: rng.choice(["auto", "0", "1", "0.5", "3 units", "10%"])
            for lane in rng.sample(LANES, rng.randint(1, 2))
        }
        rule = ", ".join(f"{lane}: {share}" for lane, share in lanes.items())
        lines.append(f"  - {{match: 'layers.{rng.choice(['*', f'0-{layers - 1}', '0'])}.{kind}', {rule}}}")
    groups, tokens = rng.choice(["auto", "0", "1", "all"]), rng.choice(["auto", "all"])
    lines.append(f"  - {{match: layers.*.kv, kv: {{gpu_heads: {groups}, gpu_tokens: {tokens}}}}}")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("block", range(4))
def test_any_policy_gives_a_plan_within_its_budget_or_says_why_not(block):
    """Rules with fixed streams once left row tiers without a cut; a plan written as a policy must give itself again."""
    planned = 0
    for seed in range(10 * block, 10 * block + 10):
        rng = random.Random(seed)
        layers = rng.choice([1, 2, 6, 26])
        workload = tiny(layers=layers, batch=rng.choice([1, 4]), windows=rng.choice([(0,), (0, 32)]), context=256)
        text, budget = random_policy(rng, layers), int(rng.uniform(0.4, 1.1) * everything_bytes(workload))
        try:
            plan = make_plan(workload, EMULATED, Policy.parse(text), device="emulated", gpu_memory_bytes=budget)
        except (BudgetError, PolicyError) as error:
            assert str(error)
            continue
        planned += 1
        assert plan.memory.gpu_bytes <= budget
        assert plan.memory.pinned_bytes <= (Policy.parse(text).pinned_memory or float("inf"))
        assert plan == make_plan(workload, EMULATED, Policy.parse(plan.to_yaml()), device="emulated"), seed

    assert planned > 0


def one_linear(units: int, cpu: float, pcie: float, dram: float, budget_units: int):
    """A model of one linear of 32 MiB units, and a machine with rates in units a second and nothing else that takes
    time."""
    unit = 32 * MIB
    shard = replace(linear("head", "head", None, units, 16, 64), unit_bytes=unit)
    workload = replace(tiny(), linears=(shard,), kv=(), activation_bytes_per_row=0, resident_bytes=0)

    def rates(value):
        return DtypeRates(*[value] * 4)

    machine = HardwareProfile(
        "units",
        "invented for a test",
        1,
        10**12,
        dram * unit,
        rates(cpu * unit),
        rates(1e18),
        1e18,
        1e18,
        h2d_bytes_per_s=pcie * unit,
        d2h_bytes_per_s=1e18,
        gpu_memory_bytes=budget_units * unit,
        gpu_bytes_per_s=1e18,
        gpu_flops=rates(1e18),
        gpu_attention_ops_per_s=1e18,
        cpu_call_s=0.0,
    )
    return make_plan(workload, machine, POLICY, device="emulated").linears[0].cut(0)


@pytest.mark.parametrize(
    ("units", "cpu", "pcie", "dram", "budget_units", "expected"),
    [
        pytest.param(9, 2, 1, 9, 9, (9, 0, 0), id="everything fits"),
        pytest.param(9, 2, 1, 9, 2, (0, 3, 6), id="copies and cpu finish together"),
        pytest.param(9, 2, 1, 2, 2, (2, 0, 7), id="dram is full, so nothing streams"),
        pytest.param(9, 1, 100, 200, 2, (0, 9, 0), id="a fast bus streams all"),
        pytest.param(9, 100, 1, 200, 1, (1, 0, 8), id="a fast cpu needs no staging"),
        pytest.param(9, 1, 1, 9, 0, None, id="no memory at all"),
    ],
)
def test_one_linear_is_cut_as_expected(units, cpu, pcie, dram, budget_units, expected):
    if expected is None:
        budget_units, expected = 10**-9, (0, 0, units)

    assert expected == one_linear(units, cpu, pcie, dram, budget_units)


@pytest.mark.parametrize("seed", [*range(5), *(pytest.param(seed, marks=pytest.mark.matrix) for seed in range(5, 20))])
def test_more_gpu_memory_is_never_predicted_slower(seed):
    workload, machine, _ = random_instance(seed)
    least, most = least_bytes(workload), everything_bytes(workload)
    seconds = [
        make_plan(
            workload, machine, POLICY, device="emulated", gpu_memory_bytes=least + (most - least) * step // 6
        ).predicted.objective_s
        for step in range(7)
    ]

    assert all(later <= earlier * SOLVER_NOISE for earlier, later in itertools.pairwise(seconds)), seconds


@pytest.mark.matrix
def test_budget_sweep_is_monotone_and_has_no_cliff():
    workload, machine = llama_8b(dtype="q4", context=8192), HardwareProfile.named("rtx3060-ddr4")
    with pytest.raises(BudgetError) as error:
        make_plan(workload, machine, Policy(), device="cuda", gpu_memory_bytes=1)
    least = error.value.needed_bytes
    most = make_plan(
        workload, machine, Policy.named("gpu_only"), device="cuda", gpu_memory_bytes=2**40
    ).memory.gpu_bytes
    budgets = [least + (most - least) * step // 39 for step in range(40)]

    plans = [make_plan(workload, machine, Policy(), device="cuda", gpu_memory_bytes=budget) for budget in budgets]

    seconds = [plan.predicted.objective_s for plan in plans]
    assert all(plan.memory.gpu_bytes <= budget for plan, budget in zip(plans, budgets, strict=True))
    assert all(later <= earlier * SOLVER_NOISE for earlier, later in itertools.pairwise(seconds))
    # Without room for a staging ring no prompt can be streamed, without room for the cache it attends on the CPU: the
    # curve proper begins where there is room for both.
    proper = [
        second
        for plan, second in zip(plans, seconds, strict=True)
        if (plan.staging_slots or second == seconds[-1]) and all(kv.gpu_kv_heads for kv in plan.kv)
    ]
    assert len(proper) > 35
    assert all(later >= 0.8 * earlier for earlier, later in itertools.pairwise(proper))


@pytest.mark.parametrize("gib", [4, 24])
def test_an_80_layer_model_is_planned_within_its_budget_with_heads_beside_their_cache(gib):
    workload = llama_70b(dtype="q4", context=8192)
    # So that a group's q, k, v may follow its cache: where less overlaps, the cache of all groups stays with the GPU.
    machine = replace(HardwareProfile.named("rtx4090-ddr5"), streams_in_decode=True, overlap=0.78)

    plan = make_plan(workload, machine, Policy(), device="cuda", gpu_memory_bytes=gib * 2**30)

    assert plan.memory.gpu_bytes <= gib * 2**30
    assert plan.memory.gpu_bytes >= 0.98 * gib * 2**30
    for kv in plan.kv:
        gpu, stream, _ = plan.linear(kv.name.replace("kv", "qkv")).cut(0)
        assert kv.gpu_kv_heads <= gpu + stream


def test_decode_streams_nothing_where_it_was_not_measured_to_pay():
    """Even on a machine whose CPU is so slow that streaming every weight is predicted to be faster."""
    slow = replace(EMULATED, cpu_linear_bytes_per_s=DtypeRates(*[1e7] * 4), cpu_ops_per_s=DtypeRates(*[1e7] * 4))

    plans = [
        make_plan(tiny(), replace(slow, streams_in_decode=may), Policy(), device="emulated", gpu_memory_bytes=MIB // 3)
        for may in (True, False)
    ]

    assert [any(placement.stream_units[0] for placement in plan.linears) for plan in plans] == [True, False]


def test_same_input_same_plan():
    plans = [make_plan(llama_8b(), EMULATED, Policy(), device="emulated", gpu_memory_bytes=4 * 2**30) for _ in range(2)]

    assert plans[0] == plans[1]


def test_exchanging_layers_changes_nothing():
    first, second = (
        make_plan(tiny(windows=windows), EMULATED, Policy(), device="emulated", gpu_memory_bytes=250_000)
        for windows in ((0, 32), (32, 0))
    )

    def by_window(plan):
        return sorted(
            (
                kv.window,
                placement.gpu_kv_heads,
                placement.gpu_tokens,
                *[plan.linear(f"layers.{kv.layer}.{kind}").cut(0) for kind in ("qkv", "o", "gate_up", "down")],
            )
            for kv, placement in zip(plan.workload.kv, plan.kv, strict=True)
        )

    assert first.predicted.objective_s == second.predicted.objective_s
    assert by_window(first) == by_window(second)


def test_everything_goes_to_a_gpu_that_holds_it():
    plan = make_plan(llama_8b(dtype="q4"), HardwareProfile.named("h100-server"), Policy(), device="cuda")

    assert all(p.gpu_units == p.units for p in plan.linears)
    assert all(kv.gpu_kv_heads == kv.kv_heads for kv in plan.kv)


def test_prefill_streams_what_decode_computes_in_place():
    """One pinned copy, two uses: at one row the CPU keeps up with its memory, at 512 rows only the GPU has the
    arithmetic."""
    plan = make_plan(
        llama_8b(), HardwareProfile.named("rtx4090-ddr5"), Policy(), device="cuda", gpu_memory_bytes=4 * 2**30
    )

    streamed = [
        sum(p.cut(tier)[1] * s.unit_bytes for s, p in zip(plan.workload.linears, plan.linears, strict=True))
        for tier in range(NUM_ROW_TIERS)
    ]

    assert streamed[0] < 0.5 * streamed[4]
    assert streamed == sorted(streamed)


def test_no_staging_slots_means_no_streaming():
    plan = make_plan(tiny(), EMULATED, Policy(staging_slots=0), device="emulated", gpu_memory_bytes=250_000)

    assert not any(p.streams for p in plan.linears) and 0 == plan.staging_slots


def test_throughput_plans_for_the_batch():
    workload, policy = replace(tiny(), max_batch=8), Policy(objective="throughput")

    plan = make_plan(workload, EMULATED, policy, device="emulated", gpu_memory_bytes=2**20)

    assert (8, 8) == (plan.max_batch, plan.predicted.decode.rows)


@pytest.mark.parametrize(
    "sizes", [{"context": 512}, {"batch": 8}, {"prefill_chunk": 16}, {"kv_tokens": 4096}, {"kv_dtype": "q8"}], ids=str
)
def test_a_policy_with_sizes_of_its_own_is_refused(sizes):
    """A workload whose resident bytes are those of another context was planned for."""
    policy = Policy(**sizes)
    with pytest.raises(
        ValueError, match=f"the policy asks for {next(iter(sizes))}: .*, but the workload was made with"
    ):
        make_plan(tiny(), EMULATED, policy, device="emulated", gpu_memory_bytes=2**20)

    assert make_plan(tiny(), EMULATED, policy.without_sizes(), device="emulated", gpu_memory_bytes=2**20)


def test_a_budget_too_small_states_the_smallest_that_works():
    workload = tiny()
    with pytest.raises(
        BudgetError, match="gpu_memory: needs at least 90.02 KiB .activations 80.00 KiB .* smallest"
    ) as error:
        make_plan(workload, EMULATED, POLICY, device="emulated", gpu_memory_bytes=1000)
    needed = error.value.needed_bytes

    assert make_plan(workload, EMULATED, POLICY, device="emulated", gpu_memory_bytes=needed).memory.gpu_bytes == needed
    with pytest.raises(BudgetError):
        make_plan(workload, EMULATED, POLICY, device="emulated", gpu_memory_bytes=needed - 1)


def test_a_rule_raises_the_smallest_budget():
    text = "rules:\n  - {match: head, gpu: 1}\n"
    with pytest.raises(BudgetError) as error:
        make_plan(tiny(), EMULATED, Policy.parse(text), device="emulated", gpu_memory_bytes=1000)

    assert least_bytes(tiny()) + tiny().linears[-1].total_bytes == error.value.needed_bytes


def test_a_host_budget_is_kept_or_refused_with_the_smallest_that_works():
    workload = tiny(layers=1)
    with pytest.raises(BudgetError, match="host_memory: needs at least") as error:
        make_plan(workload, EMULATED, Policy(host_memory=1000), device="emulated", gpu_memory_bytes=120_000)
    tight = Policy(host_memory=error.value.needed_bytes)

    plan = make_plan(workload, EMULATED, tight, device="emulated", gpu_memory_bytes=120_000)

    assert plan.memory.host_bytes + plan.memory.pinned_bytes <= tight.host_memory


def test_a_pinned_budget_limits_what_streams():
    free, tight = (
        make_plan(llama_8b(), EMULATED, Policy(pinned_memory=limit), device="emulated", gpu_memory_bytes=2**32)
        for limit in (2**40, 2**32)
    )

    assert free.memory.pinned_bytes > 2**32 >= tight.memory.pinned_bytes > 2**31


def test_a_pinned_budget_too_small_for_a_rule_states_the_smallest_that_works():
    policy = Policy.parse("pinned_memory: 1000\nrules:\n  - {match: head, stream: 1}\n")

    with pytest.raises(BudgetError, match="pinned_memory: needs at least 32.00 KiB"):
        make_plan(tiny(layers=1), EMULATED, policy, device="emulated", gpu_memory_bytes=250_000)


def test_a_pinned_budget_limits_what_of_the_cache_may_leave_the_gpu():
    """Heads stay with the GPU by rule: their older tokens are pinned, unless GPU memory holds them all."""
    rules = "staging_slots: 0\nrules:\n  - {match: layers.*.kv, kv: {gpu_heads: all, gpu_tokens: TOKENS}}\n"
    workload = tiny(layers=1, context=1024)
    cache_bytes = sum(s.kv_heads * s.bytes_per_token for s in workload.kv) * workload.full_tokens

    def plan(tokens, pinned_memory, gpu_memory_bytes=2**20):
        policy = Policy.parse(f"pinned_memory: {pinned_memory}\n{rules.replace('TOKENS', tokens)}")
        return make_plan(workload, EMULATED, policy, device="emulated", gpu_memory_bytes=gpu_memory_bytes)

    assert {"weights": 0, "kv": cache_bytes} == plan("64", cache_bytes).memory.pinned
    with pytest.raises(BudgetError, match="pinned_memory") as error:
        plan("64", cache_bytes - 1)
    assert cache_bytes == error.value.needed_bytes
    assert {"weights": 0, "kv": 0} == plan("auto", 1).memory.pinned
    small = plan("64", cache_bytes).memory.gpu_bytes
    with pytest.raises(BudgetError, match="pinned_memory") as error:
        plan("auto", 1, small)
    assert cache_bytes == plan("auto", error.value.needed_bytes, small).memory.pinned["kv"]


def test_devices_and_profiles_must_fit():
    with pytest.raises(ValueError, match="device must be one of cpu, cuda, emulated, got 'gpu'"):
        make_plan(tiny(), EMULATED, Policy(), device="gpu")
    with pytest.raises(ValueError, match="needs a hardware profile with a GPU; generic-cpu has none"):
        make_plan(tiny(), HardwareProfile.named("generic-cpu"), Policy(), device="cuda")
