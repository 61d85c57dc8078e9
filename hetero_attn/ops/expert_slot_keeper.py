"""Which experts are in a model's expert slots: those chosen last, brought there by copies that no step waits for.

Between two steps alone, and for all layers at once:

    note     what a step chose is read; where an expert outside was chosen later than one inside, the one inside leaves
             the table and the other one's copy into its slot begins, at most `inserts` a layer
    settle   once all copies of a batch have been made, the table has their experts

So a slot that the table names is never written, and the table names none that is not whole: a step whose experts are
not there yet has the CPU compute them where they are. Layers whose formats give other bits on another lane keep the
experts that they were loaded with, since otherwise a token would depend on what was asked before.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from hetero_attn.lanes.lanes import Lanes
from hetero_attn.ops.expert_slots import NOTED_ROWS, ExpertSlots
from hetero_attn.ops.linear import LinearWeights
from placement.plan.heat import ExpertHeat
from placement.plan.memory import LinearPlacement
from placement.plan.plan import Plan
from placement.plan.shards import LinearShard

KIND = "expert_slots"
EVERY_STEPS = 8  # one is observed: heat changes slowly, and Python's time a token counts
LEAST_OBSERVED = 64  # steps, before what was observed is worth more than what was known
NEVER = torch.iinfo(torch.int64).max


class Noted(NamedTuple):
    """What a step's last rows chose, over all layers: picks, those of them in expert slots, and copies then begun."""

    picks: int
    hits: int
    inserts: int


class _Layer(NamedTuple):
    """A layer that has expert slots; into, experts: views of each slot and of each expert in DRAM, made once."""

    linear: LinearWeights
    slots: ExpertSlots
    into: tuple[torch.Tensor, ...]
    experts: tuple[torch.Tensor, ...]

    def copy_in(self, lanes: Lanes, slot: int, expert: int, stream: Any) -> None:
        """Queue the copy of an expert into a slot that no table names."""
        lanes.device.copy(self.into[slot], self.experts[expert - self.linear.first_dram_unit], stream)


class _Exchanges(NamedTuple):
    """Experts that come into slots, int64 [experts] each: which layer, which slot, which expert."""

    layers: np.ndarray
    slots: np.ndarray
    experts: np.ndarray


