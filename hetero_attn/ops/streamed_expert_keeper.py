"""Which experts the passes of a model stream: of every layer those that had the most rows lately.

Between two passes alone, and for all layers at once:

    settle   before a pass: where more is known than when its row tier's experts were chosen, they are chosen anew; the
             table of the pass is brought over, with the expert slots and with what it will stream
    note     after it has ended: the rows that each expert had are counted

What was counted fades, half of it for every HALF_LIFE_ROWS rows; at first a profile of the model counts as
PROFILE_ROWS, and where there is none the first experts are taken. Those in expert slots are not streamed, as long as
others are left. An expert that is chosen now and not next time costs nothing but time: only layers whose formats give
the same bits on every lane are here, in row tiers that stream some of their experts in DRAM and leave some to the CPU.
Steps that were captured copy from where they did, so the experts of their row tier stay what they are.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from hetero_attn.lanes.lanes import Lanes
from hetero_attn.lanes.tables import StepTables
from hetero_attn.ops.expert_slot_keeper import SlotKeeper
from hetero_attn.ops.experts import copied_experts
from hetero_attn.ops.linear import LinearWeights
from hetero_attn.ops.streamed_experts import Streamed, StreamedExperts, pieces_of
from hetero_attn.spec.workload import streamed_expert_table_bytes
from placement.plan.plan import Plan
from placement.plan.shards import LinearShard
from placement.plan.warm import streams_some
from placement.plan.workload import NUM_ROW_TIERS

HALF_LIFE_ROWS = 512  # over a trained mixture's routes 64 to 8192 serve shares of the picks within 1.4 points
PROFILE_ROWS = 64  # another text's popular experts are worth few rows of this one


class Counted(NamedTuple):
    """What passes that streamed experts by heat chose, over their layers: picks, those of streamed experts, experts
    that were streamed, and all that could have been."""

    picks: int = 0
    streamed_picks: int = 0
    streamed: int = 0
    in_dram: int = 0


class StreamKeeper:
    """What all layers of an engine stream by heat, by one plan after another."""

    def __init__(self, lanes: Lanes, expert_slots: SlotKeeper) -> None:
        self._lanes, self._expert_slots = lanes, expert_slots
        self._linears: list[LinearWeights] = []
        self._tables: StepTables | None = None
        self._close()

    def _close(self) -> None:
        self._layers_of: list[list[int]] = [[] for _ in range(NUM_ROW_TIERS)]
        self._chosen_at: dict[int, int] = {}  # by row tier, how many passes had been counted
        self._seated: tuple[int, int] | None = None
        self._to_count: tuple[int, int] | None = None
        self._has_run = True

    def open(self, linears: Sequence[LinearWeights], plan: Plan) -> None:
        """Take over a plan's row tiers; what was counted stays. Raises MemoryBudgetError."""
        if self._lanes.device is None:
            return
        shards = [shard for shard in plan.workload.linears if shard.picks and shard.same_bits]
        if shards and self._tables is None:
            by_name = {linear.spec.name: linear for linear in linears}
            self._linears = [by_name[shard.name] for shard in shards]
            self._make_tables(shards)
        self._close()
        for linear in self._linears:
            linear.streamed_experts.by_tier.clear()
        for tier, layers in enumerate(self._layers_of):
            for index, linear in enumerate(self._linears):
                if streams_some(linear.placement, tier):
                    layers.append(index)

    def _make_tables(self, shards: Sequence[LinearShard]) -> None:
        count, experts = len(shards), max(shard.units for shard in shards)
        self._tables = StepTables(self._lanes.device, streamed_expert_table_bytes(shards))
        self._mirror = torch.full((count, 2 * experts), -1, dtype=torch.int32, device="cpu")
        size = self._mirror.nbytes
        on_device = self._tables.buffers[1][:size].view(torch.int32).view(count, 2 * experts)
        starts = self._lanes.device.host_empty((count, 2 * experts + 1), torch.int32, "tables")
        self._starts, self._experts, self._passes = starts.zero_().numpy(), experts, 0
        self._heat = np.stack([_known(shard, experts) for shard in shards])
        for index, linear in enumerate(self._linears):
            table, held = on_device[index].tensor_split(2)
            linear.streamed_experts = StreamedExperts(table[: shards[index].units], held, starts[index])

    @property
    def knows_nothing(self) -> bool:
        """Whether the first pass is to be counted before another one, since nothing says which experts are warm."""
        return self._to_count is not None and not self._heat.any()

    def settle(self, tier: int, is_captured: bool) -> None:
        """Before a pass of a row tier, and before its inputs are queued; is_captured: whether recorded copies of it are
        made again. What was not noted by now is not counted."""
        self._to_count, layers = None, self._layers_of[tier]
        if not layers:
            return
        if not self._has_run:  # given up half-way, perhaps before its table was there
            self._seated = None
        self._has_run = False
        if tier not in self._chosen_at or (self._chosen_at[tier] < self._passes and not is_captured):
            self._choose(tier, layers)
        if self._seated != (tier, self._expert_slots.changes):
            self._seat(tier, layers)

    def _choose(self, tier: int, layers: Sequence[int]) -> None:
        self._chosen_at[tier] = self._passes
        warmest = np.argsort(-self._heat, axis=1, kind="stable")
        for index in layers:
            linear, order = self._linears[index], warmest[index]
            placement, inside = linear.placement, self._inside(linear)
            may = np.arange(self._experts) >= placement.gpu_units
            may[placement.units :] = False
            if inside is not None:
                may[: placement.units] &= inside[0] < 0
            count = min(placement.stream_units[tier], placement.dram_units - placement.expert_slots)
            ids = tuple(np.sort(order[may[order]][:count]).tolist())
            before = linear.streamed(tier)
            if before is None or before.ids != ids:
                pieces = pieces_of(ids, linear.dram, linear.first_dram_unit, linear.piece_blocks)
                linear.streamed_experts.by_tier[tier] = Streamed(ids, pieces)
                self._seated = None

    def _inside(self, linear: LinearWeights) -> tuple[np.ndarray, np.ndarray] | None:
        return self._expert_slots.inside(linear.spec.name)

    def _seat(self, tier: int, layers: Sequence[int]) -> None:
        """Number the experts that are there for a pass, in slots or streamed, and bring the table over."""
        self._seated = None  # until the copy is queued
        mirror, experts = self._mirror.numpy(), self._experts
        mirror.fill(-1)
        for index in layers:
            table, held, linear = mirror[index, :experts], mirror[index, experts:], self._linears[index]
            ids, first, inside = linear.streamed(tier).ids, linear.expert_slot_count, self._inside(linear)
            held[first : first + len(ids)] = ids
            table[list(ids)] = range(first, first + len(ids))
            if inside is not None:  # last: what is in a slot by now is computed there
                is_inside = inside[0] >= 0
                table[: len(is_inside)][is_inside] = inside[0][is_inside]
                held[:first] = inside[1]
        self._lanes.upload([self._mirror], self._tables)
        self._seated = (tier, self._expert_slots.changes)

    def ran(self, tier: int, rows: int, is_captured: bool) -> None:
        """A pass was queued, which `note` counts when it has ended unless it was captured."""
        self._has_run = True
        if self._layers_of[tier] and not is_captured:
            self._to_count = tier, rows

    def note(self) -> Counted:
        """After a pass has ended: count the rows of its experts, once."""
        if self._to_count is None:
            return Counted()
        (tier, rows), self._to_count = self._to_count, None
        self._heat *= 0.5 ** (rows / HALF_LIFE_ROWS)
        self._passes += 1
        counts = zip(*(self._count(index, tier) for index in self._layers_of[tier]), strict=True)
        return Counted(*map(sum, counts))

    def _count(self, index: int, tier: int) -> Counted:
        linear = self._linears[index]
        units, copied = linear.placement.units, copied_experts(linear, tier).count
        table = self._mirror.numpy()[index, :units]
        numbers = np.where(table >= 0, table, copied + np.arange(units))
        starts = self._starts[index]
        rows = np.maximum(starts[numbers + 1] - starts[numbers], 0)
        self._heat[index, :units] += rows
        is_streamed = table >= linear.expert_slot_count
        return Counted(
            int(rows.sum()), int(rows[is_streamed].sum()), len(linear.streamed(tier).ids), linear.placement.dram_units
        )


def _known(shard: LinearShard, experts: int) -> np.ndarray:
    """The rows of each expert that a profile of the model counts as: float64 [experts], zeros without one."""
    heat = np.zeros(experts)
    if shard.heat is not None:
        heat[list(shard.heat.popular)] = PROFILE_ROWS * shard.picks * np.diff(shard.heat.fixed)
    return heat
