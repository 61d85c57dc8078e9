"""Copies into expert slots beside a pass: what they take of the bus, and that more of anything never makes it longer."""

import itertools
import random
from dataclasses import replace

import pytest

from placement.cost.model import pass_cost
from placement.cost.terms import Call
from placement.plan.memory import KvPlacement, LinearPlacement
from tests.support.planning.planning_models import random_machine, tiny

LAYERS = 4
PROMPT = Call(1, 32, 0)


def drawn(seed):
    """A mixture, a machine whose bus may be far too slow for its copies, and a pass."""
    rng = random.Random(seed)
    experts = rng.choice([16, 64, 128])
    shape = tiny(layers=LAYERS, intermediate=16 * experts)
    picks, same_bits = rng.choice([1, 2, 4, 8]), rng.random() < 0.9
    linears = tuple(
        replace(shard, units=experts, picks=picks, same_bits=same_bits) if shard.kind == "gate_up" else shard
        for shard in shape.linears
    )
    machine, sequences = random_machine(rng), rng.choice([1, 1, 2])
    bus = machine.h2d_bytes_per_s * 10 ** rng.uniform(-2, 1)
    machine = replace(machine, h2d_bytes_per_s=bus, overlap=rng.choice([1.0, 0.7]), cores=rng.randint(1, 16))
    workload = replace(shape, linears=linears, inserts=rng.randint(0, 4), max_batch=sequences)
    return rng, workload, machine, rng.choice([Call(sequences, 1, 64), Call(1, 1, 64, 3), PROMPT])


def placed(workload, rng, slots):
    """So many slots in every layer with experts, of which some stream; all else in GPU memory."""
    streamed = rng.choice([0, 0, 2])
    linears = [
        LinearPlacement(s.name, 0, (streamed,) * 5, s.units, slots)
        if s.picks
        else LinearPlacement(s.name, s.units, (0,) * 5, s.units)
        for s in workload.linears
    ]
    return linears, [KvPlacement(s.name, s.kv_heads, workload.layer_tokens(s), s.kv_heads) for s in workload.kv]


def with_more(machine, factor):
    """The machine with more of each thing in turn."""
    yield "threads", machine.with_threads(machine.cores + 1)
    for name in ("h2d_bytes_per_s", "dram_bytes_per_s", "gpu_bytes_per_s"):
        yield name, replace(machine, **{name: factor * getattr(machine, name)})


@pytest.mark.parametrize("block", range(5))
def test_a_pass_is_no_longer_with_more_of_anything_nor_shorter_than_by_as_much(block):
    """A thread more was 7 % worse: it left the bus less time, and copies that no longer fit into a step served less."""
    for seed in range(60 * block, 60 * block + 60):
        rng, workload, machine, call = drawn(seed)
        experts = max(shard.units for shard in workload.linears if shard.picks)
        placements, factor = placed(workload, rng, rng.randint(1, experts - 1)), rng.choice([1.01, 1.3, 2.0])
        before = pass_cost(workload, *placements, machine, call, True).seconds
        for what, more in with_more(machine, factor):
            after = pass_cost(workload, *placements, more, call, True).seconds
            most = max(factor, more.cores / machine.cores)

            assert before / most * (1 - 1e-9) <= after <= before * (1 + 1e-9), (seed, what)


@pytest.mark.parametrize("block", range(5))
def test_a_pass_is_no_longer_with_more_slots(block):
    """On a GPU that is not what a pass waits for: all that is in slots it computes."""
    for seed in range(20 * block, 20 * block + 20):
        rng, workload, machine, call = drawn(seed)
        rates = {"gpu_bytes_per_s": 1e15, "gpu_flops": machine.gpu_flops.scaled(1e6), "launch_overhead_s": 0.0}
        machine = replace(machine, **rates)
        units = max(shard.units for shard in workload.linears if shard.picks)
        numbers, state = sorted({1, *(rng.randint(1, units) for _ in range(4)), units}), rng.getstate()
        found = []
        for slots in numbers:
            rng.setstate(state)
            found.append(pass_cost(workload, *placed(workload, rng, slots), machine, call, True).seconds)

        assert all(more <= less * (1 + 1e-9) for less, more in itertools.pairwise(found)), (seed, found)


def test_a_little_more_of_the_bus_is_worth_that_much_at_most_and_never_costs():
    """Along rates from far too slow for the copies to more than enough, by 5 % each: where they just fit is no step."""
    for seed in range(14, 24):
        rng, workload, machine, call = drawn(seed)
        placements, found = placed(workload, rng, 12), []
        for power in range(-100, 100):
            bus = replace(machine, h2d_bytes_per_s=machine.h2d_bytes_per_s * 1.05**power)
            found.append(pass_cost(workload, *placements, bus, call, True).seconds)

        ratios = [slower / faster for slower, faster in itertools.pairwise(found)]
        assert min(ratios) > 1 - 1e-9 and max(ratios) < 1.05 + 1e-9, seed
