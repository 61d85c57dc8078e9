"""States of fixed size: what a layer without keys and values keeps of each sequence, however long that is.

They lie where the residual stream lives, one tensor a layer, one row a sequence. A step reads and writes the rows
of its sequences in place, so a step that failed half-way leaves a state that is of no use: its sequence must be closed.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext

import torch

from hetero_attn.devices import Device
from placement.plan.plan import Plan


class FixedStates:
    """float32 [max_batch, *shape] for every layer of a plan that declares such a state; false where none does.

    device: None without a GPU. Work on it goes to the GPU's compute stream.
    """

    def __init__(self, plan: Plan, device: Device | None) -> None:
        self._device = device
        self._by_layer: dict[int, torch.Tensor] = {}
        for shard in plan.workload.states:
            shape = (plan.max_batch, *shard.shape)
            if device is None:
                self._by_layer[shard.layer] = torch.zeros(shape, dtype=torch.float32, device="cpu")
            else:
                self._by_layer[shard.layer] = device.empty(shape, torch.float32, "resident")

    def __len__(self) -> int:
        return len(self._by_layer)

    def __getitem__(self, layer: int) -> torch.Tensor:
        """The states of one layer."""
        return self._by_layer[layer]

    def clear(self, sequence_id: int) -> None:
        """Begin a sequence: zeros."""
        self._queue(lambda values: values[sequence_id].zero_())

    def copy(self, to: int, source: int) -> None:
        """Begin a sequence with the state of another."""
        self._queue(lambda values: values[to].copy_(values[source]))

    def set(self, sequence_id: int, values: Mapping[int, torch.Tensor]) -> None:
        """Begin a sequence with these states, by layer."""
        with nullcontext() if self._device is None else self._device.current():
            for layer, state in values.items():
                self._by_layer[layer][sequence_id].copy_(state)

    def _queue(self, work: Callable[[torch.Tensor], object]) -> None:
        with nullcontext() if self._device is None else self._device.current():
            for values in self._by_layer.values():
                work(values)
