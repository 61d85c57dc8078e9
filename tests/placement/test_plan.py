"""Workloads, placements, the count of bytes, and the forms in which a plan is written."""

import json
from dataclasses import FrozenInstanceError, replace

import pytest

from placement import (
    NUM_ROW_TIERS,
    HardwareProfile,
    KvPlacement,
    LinearPlacement,
    LinearShard,
    Policy,
    make_plan,
    row_tier,
    shipped_policies,
)
from placement.plan.memory import kv_dram_bytes, kv_gpu_bytes, memory_report, staging_slot_bytes
from placement.plan.plan import Means, build_plan
from placement.plan.rows import plan_rows
from tests.support.planning.planning_models import linear, tiny

EMULATED = HardwareProfile.named("emulated")
ALL = (0,) * NUM_ROW_TIERS


def plan_of(workload, gpu: float = 0.5, stream: float = 0.5, groups: int = 1):
    linears = [
        LinearPlacement(s.name, int(gpu * s.units), (int(stream * s.units),) * NUM_ROW_TIERS, s.units)
        for s in workload.linears
    ]
    kv = [KvPlacement(s.name, groups, 64 if groups else 0, s.kv_heads) for s in workload.kv]
    return build_plan(workload, linears, kv, Means(device="emulated", gpu_memory_bytes=2**30))


@pytest.mark.parametrize(
    ("rows", "tier"), [(1, 0), (2, 1), (4, 1), (5, 2), (16, 2), (17, 3), (64, 3), (65, 4), (4096, 4)]
)
def test_row_tiers(rows, tier):
    assert tier == row_tier(rows)


def test_no_rows_is_an_error():
    with pytest.raises(ValueError, match="rows must be at least 1, got 0"):
        row_tier(0)


def test_a_cut_adds_up_to_the_units():
    placement = LinearPlacement("head", 4, (0, 1, 2, 3, 6), 10)

    assert [(4, 0, 6), (4, 1, 5), (4, 2, 4), (4, 3, 3), (4, 6, 0)] == [
        placement.cut(tier) for tier in range(NUM_ROW_TIERS)
    ]


@pytest.mark.parametrize(
    ("gpu", "stream", "message"),
    [
        (11, ALL, "gpu_units must be in 0..10, got 11"),
        (-1, ALL, "gpu_units must be in 0..10"),
        (4, (0, 0, 7, 0, 0), r"stream_units\[2\] must be in 0..6, got 7"),
        (4, (0,), "needs 5 entries, got 1"),
    ],
)
def test_impossible_cuts_are_refused(gpu, stream, message):
    with pytest.raises(ValueError, match=message):
        LinearPlacement("head", gpu, stream, 10)


@pytest.mark.parametrize(("groups", "tokens"), [(3, 16), (1, 0), (0, 16)])
def test_impossible_kv_placements_are_refused(groups, tokens):
    with pytest.raises(ValueError, match=r"layers\.0\.kv: gpu_kv_heads"):
        KvPlacement("layers.0.kv", groups, tokens, 2)


def test_bad_shards_and_workloads_are_refused():
    with pytest.raises(ValueError, match="layers.0.qkv: kind is 'qkw', expected the last word of the name"):
        LinearShard("layers.0.qkv", "qkw", 0, 1, 1, 1, 1, 1)
    with pytest.raises(ValueError, match="units, unit_bytes and unit_features must be positive"):
        LinearShard("head", "head", None, 0, 1, 1, 1, 1)
    with pytest.raises(ValueError, match="max_batch must be at least 1, got 0"):
        tiny(batch=0)


def test_fewest_gpu_tokens_hold_a_chunk_and_a_page_each():
    assert (48, 80) == (tiny().min_gpu_tokens, tiny(batch=3).min_gpu_tokens)
    assert 32 == tiny(context=32).min_gpu_tokens == tiny(context=32).full_tokens


