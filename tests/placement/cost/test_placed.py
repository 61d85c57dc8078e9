"""A placement by its different layers, against the same sums over every layer."""

import random
from dataclasses import replace

import pytest

from placement import HardwareProfile, KvPlacement, LinearPlacement
from placement.cost.objective import layers_objective_s, reference_calls
from placement.cost.tally import KnownCosts
from placement.plan.memory import memory_report
from placement.plan.placed import layer_bytes, placed_layers
from tests.support.planning.planning_models import tiny

MACHINE = HardwareProfile.named("rtx3060-ddr4")


def drawn_placements(workload, rng):
    """Few different cuts, so that some layers are alike."""

    def cut(shard):
        home = rng.choice([0, shard.units // 2, shard.units])
        return LinearPlacement(shard.name, home, (rng.choice([0, shard.units - home]),) * 5, shard.units)

    def owner(cache):
        heads = rng.choice([0, cache.kv_heads])
        return KvPlacement(cache.name, heads, rng.choice([32, 64]) if heads else 0, cache.kv_heads)

    return tuple(map(cut, workload.linears)), tuple(map(owner, workload.kv))


@pytest.mark.parametrize("seed", range(8))
def test_bytes_of_the_different_layers_are_those_of_all(seed):
    rng = random.Random(seed)
    workload = replace(tiny(layers=12, windows=rng.choice([(0,), (0, 32)])), elastic=rng.random() < 0.3)
    linears, kv = drawn_placements(workload, rng)
    layers = placed_layers(workload, linears, kv)
    report = memory_report(workload, linears, kv, device="emulated", staging_slots=1).to_dict()

    assert sum(layer.times for layer in layers) == 13
    sizes = [(layer.times, layer_bytes(workload, layer)) for layer in layers]
    assert {place: sum(times * getattr(size, place) for times, size in sizes) for place in report} == {
        place: kinds["weights"] + kinds["kv"] for place, kinds in report.items()
    }
    assert max(size.staging_slot for _, size in sizes) == report["gpu"]["staging"]


@pytest.mark.parametrize("seed", range(8))
def test_costs_that_are_kept_for_other_placements_change_nothing(seed):
    """To the last bit, of two workloads that differ in a size and have one keeper."""
    rng, costs = random.Random(seed), KnownCosts()
    small = replace(tiny(layers=6, windows=rng.choice([(0,), (0, 32)])), inserts=1)
    workloads = [small, replace(small, prefill_chunk=2 * small.prefill_chunk)]
    for workload in [*workloads, *workloads]:
        linears, kv = drawn_placements(workload, rng)
        layers, calls = placed_layers(workload, linears, kv), reference_calls(workload, "latency")

        kept, anew = (layers_objective_s(workload, layers, MACHINE, calls, True, each) for each in (costs, None))
        assert kept == anew
        assert [costs.bytes_of(workload, each) for each in layers] == [layer_bytes(workload, each) for each in layers]


def test_layers_are_alike_only_where_everything_that_counts_is():
    workload = tiny(layers=6)
    linears, kv = drawn_placements(workload, random.Random(0))
    alike = (
        tuple(replace(p, gpu_units=0, stream_units=(0,) * 5) for p in linears),
        tuple(replace(p, gpu_kv_heads=0, gpu_tokens=0) for p in kv),
    )
    other_format = replace(workload.linears[4], weight_format="q8")
    other_heads = replace(workload.kv[1], heads=8)
    formats = replace(workload, linears=(*workload.linears[:4], other_format, *workload.linears[5:]))
    heads = replace(workload, kv=(workload.kv[0], other_heads, *workload.kv[2:]))
    streamed = (replace(alike[0][0], stream_units=(0, 0, 0, 0, 1)), *alike[0][1:])

    counts = [
        sorted(layer.times for layer in placed_layers(*each))
        for each in (
            (workload, *alike), (formats, *alike), (heads, *alike), (workload, streamed, alike[1])
        )
    ]  # fmt: skip
    assert counts == [[1, 6], [1, 1, 5], [1, 1, 5], [1, 1, 5]]


def test_another_number_of_placements_than_shards_is_refused():
    workload = tiny()
    linears, kv = drawn_placements(workload, random.Random(0))

    with pytest.raises(ValueError, match="has 17 linears and 4 caches, got placements of 16 and 4"):
        placed_layers(workload, linears[:-1], kv)
