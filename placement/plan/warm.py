"""Expert slots among placements: given to layers by equal gain, what they serve, and what more memory would."""

from collections.abc import Sequence
from dataclasses import replace
from math import log2

from placement.plan.heat import by_gain
from placement.plan.memory import LinearPlacement, expert_slot_bytes
from placement.plan.shards import LinearShard
from placement.plan.units import format_bytes
from placement.plan.workload import Workload, row_tier

GIB = 1 << 30
# Fitted to tables over drawn traces (2, 4, 8 and 10 of 64 to 512 experts, the published reuse and others) and a trained
# mixture's routes, 1 to 4 copies a batch, a batch every 1 to 13 steps: root mean square error 0.035, over others 0.037.
STILL_POPULAR, LOST = 0.5, 0.7
WIDER = 5, 4
POWER, POWER_LATER = 0.87, 1.0
EDGE, EDGE_AT_ONCE = 0.25, 3.0


def hit_rate(
    workload: Workload, shard: LinearShard, placement: LinearPlacement, sequences: int = 1, period: int = 1
) -> float:
    """The expected share of one row's picks, of experts that are not at home on the GPU, that expert slots serve.

    A curve by recency is of slots that take in all they miss. Late copies have missed what is chosen again sooner
    (`_late`), and where fewer are made than would be missed, what slots serve falls, the farther below the more and
    with no step, from there to what experts of any time serve, of whose popularity STILL_POPULAR is left. period: how
    many steps behind the one that missed it a copy serves, until when no other batch begins; at 1 it serves the next
    step.
    """
    at = placement.expert_slots // sequences * placement.units // placement.dram_units
    recency, fixed = shard.curve(by_recency=True), shard.curve(by_recency=False)[at]
    if not (workload.inserts and shard.same_bits):
        return fixed
    fixed = min(recency[at], fixed)
    any_time = min(fixed, at / placement.units)
    least = any_time + STILL_POPULAR * (fixed - any_time)
    most = max(least, recency[at] - _late(shard, recency[at], period))
    wider, of = WIDER  # copies that are not made leave what is there its slot for longer, as more slots would
    missed = sequences * shard.picks * (1.0 - recency[min(shard.units, at * wider // of)])
    edge = EDGE + EDGE_AT_ONCE / period
    return least + (most - least) * (1.0 + (missed / workload.inserts) ** edge) ** (
        -(POWER + POWER_LATER * log2(period)) / edge
    )


def recent_hits(shard: LinearShard, placement: LinearPlacement, sequences: int = 1) -> float:
    """`hit_rate` where all that is missed is there at the next step."""
    at = placement.expert_slots // sequences * placement.units // placement.dram_units
    return shard.curve(by_recency=True)[at]


def _late(shard: LinearShard, recent: float, period: int) -> float:
    """The share of picks that slots kept by recency would serve if their copies were there at once, and do not.

    Picks that lie no deeper in the stack than the experts of the last steps of a period are of these steps. Of those
    that were missed then, LOST are missed again; the others are popular, and were there.
    """
    if period == 1:
        return 0.0
    soon = shard.curve(by_recency=True)[round(shard.units * shard.touched(period - 1, period - 1))]
    return LOST * min(recent, soon) * (1.0 - recent)


def step_period(batch_steps: int) -> int:
    """The period of copies that take the bus so many steps: they begin when a step has ended, and are looked for
    before one begins."""
    return batch_steps + 1


def _mean_of_batches(workload: Workload, shard: LinearShard, placement: LinearPlacement, batch_steps: float) -> float:
    """`hit_rate` where copies take the bus so many steps in the mean."""
    fewer, share = int(batch_steps), batch_steps % 1
    few = hit_rate(workload, shard, placement, period=step_period(fewer))
    if not share:
        return few
    return (1.0 - share) * few + share * hit_rate(workload, shard, placement, period=step_period(fewer + 1))


def mean_hit_rate(workload: Workload, linears: Sequence[LinearPlacement], batch_steps: float = 1) -> float:
    """Over all layers with experts, the expected share of one row's picks that are in GPU memory: in expert slots, or
    at home there."""

    def share(shard: LinearShard, placement: LinearPlacement) -> float:
        hits = _mean_of_batches(workload, shard, placement, batch_steps) if placement.expert_slots else 0.0
        return (placement.gpu_units + placement.dram_units * hits) / shard.units

    found = [share(*pair) for pair in zip(workload.linears, linears, strict=True) if pair[0].picks]
    return sum(found) / len(found) if found else 0.0


def expert_slot_hits(workload: Workload, linears: Sequence[LinearPlacement], batch_steps: float = 1) -> float:
    """Over the layers with expert slots, the expected share of one row's picks that is in them; 0 without any."""
    found = [
        placement.dram_units * _mean_of_batches(workload, shard, placement, batch_steps) / shard.units
        for shard, placement in zip(workload.linears, linears, strict=True)
        if placement.expert_slots
    ]
    return sum(found) / max(1, len(found))


def expert_slots_line(workload: Workload, linears: Sequence[LinearPlacement], batch_steps: float = 1) -> str:
    """The expert slots of a plan, what they are expected to serve, and what one GiB more would; empty without any.
    batch_steps: as in `PhaseCost`, of a decode step."""
    pairs = [pair for pair in zip(workload.linears, linears, strict=True) if pair[1].expert_slots]
    if not pairs:
        return ""
    counts, size = [placement.expert_slots for _, placement in pairs], sum(expert_slot_bytes(*pair) for pair in pairs)
    measured = all(shard.heat is not None for shard, _ in pairs)
    source = "as profiled" if measured else "assumed, `hetero-attn profile --routes` follows a text"
    moves = workload.inserts and all(shard.same_bits for shard, _ in pairs)
    often = "a step" if batch_steps == 1 else f"every {batch_steps:.2g} steps, for the bus has no time for more"
    kept = f"at most {workload.inserts} a layer copied in behind {often}" if moves else "always the same experts"
    return (
        f"expert slots: {_span(counts)} a layer, {format_bytes(size)}, {kept}; expected to serve "
        f"{mean_hit_rate(workload, linears, batch_steps):.0%} of a token's picks ({source}), with 1 GiB more for them "
        f"{mean_hit_rate(workload, _with_more(workload, linears, GIB), batch_steps):.0%}"
    )


def _span(counts: Sequence[int]) -> str:
    """How many each layer has."""
    least, most = min(counts), max(counts)
    return str(least) if least == most else f"{least} to {most}"


def streams_some(placement: LinearPlacement, tier: int) -> bool:
    """Whether a row tier streams some of the experts in DRAM, which may be any, and leaves some to the CPU."""
    return 0 < placement.stream_units[tier] < placement.dram_units


def streamed_experts_line(workload: Workload, linears: Sequence[LinearPlacement]) -> str:
    """Which experts a prompt's chunk streams where it leaves some to the CPU, and what is known of them; empty where no
    layer does so."""
    tier = row_tier(workload.prefill_chunk)
    pairs = [
        (shard, placement)
        for shard, placement in zip(workload.linears, linears, strict=True)
        if shard.picks and streams_some(placement, tier)
    ]
    if not pairs:
        return ""
    counts = [placement.stream_units[tier] for _, placement in pairs]
    what = f"experts streamed to prompts: {_span(counts)} in each of {len(pairs)} layers"
    if not all(shard.same_bits for shard, _ in pairs):
        return f"{what}, always the same, as another lane gives their formats other bits"
    if any(shard.heat is None or placement.expert_slots for shard, placement in pairs):
        return f"{what}, those with the most rows before, predicted as if they were any"
    return f"{what}, those with the most rows before, as profiled at first"


def _with_more(workload: Workload, linears: Sequence[LinearPlacement], more_bytes: int) -> list[LinearPlacement]:
    """The placements with so much more memory for expert slots, all of it given to layers by equal gain."""
    at = [index for index, placement in enumerate(linears) if placement.expert_slots]
    size_bytes = sum(linears[index].expert_slots * workload.linears[index].unit_bytes for index in at)
    counts = by_equal_gain(workload, linears, at, size_bytes + more_bytes)
    return [
        replace(placement, expert_slots=counts[index]) if index in counts else placement
        for index, placement in enumerate(linears)
    ]


def by_equal_gain(
    workload: Workload, linears: Sequence[LinearPlacement], at: Sequence[int], size_bytes: int
) -> dict[int, int]:
    """How many expert slots each linear of `at` has of so much memory, by its index; as many as experts in DRAM at
    most."""
    largest = max(workload.linears[index].unit_bytes for index in at)
    curves = [workload.linears[index].curve(workload.inserts > 0)[: linears[index].dram_units + 1] for index in at]
    return dict(zip(at, by_gain(curves, size_bytes // largest), strict=True))


def with_expert_slots(placement: LinearPlacement, at_home: int, expert_slots: int) -> LinearPlacement:
    """A placement of experts with fewer of them at home on the GPU and others in expert slots; where it streams, the
    CPU computes no more experts than before."""
    streams = tuple(
        placement.units - at_home - placement.cut(tier)[2] if streamed else 0
        for tier, streamed in enumerate(placement.stream_units)
    )
    return replace(placement, gpu_units=at_home, stream_units=streams, expert_slots=expert_slots)


def expert_slots_as(
    chosen: Sequence[LinearPlacement], linears: Sequence[LinearPlacement]
) -> tuple[LinearPlacement, ...]:
    """Placements with the expert slots, and beside them the homes, of `chosen`; a layer whose homes went into slots of
    others has neither."""
    return tuple(
        own
        if (own.gpu_units, own.expert_slots) == (other.gpu_units, other.expert_slots)
        else with_expert_slots(own, other.gpu_units, other.expert_slots)
        for own, other in zip(linears, chosen, strict=True)
    )
