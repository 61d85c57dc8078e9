"""Move the boundary between streamed and CPU-computed columns to where both lanes end together, from measured times.

A plan is made for the rates of a profile; a noisy neighbour or a hot processor changes them. In a row tier whose caller
waits longer for the CPU lane than that lane idles, the CPU has too much, and the other way round:

    surplus = waited - (wall - cpu)          seconds by which the CPU lane is behind the other side
    bytes   = surplus / 2 / (1 / B_cpu + 1 / B_h2d)

Only integers of the cut change: no weight moves, homes stay, no staging slot is ever too small, and what the user fixed
stays fixed. Pure: the same times give the same plan.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from placement.machine.hardware import HardwareProfile
from placement.plan.memory import LinearPlacement
from placement.plan.plan import Plan
from placement.plan.shards import LinearShard
from placement.plan.workload import NUM_ROW_TIERS
from placement.policy.bounds import Bounds
from placement.solve.pairing import first_names

# Lanes that end within this share of a step of each other are balanced: less is noise.
HYSTERESIS = 0.1
# Most of a linear's DRAM units that change lanes at once, so that one disturbed measurement does little.
MOST_SHARE = 1 / 8
# From this tier on a call is a prompt, whose head computes a single row and so another tier.
PROMPT_TIER = NUM_ROW_TIERS - 1


@dataclass(frozen=True, slots=True)
class LaneTimes:
    """Means over measured steps of one row tier, in seconds: of a step, of the CPU lane at work in it, and for which
    the caller waited for the CPU lane."""

    wall_s: float
    cpu_s: float
    waited_s: float

    @property
    def surplus_s(self) -> float:
        """By how much the CPU lane is behind the other side; negative when it waits for that."""
        return self.waited_s - max(0.0, self.wall_s - self.cpu_s)


def movable(plan: Plan, bounds: Bounds) -> tuple[dict[str, int], ...]:
    """By row tier, the linears whose boundary may move and the most units of each that may be streamed.

    A linear may stream if the plan streams it in some tier: only then is it page-locked. qkv stays: its cut follows the
    owners of the cache. So do both linears of a paired block, which move as a whole. Empty without a staging ring.
    """
    tiers: tuple[dict[str, int], ...] = tuple({} for _ in range(NUM_ROW_TIERS))
    whole = {name for pair in first_names(plan.workload).items() for name in pair}
    for shard, placement, bound in zip(plan.workload.linears, plan.linears, bounds.linears, strict=True):
        if (
            plan.staging_slots
            and not shard.per_kv_head
            and shard.name not in whole
            and (placement.streams or plan.workload.elastic)
        ):
            for tier in range(NUM_ROW_TIERS):
                fixed = bound.stream[tier] is not None or bound.cpu[tier] is not None
                if not fixed and not (shard.is_head and tier == PROMPT_TIER):
                    tiers[tier][shard.name] = placement.dram_units
    return tiers


def rebalanced(
    plan: Plan, limits: Mapping[str, int], tier: int, times: LaneTimes, hardware: HardwareProfile
) -> Plan | None:
    """The plan with its boundaries of one row tier moved, or None when the lanes are balanced or nothing can move.

    limits: of this tier, by `movable` of the plan as it was loaded.
    """
    if abs(times.surplus_s) <= HYSTERESIS * times.wall_s:
        return None
    pairs = [
        (shard, placement)
        for shard, placement in zip(plan.workload.linears, plan.linears, strict=True)
        if placement.name in limits
    ]
    moved = _shift(pairs, limits, tier, _bytes_to_move(plan, tier, times, hardware))
    if not moved:
        return None
    return replace(plan, linears=tuple(moved.get(placement.name, placement) for placement in plan.linears))


def _bytes_to_move(plan: Plan, tier: int, times: LaneTimes, hardware: HardwareProfile) -> float:
    """Bytes that should go from the CPU to the stream lane; negative the other way."""
    on_cpu = sum(
        placement.cut(tier)[2] * shard.unit_bytes
        for shard, placement in zip(plan.workload.linears, plan.linears, strict=True)
    )
    largest = max(plan.workload.linears, key=lambda shard: shard.total_bytes)
    planned = hardware.cpu_linear_bytes_per_s.of(plan.workload.format_of(largest))
    cpu_bytes_per_s = on_cpu / times.cpu_s if on_cpu and times.cpu_s else planned
    return times.surplus_s / 2 / (1 / cpu_bytes_per_s + 1 / hardware.h2d_bytes_per_s)


def _shift(
    pairs: list[tuple[LinearShard, LinearPlacement]], limits: Mapping[str, int], tier: int, wanted: float
) -> dict[str, LinearPlacement]:
    """Move about `wanted` bytes, each linear in proportion to its room; at least one unit of one if there is any."""
    to_stream = wanted > 0
    rooms = [_room(placement, limits[placement.name], tier, to_stream) for _, placement in pairs]
    total = sum(room * shard.unit_bytes for room, (shard, _) in zip(rooms, pairs, strict=True))
    if not total:
        return {}
    moved, left, share = {}, abs(wanted), min(1.0, abs(wanted) / total)
    for room, (shard, placement) in zip(rooms, pairs, strict=True):
        most = max(1, int(MOST_SHARE * placement.dram_units))
        units = min(room, most, round(share * room), int(left / shard.unit_bytes + 0.5))
        if units or (not moved and room and placement is pairs[-1][1]):
            moved[placement.name] = _with_stream(placement, tier, max(1, units) if to_stream else -max(1, units))
            left = max(0.0, left - units * shard.unit_bytes)
    return moved


def _room(placement: LinearPlacement, limit: int, tier: int, to_stream: bool) -> int:
    streamed = placement.stream_units[tier]
    return max(0, limit - streamed) if to_stream else streamed


def _with_stream(placement: LinearPlacement, tier: int, more: int) -> LinearPlacement:
    streams = list(placement.stream_units)
    streams[tier] += more
    return replace(placement, stream_units=tuple(streams))
