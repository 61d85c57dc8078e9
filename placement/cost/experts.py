"""What expert slots are expected to take from the CPU lane in a pass, and what keeping them up to date moves; and what
the CPU's experts are chosen less than others where the warmest are streamed.

A layer's curve says what share of a row's picks its slots serve (placement.plan.heat). Rows of several sequences choose
apart from each other and share the slots, so each has its part of them; many rows of one prompt touch nearly every
expert, of which the slots hold their share by number.
"""

from typing import NamedTuple

from placement.cost.terms import Call
from placement.plan.memory import LinearPlacement
from placement.plan.shards import LinearShard
from placement.plan.warm import STILL_POPULAR, hit_rate, recent_hits, step_period, streams_some
from placement.plan.workload import Workload, row_tier

# That a batch of copies into expert slots may take. At the last one none are counted: they hardly serve.
BATCH_STEPS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)


def expert_hits(
    workload: Workload, shard: LinearShard, placement: LinearPlacement, call: Call, batch_steps: int
) -> float:
    """The expected share, of the experts that a pass reads, that are in expert slots. batch_steps: as for
    `step_period`."""
    hits = hit_rate(workload, shard, placement, call.sequences, step_period(batch_steps))
    return shard.served(call.rows, placement.expert_slots, hits)


def inserted_experts(
    workload: Workload, shard: LinearShard, placement: LinearPlacement, call: Call, batch_steps: int
) -> float:
    """Experts of a layer that are expected to be brought into its expert slots behind a pass, in the mean of a batch's
    period: what passes miss meanwhile, up to the most that a batch may have."""
    if not (shard.same_bits and workload.inserts) or batch_steps == BATCH_STEPS[-1]:
        return 0.0
    touched, recent = shard.touched(call.rows, call.together), recent_hits(shard, placement, call.sequences)
    missed = touched * placement.dram_units * (1.0 - shard.served(call.rows, placement.expert_slots, recent))
    return min(workload.inserts / step_period(batch_steps), missed)


class RowsOfLanes(NamedTuple):
    """Rows that experts of either lane count as having, where an expert that is chosen as often as others has all."""

    cpu: float
    gpu: float


def rows_of_lanes(shard: LinearShard, placement: LinearPlacement, rows: int) -> RowsOfLanes:
    """Where a pass streams the experts that were warm before, those on the CPU are chosen less, those on the GPU more.

    By a profile's most popular experts, of whose popularity STILL_POPULAR is left in another text; of those in DRAM as
    of all, for which are at home on the GPU is not by heat. Nothing is known without a profile, nor where expert slots
    hold some of the warmest already: then an expert on either lane counts as any.
    """
    any_lane = RowsOfLanes(rows, rows)
    tier = row_tier(rows)
    if shard.heat is None or not shard.same_bits or placement.expert_slots or not streams_some(placement, tier):
        return any_lane
    home, streamed, on_cpu = placement.cut(tier)
    share = streamed / placement.dram_units
    popular = shard.heat.fixed[streamed * shard.units // placement.dram_units]
    left = (1.0 - share - STILL_POPULAR * (popular - share)) * placement.dram_units / shard.units
    cpu, gpu = left * shard.units / on_cpu, (1.0 - left) * shard.units / (home + streamed)
    return RowsOfLanes(rows * cpu, rows * gpu) if cpu < 1.0 else any_lane
