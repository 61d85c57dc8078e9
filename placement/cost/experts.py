"""What expert slots are expected to take from the CPU lane in a pass, and what keeping them up to date moves.

A layer's curve says what share of a row's picks its slots serve (placement.plan.heat). Rows of several sequences choose
apart from each other and share the slots, so each has its part of them; many rows of one prompt touch nearly every
expert, of which the slots hold their share by number.
"""

from placement.cost.terms import Call
from placement.plan.memory import LinearPlacement
from placement.plan.shards import LinearShard
from placement.plan.warm import hit_rate, step_period
from placement.plan.workload import Workload


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
    """Experts of a layer that are expected to be brought into its expert slots behind a pass: those it missed, up to
    the most that there may be, once in so many steps."""
    if not (shard.same_bits and workload.inserts):
        return 0.0
    touched, hits = shard.touched(call.rows, call.together), expert_hits(workload, shard, placement, call, batch_steps)
    return min(workload.inserts / batch_steps, touched * placement.dram_units * (1.0 - hits))