class SlotKeeper:
    """The expert slots of all layers of an engine, by one plan after another. changes: how often tables changed."""

    def __init__(self, lanes: Lanes) -> None:
        self._lanes = lanes
        self.changes = 0
        self._layers: list[_Layer] = []
        self._inside: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._owned: list[torch.Tensor] = []
        self._pinned: list[torch.Tensor] = []
        self._names: list[str] = []
        self._last = self._depths = self._picked = torch.empty(0, 0, dtype=torch.int64, device="cpu")
        self._clock = self._steps = 0
        self._forget()

    def _forget(self) -> None:
        self._arriving: _Exchanges | None = None
        self._arrived: Any = None
        self._is_changed = False

    def open(self, linears: Sequence[LinearWeights], plan: Plan) -> None:
        """Take GPU memory for the plan's slots and fill them: with the experts used last, at first with the most
        popular. Raises MemoryBudgetError, and may then be closed."""
        found = [
            (linear, shard, placement)
            for linear, shard, placement in zip(linears, plan.workload.linears, plan.linears, strict=True)
            if placement.expert_slots
        ]
        if not found:
            return
        self._inserts = plan.workload.inserts
        experts, counts = found[0][1].units, [placement.expert_slots for _, _, placement in found]
        self._may_change = torch.tensor([[shard.same_bits] for _, shard, _ in found], device="cpu")
        at_home = torch.tensor([[placement.gpu_units] for _, _, placement in found], device="cpu")
        self._is_outside = torch.arange(experts, device="cpu") >= at_home
        self._make_tables(len(found), experts, counts, found[0][1].picks)
        names = [shard.name for _, shard, _ in found]
        if names != self._names:
            self._names = names
            self._last = torch.stack([_ranks(shard) for _, shard, _ in found])
            self._depths = torch.zeros(len(found), experts + 2, dtype=torch.int64, device="cpu")
            self._picked = torch.zeros_like(self._last)
        for index, (linear, _, placement) in enumerate(found):
            self._open_layer(index, linear, placement)
        self._is_changed = True
        self.settle()

    def _make_tables(self, layers: int, experts: int, counts: Sequence[int], picks: int) -> None:
        """Tables of all layers in one piece, so that one copy brings them over; what each step chose likewise."""
        device, size = self._lanes.device, layers * experts + sum(counts)
        self._on_device = self._own(device.empty((size,), torch.int32, KIND))
        self._on_host = self._pin(device.host_empty((size,), torch.int32, "tables"))
        self._chosen = self._pin(device.host_empty((layers, NOTED_ROWS, picks), torch.int32, "tables"))
        self._mirror = torch.full((size,), -1, dtype=torch.int32, device="cpu")
        self._table = self._mirror[: layers * experts].view(layers, experts)
        self._held = self._mirror[layers * experts :]
        self._first_held = np.cumsum([0, *counts[:-1]])
        self._first_of = experts * np.arange(layers)[:, None]  # of a layer, among the experts of all

    def _open_layer(self, index: int, linear: LinearWeights, placement: LinearPlacement) -> None:
        lanes, (layers, experts), count = self._lanes, self._table.shape, placement.expert_slots
        tables, held = self._on_device[: layers * experts].view(layers, experts), self._on_device[layers * experts :]
        memory = lanes.device.empty((count, linear.dram.shape[1]), torch.uint8, KIND)
        first = int(self._first_held[index])
        slots = ExpertSlots(self._own(memory), tables[index], held[first : first + count], self._chosen[index])
        self._layers.append(_Layer(linear, slots, memory.unbind(0), linear.dram.unbind(0)))
        latest = torch.where(self._is_outside[index], self._last[index], -NEVER).argsort(descending=True)[:count]
        for slot, expert in enumerate(latest.tolist()):
            self._layers[-1].copy_in(lanes, slot, expert, lanes.device.compute)
        self._seat(_Exchanges(np.full(count, index), np.arange(count), latest.numpy()))
        linear.expert_slots = slots
        self._inside[linear.spec.name] = self._table[index].numpy(), self._held[first : first + count].numpy()

    def _seat(self, coming: _Exchanges) -> None:
        """Let the table name slots whose experts are there."""
        self.changes += 1
        self._table.numpy()[coming.layers, coming.experts] = coming.slots
        self._held.numpy()[self._first_held[coming.layers] + coming.slots] = coming.experts

    def inside(self, name: str) -> tuple[np.ndarray, np.ndarray] | None:
        """A layer's table and what each of its slots holds, as steps find them once they are settled, by the name of
        its linear: int32 [experts] and [slots], -1 for none; None where it has no expert slots."""
        return self._inside.get(name)

    def _own(self, memory: torch.Tensor) -> torch.Tensor:
        self._owned.append(memory)
        return memory

    def _pin(self, memory: torch.Tensor) -> torch.Tensor:
        self._pinned.append(memory)
        return memory

    def close(self) -> None:
        """Give all memory back, when nothing is queued that could use it but copies into slots; idempotent."""
        if self._arrived is not None:
            self._lanes.device.synchronize(self._arrived)
        for layer in self._layers:
            layer.linear.expert_slots = None
        self._layers.clear()
        self._inside.clear()
        self.changes += 1
        while self._owned:
            self._lanes.device.release(self._owned.pop(), KIND)
        while self._pinned:
            self._lanes.device.host_release(self._pinned.pop(), "tables")
        self._forget()

    def settle(self) -> None:
        """Before a step, while nothing runs that reads the tables: bring them over if they have changed."""
        if not self._layers:
            return
        if self._arrived is not None and self._lanes.device.is_reached(self._arrived):
            self._seat(self._arriving)
            self._arriving, self._arrived, self._is_changed = None, None, True
        if self._is_changed:
            self._on_host.copy_(self._mirror)
            self._lanes.copy(self._on_device, self._on_host)
            self._is_changed = False

    def note(self, rows: int) -> Noted:
        """After a step of so many rows that has ended: count its picks, and begin to bring in what they miss."""
        if not self._layers:
            return Noted(0, 0, 0)
        # numpy: an operation on tables of this size takes it a microsecond or two, torch three to twenty times that.
        chosen = self._chosen.numpy()[:, : min(rows, NOTED_ROWS)].reshape(len(self._layers), -1)
        at = self._first_of + chosen
        hits = int(np.count_nonzero(self._table.numpy().ravel()[at] >= 0))
        self._steps += rows == 1
        if rows == 1 and self._steps % EVERY_STEPS == 0:
            self._observe(torch.from_numpy(chosen).long())
        # Later than all times before; of an expert that several rows chose the last one stays.
        self._last.numpy().ravel()[at] = np.arange(self._clock + 1, self._clock + 1 + chosen.shape[1])
        self._clock += chosen.shape[1]
        inserts = 0 if self._arrived is not None or not self._inserts else self._bring_in(self._leave())
        return Noted(chosen.size, hits, inserts)

    def _observe(self, chosen: torch.Tensor) -> None:
        """Count how many experts were chosen since each pick's last time, at the place behind all for the first time;
        chosen: int64 [layers, picks] of one row."""
        last, one = self._last.gather(1, chosen), torch.ones_like(chosen)
        depths = (self._last[:, None] > last[:, :, None]).sum(-1) + 1
        depths[last <= 0] = self._depths.shape[1] - 1
        self._depths.scatter_add_(1, depths, one)
        self._picked.scatter_add_(1, chosen, one)

    def heats(self) -> dict[str, ExpertHeat]:
        """How warm the experts of every layer with expert slots were over the steps of one row so far, by name; empty
        before enough of them."""
        if not self._layers or self._steps < LEAST_OBSERVED * EVERY_STEPS:
            return {}
        total = self._picked.sum(1, keepdim=True)
        recent, popular = (
            self._depths[:, :-1].cumsum(1) / total,
            self._picked.argsort(dim=1, descending=True, stable=True),
        )
        fixed = torch.nn.functional.pad(self._picked.gather(1, popular).cumsum(1) / total, (1, 0))

        def of(index: int) -> ExpertHeat:
            served, kept, ids = (tuple(values[index].tolist()) for values in (recent, fixed, popular))
            return ExpertHeat(served, kept, ids)

        return {layer.linear.spec.name: of(index) for index, layer in enumerate(self._layers)}

    def _leave(self) -> _Exchanges:
        """Take the experts out of the table that were chosen earlier than some outside; those come into their slots."""
        table, last = self._table.numpy(), self._last.numpy()
        is_inside, count = table >= 0, min(self._inserts, table.shape[1])
        waiting = np.where(self._is_outside.numpy() & ~is_inside, last, -NEVER)
        staying = np.where(is_inside, last, NEVER)
        newest, outside = (found.numpy() for found in torch.from_numpy(waiting).topk(count, 1))
        oldest, inside = (found.numpy() for found in torch.from_numpy(staying).topk(count, 1, largest=False))
        layers, places = ((newest > oldest) & self._may_change.numpy()).nonzero()
        leaving, coming = inside[layers, places], outside[layers, places]
        slots = table[layers, leaving]
        table[layers, leaving] = -1
        self.changes += len(layers)
        return _Exchanges(layers, slots, coming)

    def _bring_in(self, coming: _Exchanges) -> int:
        """Begin to copy experts into slots that no step reads any more: the last one has ended, and the next one waits
        for nothing."""
        each = list(zip(*(values.tolist() for values in coming), strict=True))
        for index, slot, expert in each:
            self._layers[index].copy_in(self._lanes, slot, expert, self._lanes.device.copies)
        if each:
            self._arriving, self._is_changed = coming, True
            self._arrived = self._lanes.device.record(self._lanes.device.copies)
        return len(each)


def _ranks(shard: LinearShard) -> torch.Tensor:
    """A time before all steps for every expert, the most popular last: int64 [experts]."""
    popular = range(shard.units) if shard.heat is None else shard.heat.popular
    times = torch.empty(shard.units, dtype=torch.int64, device="cpu")
    times[list(popular)] = -torch.arange(1, shard.units + 1, device="cpu")
    return times
