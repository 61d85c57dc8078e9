"""Which shard an operation of a traced step works on, told from the memory that it reads.

Weights, norms and pages belong to one shard each. A copy ahead of use hands its source's name on to the buffer that it
fills. What reads activations alone belongs to the layer of the operation before it on its lane.
"""

from bisect import bisect_right
from typing import Any

import torch

from hetero_attn.engine.engine import Engine
from hetero_attn.tools.timeline.recorded_ops import tensors_in


class ShardNames:
    """Names of the shards of one engine by the addresses of their memory, which must not move while this is used."""

    def __init__(self, engine: Engine) -> None:
        found = _ranges("embed", (engine.weights.embed,))  # of a tied head the rows are named after that
        for linear in engine.weights.linears:
            found += _ranges(linear.spec.name, (linear.dram, linear.gpu))
        for index, layer in enumerate(engine.weights.layers):
            for block in layer:
                found += _ranges(f"layers.{index}.norm", tuple(vector.main for vector in block.vectors.values()))
        for index, (pool, place) in engine.kv_cache.places.items():
            for store in engine.kv_cache.pools[pool].stores.values():
                found += _ranges(f"layers.{index}.kv", (store.k[place], store.v[place]))
        found += _ranges("final_norm", tuple(vector.main for vector in engine.weights.head.vectors.values()))
        self._ranges = sorted(found)
        self._starts = [start for start, _, _ in self._ranges]
        self._buffers: dict[int, str] = {}
        self._layers: dict[str, str] = {}

    def of(self, lane: str, arguments: tuple[Any, ...]) -> str:
        """The shard that an operation reads, else the layer that its lane is in; empty before the first."""
        for tensor in tensors_in(arguments):
            if name := self._of(tensor):
                self._layers[lane] = _layer_of(name)
                return name
        return self._layers.get(lane, "")

    def of_copy(self, lane: str, target: torch.Tensor, source: torch.Tensor) -> str:
        """The shard whose bytes a copy moves; what reads the target later reads that shard."""
        name = self._of(source)
        if name:
            self._buffers[target.data_ptr()] = name
        return name or self._of(target) or self._layers.get(lane, "")

    def _of(self, tensor: torch.Tensor) -> str:
        address = tensor.data_ptr()
        place = bisect_right(self._starts, address) - 1
        if place >= 0 and address < self._ranges[place][1]:
            return self._ranges[place][2]
        return self._buffers.get(address, "")


def _ranges(name: str, tensors: tuple[torch.Tensor | None, ...]) -> list[tuple[int, int, str]]:
    held = [tensor for tensor in tensors if tensor is not None and tensor.numel()]
    return [(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes, name) for tensor in held]


def _layer_of(name: str) -> str:
    """`layers.3` of `layers.3.qkv`; a name outside the layers stays as it is."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] == "layers" else name