def test_every_byte_is_counted_in_its_place():
    workload = tiny()
    plan = plan_of(workload)
    weights = sum(s.total_bytes for s in workload.linears)
    kv = sum(2 * 128 * s.bytes_per_token for s in workload.kv)

    memory = plan.memory

    assert weights == memory.gpu["weights"] + memory.pinned["weights"] + memory.host["weights"]
    assert weights // 2 == memory.gpu["weights"] == memory.pinned["weights"]
    # One group of two on the GPU with half of its tokens there; its older tokens may come to be all of them.
    assert (kv // 4, kv) == (memory.gpu["kv"], memory.pinned["kv"] + memory.host["kv"])
    assert kv // 2 == memory.pinned["kv"] == memory.host["kv"]
    assert memory.gpu["staging"] == 2 * plan.staging_slot_bytes
    assert memory.gpu_bytes == sum(memory.gpu.values())


def test_what_never_streams_is_not_pinned():
    memory = plan_of(tiny(), gpu=0.5, stream=0.0).memory

    assert (0, 0) == (memory.pinned["weights"], memory.gpu["staging"])
    assert memory.host["weights"] > 0


def test_only_pages_that_change_their_place_are_pinned():
    workload = tiny()
    whole = [KvPlacement(s.name, s.kv_heads, workload.full_tokens, s.kv_heads) for s in workload.kv]
    linears = plan_of(workload).linears

    assert 0 == plan_of(workload, groups=0).memory.pinned["kv"]
    assert 0 == memory_report(workload, linears, whole, device="emulated", staging_slots=0).pinned["kv"]
    elastic = memory_report(replace(workload, elastic=True), linears, whole, device="emulated", staging_slots=0)
    assert (elastic.gpu["kv"], 0) == (elastic.pinned["kv"], elastic.host["kv"])


def test_without_a_gpu_everything_is_in_host_memory():
    workload = tiny()
    plan = make_plan(workload, HardwareProfile.named("generic-cpu"), Policy(), device="cpu")

    assert (0, 0) == (plan.memory.gpu_bytes, plan.memory.pinned_bytes)
    assert workload.resident_bytes == plan.memory.host["resident"]
    assert {(0, 0, s.units) for s in workload.linears} == {p.cut(tier) for p in plan.linears for tier in range(5)}


def test_a_window_layer_holds_its_window_a_chunk_and_a_page_of_each_sequence():
    workload = tiny(batch=3, context=512, windows=(0, 40))  # chunks of 32, pages of 16
    full, windowed = workload.kv[:2]

    assert (512, 80 + 16) == (workload.sequence_tokens(full), workload.sequence_tokens(windowed))
    assert (3 * 512, 3 * 96) == (workload.layer_tokens(full), workload.layer_tokens(windowed))
    placement = KvPlacement(windowed.name, 2, 10_000, 2)
    assert 2 * 3 * 96 * windowed.bytes_per_token == kv_gpu_bytes(workload, windowed, placement)
    assert 0 == kv_dram_bytes(workload, windowed, placement)


def test_a_plan_says_what_a_context_costs():
    """Two groups of two, one of them the GPU's with 64 tokens: what is older and the other group's are in DRAM."""
    plan = plan_of(tiny(context=512, windows=(0, 0, 0, 40)), groups=1)
    token = plan.workload.kv[0].bytes_per_token

    costs = {context: (gpu // token, dram // token) for context, gpu, dram in plan.kv_by_context()}
    assert {128, 512} == set(costs)
    assert (4 * 64, 3 * (128 + 64) + 96 + 32) == costs[128]
    assert (4 * 64, 3 * (512 + 448) + 96 + 32) == costs[512]
    assert "KV cache of one sequence by context, GPU memory + DRAM: 128: " in plan.table(400)
    assert plan.to_dict()["kv_by_context"][1]["context"] == 512


def test_sequences_may_share_fewer_slots_than_their_contexts_take():
    workload = replace(tiny(batch=3), kv_tokens=200)

    assert 208 == workload.full_tokens == workload.layer_tokens(workload.kv[0])
    with pytest.raises(ValueError, match="kv_tokens is 100, less than one sequence of max_context 128"):
        replace(tiny(), kv_tokens=100)


def test_kv_bytes_round_up_to_pages():
    workload = tiny()
    shard, placement = workload.kv[0], KvPlacement("layers.0.kv", 1, 50, 2)

    assert 64 * shard.bytes_per_token == kv_gpu_bytes(workload, shard, placement)
    assert 2 * 128 * shard.bytes_per_token == kv_dram_bytes(workload, shard, placement)
    assert 128 * shard.bytes_per_token == kv_dram_bytes(workload, shard, replace(placement, gpu_tokens=128))


def test_a_staging_slot_holds_one_piece_of_what_streams_however_much_that_is():
    small, large = (
        linear("layers.0.o", "o", 0, 10, 16, 64),
        replace(linear("head", "head", None, 100, 16, 64), unit_bytes=2**20),
    )
    workload = replace(tiny(), linears=(small, large))
    few = [LinearPlacement("layers.0.o", 0, (3, 0, 0, 0, 5), 10), LinearPlacement("head", 100, ALL, 100)]
    many = [few[0], LinearPlacement("head", 0, (0, 0, 0, 0, 100), 100)]
    one = [few[0], LinearPlacement("head", 0, (0, 0, 0, 0, 1), 100)]

    assert 10 * small.unit_bytes == staging_slot_bytes(workload, few)
    assert 8 * 2**20 == staging_slot_bytes(workload, many) == staging_slot_bytes(workload, one)
    assert 2**20 == staging_slot_bytes(replace(workload, staging_piece_bytes=1000), many)  # a unit is never cut
    assert 0 == staging_slot_bytes(workload, [replace(few[0], stream_units=(0,) * 5), few[1]])


def test_a_plan_is_frozen_and_places_every_shard_once():
    workload = tiny()
    plan = plan_of(workload)

    with pytest.raises(FrozenInstanceError):
        plan.device = "cpu"
    with pytest.raises(ValueError, match="places every shard once and in order"):
        replace(plan, linears=plan.linears[1:])
    with pytest.raises(ValueError, match="device must be one of cpu, cuda, emulated, got 'tpu'"):
        replace(plan, device="tpu")


def test_shards_are_found_by_name():
    plan = plan_of(tiny())

    assert plan.linears[0] is plan.linear("layers.0.qkv") and plan.kv[3] is plan.kv_placement("layers.3.kv")
    with pytest.raises(KeyError, match="no shard named 'layers.9.qkv'"):
        plan.linear("layers.9.qkv")


def test_equal_neighbours_are_grouped():
    workload = tiny()
    plan = plan_of(workload)
    odd = replace(plan.linears[4], gpu_units=0, stream_units=ALL)

    labels = [row.label for row in plan_rows(workload.linears, [*plan.linears[:4], odd, *plan.linears[5:]])]

    assert [
        "layers.0.qkv",
        "layers.1.qkv",
        "layers.2-3.qkv",
        "layers.0-3.o",
        "layers.0-3.gate_up",
        "layers.0-3.down",
        "head",
    ] == labels


def test_a_table_has_one_row_for_layers_that_look_alike_wherever_they_are():
    """Every second layer is another here, as with windows or linear attention; policies still name each."""
    workload = tiny()
    plan = plan_of(workload)
    linears = tuple(
        replace(placement, stream_units=(0, *placement.stream_units[1:])) if (shard.layer or 0) % 2 else placement
        for shard, placement in zip(workload.linears, plan.linears, strict=True)
    )
    text = replace(plan, linears=linears).table()
    labels = [line.split()[0] for line in text.splitlines() if line.startswith("layers.") and ".qkv" in line]

    assert labels == ["layers.0..2.qkv", "layers.1..3.qkv"]
    assert "as many as count says" in text and "as many as count says" not in plan.table()
    assert "some of these layers; --yaml" in replace(plan, linears=linears).table(80), "it has no column of counts"
    assert "match: layers.3.qkv" in replace(plan, linears=linears).to_yaml()


def test_what_differs_in_nothing_shown_is_one_row_of_the_table():
    plan = plan_of(tiny())
    first, _, *others = plan.linears[4].stream_units
    middle = replace(plan.linears[4], stream_units=(first, 0, *others))
    changed = replace(plan, linears=(*plan.linears[:4], middle, *plan.linears[5:]))

    assert middle != plan.linears[4]
    assert changed.table() == plan.table()
    assert changed.to_yaml() != plan.to_yaml()


def test_the_table_names_lanes_bytes_and_speed():
    text = make_plan(tiny(), EMULATED, Policy(), device="emulated", gpu_memory_bytes=200_000).table()

    for part in (
        "layers.",
        ".kv",
        "head",
        "GPU memory",
        "pinned DRAM",
        "staging",
        "decode",
        "prefill",
        "tokens/s",
        "195.31 KiB",
    ):
        assert part in text
    assert all(len(line) <= 120 for line in text.splitlines())


@pytest.mark.parametrize("device", ["cpu", "cuda", "emulated"])
@pytest.mark.parametrize("name", shipped_policies())
def test_a_plan_written_as_a_policy_gives_the_same_plan(name, device):
    if device == "cpu" and name in ("gpu_only", "stream_only"):
        name = "cpu_only"
    policy, machine = Policy.named(name), replace(EMULATED, gpu_context_bytes=1000)
    workload = replace(tiny(windows=(0, 32)), max_batch=policy.batch or 1)
    plan = make_plan(workload, machine, policy, device=device, gpu_memory_bytes=600_000)

    again = make_plan(workload, machine, Policy.parse(plan.to_yaml(), "plan.yaml"), device=device)

    assert plan == again


def test_json_carries_placements_sizes_and_prediction():
    plan = make_plan(tiny(), EMULATED, Policy(), device="emulated", gpu_memory_bytes=200_000)

    values = json.loads(json.dumps(plan.to_dict()))

    assert 17 == len(values["linears"]) and 4 == len(values["kv"])
    assert plan.memory.gpu_bytes == sum(values["memory"]["gpu"].values())
    assert plan.predicted.decode.tokens_per_s == values["predicted"]["decode"]["tokens_per_s"]


def test_the_report_counts_the_context_of_the_driver():
    workload = tiny()
    plan = plan_of(workload)

    report = memory_report(workload, plan.linears, plan.kv, device="cuda", staging_slots=2, context_bytes=77)

    assert plan.memory.gpu_bytes + 77 == report.gpu_bytes
