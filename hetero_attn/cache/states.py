"""States of fixed size: what a layer without keys and values keeps of each sequence, however long that is.

They lie where the residual stream lives, one tensor a layer, one row a sequence. A step reads and writes the rows
of its sequences in place, so a step that failed half-way leaves a state that is of no use: its sequence must be closed.

A state cannot forget, so it takes in of a step with drafts the first row of every sequence alone: drafts go on from it
in a spare state, which each layer writes again, and leave what their rows were made of. Those that are right are taken
in before the next step, by the same operation. That costs a state's way to memory and back once more, whatever was
drafted; a copy of the state to go back to, or one behind every row, would cost it for each of them.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext

import torch

from hetero_attn.devices import Device
from placement.plan.plan import Plan


class FixedStates:
    """float32 [max_batch, *shape] for every layer of a plan that declares such a state; false where none does.

    device: None without a GPU. Work on it goes to the GPU's compute stream. spare: a state of each sequence, which
    drafts of a layer leave behind; None where there are no drafts. take_in(sequence id, first, count): moves states on
    by rows of the last step that were drafts; who computes steps says how.
    """

    take_in: Callable[[int, int, int], None]

    def __init__(self, plan: Plan, device: Device | None) -> None:
        self._device = device
        self._by_layer: dict[int, torch.Tensor] = {}
        for shard in plan.workload.states:
            shape = (plan.max_batch, *shard.shape)
            self._by_layer[shard.layer] = self._empty(shape)
        rows = self._rows = plan.workload.draft_rows
        self._drafted: dict[int, tuple[int, int]] = {}  # sequence id -> (first row, count) of drafts of the last step
        self._of_drafts: dict[int, torch.Tensor] = {}
        self.spare: torch.Tensor | None = None
        if rows:
            widest = max(plan.workload.states, key=lambda shard: shard.bytes_per_sequence)
            self.spare = self._empty((plan.max_batch, *widest.shape))
            self._of_drafts = {each.layer: self._empty((rows, each.draft_features)) for each in plan.workload.states}
            self._first_id = self._empty((rows,), torch.int64)
            self._queue(lambda values: values.zero_(), self._first_id)

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        if self._device is None:
            return torch.zeros(shape, dtype=dtype, device="cpu")
        return self._device.empty(shape, dtype, "resident")

    def __len__(self) -> int:
        return len(self._by_layer)

    def __getitem__(self, layer: int) -> torch.Tensor:
        """The states of one layer."""
        return self._by_layer[layer]

    def holds(self, rows: int) -> bool:
        """Whether some of so many rows of a step may be drafts."""
        return rows <= self._rows

    def rows_of_drafts(self, layer: int, first: int, count: int) -> torch.Tensor:
        """What rows [first, first + count) of a step with drafts leave in a layer: float32 [count, draft_features]."""
        return self._of_drafts[layer][first : first + count]

    def of_one(self, layer: int, sequence_id: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The state of one sequence alone, [1, *shape], and int64 [rows], by which each of so many rows finds it."""
        return self._by_layer[layer][sequence_id : sequence_id + 1], self._first_id[:rows]

    def drafted(self, sequence_id: int, first: int, count: int) -> None:
        """Rows [first, first + count) of the last step were a sequence's drafts; until it says how many are wrong, all
        are right."""
        self._drafted[sequence_id] = first, count

    def waiting(self, sequence_id: int) -> int:
        """How many of its newest tokens a sequence's state has not taken in yet."""
        return self._drafted.get(sequence_id, (0, 0))[1]

    def take_back(self, sequence_id: int, count: int) -> None:
        """The last `count` of a sequence's drafts are wrong."""
        if count:
            first, drafted = self._drafted[sequence_id]
            self._drafted[sequence_id] = first, drafted - count

    def settle(self) -> None:
        """Take in the drafts that are right, before what they left is overwritten or a state is read."""
        while self._drafted:
            sequence_id, (first, count) = self._drafted.popitem()
            if count:
                self.take_in(sequence_id, first, count)

    def forget(self, sequence_id: int) -> None:
        """A sequence ends; nothing more is taken in."""
        self._drafted.pop(sequence_id, None)

    def clear(self, sequence_id: int) -> None:
        """Begin a sequence: zeros."""
        self._queue(lambda values: values[sequence_id].zero_())

    def copy(self, to: int, source: int) -> None:
        """Begin a sequence with the state of another."""
        self.settle()
        self._queue(lambda values: values[to].copy_(values[source]))

    def set(self, sequence_id: int, values: Mapping[int, torch.Tensor]) -> None:
        """Begin a sequence with these states, by layer."""
        with nullcontext() if self._device is None else self._device.current():
            for layer, state in values.items():
                self._by_layer[layer][sequence_id].copy_(state)

    def _queue(self, work: Callable[[torch.Tensor], object], *tensors: torch.Tensor) -> None:
        with nullcontext() if self._device is None else self._device.current():
            for values in tensors or self._by_layer.values():
                work(values)
