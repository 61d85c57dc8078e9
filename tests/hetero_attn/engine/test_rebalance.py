"""The closed loop: measured lane times move the stream/cpu boundary to where both lanes end together, and no
further."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from hetero_attn.engine.rebalance import STEPS, Rebalancer
from placement import HardwareProfile, Plan, Policy, make_plan
from placement.adapt.rebalance import HYSTERESIS, LaneTimes, movable, rebalanced
from placement.policy.bind import bind
from tests.support.models.runtime import make_engine, toy_workload, uniform_plan
from tests.support.models.toy import make_checkpoint
from tests.support.planning.planning_models import llama_8b


@dataclass(frozen=True)
class FakePlanned:
    """Of a planned model, what the rebalancer reads and replaces."""

    policy: Policy
    plan: Plan
    hardware: HardwareProfile


MACHINE = HardwareProfile.named("rtx4090-ddr5")
DECODE = 0
NO_WISHES = Policy()


def planned(policy: Policy = NO_WISHES):
    return make_plan(llama_8b(), MACHINE, policy, device="cuda", gpu_memory_bytes=6 * 2**30)


def lane_bytes(plan, tier: int = DECODE) -> tuple[int, int]:
    """Bytes (streamed, computed by the CPU) of a row tier."""
    cuts = [(p.cut(tier), s.unit_bytes) for s, p in zip(plan.workload.linears, plan.linears, strict=True)]
    return sum(cut[1] * size for cut, size in cuts), sum(cut[2] * size for cut, size in cuts)


def measured(plan, cpu_bytes_per_s: float, h2d_bytes_per_s: float) -> LaneTimes:
    """What a machine of these rates would report: two lanes side by side, the step ends with the slower one."""
    streamed, on_cpu = lane_bytes(plan)
    cpu_s, copies_s = on_cpu / cpu_bytes_per_s, streamed / h2d_bytes_per_s
    return LaneTimes(max(cpu_s, copies_s), cpu_s, max(0.0, cpu_s - copies_s))


def settle(plan, cpu_bytes_per_s: float, h2d_bytes_per_s: float = MACHINE.h2d_bytes_per_s):
    """Rebalance until nothing moves; the plans on the way."""
    limits, plans = movable(plan, bind(Policy(), plan.workload, plan.device)), [plan]
    for _ in range(100):
        times = measured(plans[-1], cpu_bytes_per_s, h2d_bytes_per_s)
        moved = rebalanced(plans[-1], limits[DECODE], DECODE, times, MACHINE)
        if moved is None:
            return plans
        plans.append(moved)
    raise AssertionError("the boundary never comes to rest")


@pytest.mark.parametrize("cpu_gb_per_s", [8, 20, 35, 65])
def test_fake_times_converge_to_the_balanced_cut(cpu_gb_per_s):
    """At 65 GB/s the plan is right already; a slower CPU gives columns away until both lanes end together."""
    plans = settle(planned(), cpu_gb_per_s * 1e9)

    times = measured(plans[-1], cpu_gb_per_s * 1e9, MACHINE.h2d_bytes_per_s)
    walls = [measured(plan, cpu_gb_per_s * 1e9, MACHINE.h2d_bytes_per_s).wall_s for plan in plans]
    assert abs(times.surplus_s) <= HYSTERESIS * times.wall_s
    assert walls == sorted(walls, reverse=True)


def test_a_recovered_cpu_gets_its_columns_back():
    throttled = settle(planned(), 10e9)[-1]

    recovered = settle(throttled, 65e9)[-1]

    assert lane_bytes(recovered)[1] > 1.5 * lane_bytes(throttled)[1]


def test_balanced_lanes_are_left_alone_and_the_same_times_give_the_same_plan():
    plan = planned()
    limits = movable(plan, bind(Policy(), plan.workload, plan.device))[DECODE]
    almost, behind = LaneTimes(1.0, 0.98, 0.1), LaneTimes(1.0, 1.0, 0.6)

    first, second = (rebalanced(plan, limits, DECODE, behind, MACHINE) for _ in range(2))

    assert rebalanced(plan, limits, DECODE, almost, MACHINE) is None
    assert first == second and first != plan


def test_homes_other_tiers_qkv_and_staging_slots_stay():
    plan = planned()
    for moved in settle(plan, 6e9)[1:]:
        for before, after, shard in zip(plan.linears, moved.linears, plan.workload.linears, strict=True):
            assert before.gpu_units == after.gpu_units and before.stream_units[1:] == after.stream_units[1:]
            assert shard.kind != "qkv" or before == after
        assert moved.staging_slot_bytes <= plan.staging_slot_bytes
        assert moved.memory == plan.memory


def test_one_look_moves_an_eighth_at_most():
    plan = planned()
    limits = movable(plan, bind(Policy(), plan.workload, plan.device))[DECODE]

    moved = rebalanced(plan, limits, DECODE, LaneTimes(9.0, 9.0, 9.0), MACHINE)

    changes = [
        (abs(after.stream_units[DECODE] - before.stream_units[DECODE]), before.dram_units)
        for before, after in zip(plan.linears, moved.linears, strict=True)
    ]
    assert any(change for change, _ in changes)
    assert all(change <= max(1, units // 8) for change, units in changes)


def test_what_the_user_fixed_stays_and_without_streaming_nothing_moves():
    policy = Policy.parse('rules:\n  - {match: "layers.*.down", tiers: {"1": {stream: 0.25}}}\n')
    fixed, resident = planned(policy), planned(Policy(staging_slots=0))

    names = movable(fixed, bind(policy, fixed.workload, "cuda"))
    nothing = movable(resident, bind(Policy(staging_slots=0), resident.workload, "cuda"))

    assert not any(name.endswith("down") for name in names[DECODE]) and any(name.endswith("down") for name in names[4])
    assert "head" not in names[4] and not any(nothing)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("rebalance"), "llama")


def test_a_loaded_model_rebalances_and_says_the_same(path):
    """The worker is reported as far behind, so columns move to the stream lane; no logit may change."""
    workload = toy_workload(path, "fp32")
    plan = uniform_plan(workload, 0.25, 0.25, 1, 24)
    steady, moving = make_engine(path, plan), make_engine(path, plan)
    replanner = SimpleNamespace(
        planned=FakePlanned(Policy(rebalance=True), plan, HardwareProfile.named("emulated")),
    )
    rebalancer = Rebalancer(moving, replanner)
    try:
        sequences = [engine.kv_cache.open() for engine in (steady, moving)]
        for engine, sequence in zip((steady, moving), sequences, strict=True):
            engine.prefill(sequence, [3, 4, 5])
        for token in range(3 * STEPS):
            expected = steady.decode_step([sequences[0]], [token])
            found = moving.decode_step([sequences[1]], [token])
            assert torch.allclose(expected, found, rtol=1e-4, atol=1e-4)
            times = moving.report.tiers[DECODE]
            times.waited_s = times.cpu_lane_s = times.wall_s
            rebalancer.follow()
    finally:
        steady.close()
        moving.close()

    assert moving.plan is replanner.planned.plan and moving.plan != plan
    assert lane_bytes(moving.plan)[0] > lane_bytes(plan)[0]
    assert moving.plan.staging_slot_bytes <= plan.staging_slot_bytes


def test_without_the_wish_nothing_is_watched(path):
    plan = uniform_plan(toy_workload(path, "fp32"), 0.25, 0.25, 1, 24)
    replanner = SimpleNamespace(planned=FakePlanned(Policy(), plan, HardwareProfile.named("emulated")))
    engine = SimpleNamespace(lanes=SimpleNamespace(ring=object()), report=None)

    Rebalancer(engine, replanner).follow()

    assert replanner.planned.plan is plan
