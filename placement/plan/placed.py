"""A placement as its different layers, each with how many there are of it: a model of 80 layers has a handful; and
what a sequence takes of its cache."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from placement.plan.memory import (
    KvPlacement,
    LinearPlacement,
    expert_slot_bytes,
    kv_gpu_bytes,
    kv_host_bytes,
    kv_pinned_bytes,
    kv_recent_tokens,
    linear_bytes,
    staging_piece_bytes,
)
from placement.plan.shards import KvShard, LayerShards, LinearShard
from placement.plan.workload import Workload, round_up

KV_BYTES = {"gpu": kv_gpu_bytes, "pinned": kv_pinned_bytes, "host": kv_host_bytes}


class PlacedLayer(NamedTuple):
    """`times` layers, or the head, that are alike and placed alike; one of them stands for all. key: what they have in
    common, and no other layer of any placement of the workload has."""

    times: int
    linears: tuple[tuple[LinearShard, LinearPlacement], ...]
    kv: tuple[KvShard, KvPlacement] | None
    key: tuple[Any, ...]

    @property
    def has_expert_slots(self) -> bool:
        """Whether some of it is in expert slots."""
        return any(placement.expert_slots for _, placement in self.linears)

    def key_of(self, tier: int, head_tier: int) -> tuple[object, ...]:
        """The key less what other row tiers stream: layers that share it are alike in a pass of these tiers."""
        kind, cache, *cuts = self.key
        at = head_tier if self.linears and self.linears[0][0].is_head else tier
        return kind, cache, *[(home, streams[at], *warm) for home, streams, *warm in cuts]


def placed_layers(
    workload: Workload, linears: Sequence[LinearPlacement], kv: Sequence[KvPlacement]
) -> tuple[PlacedLayer, ...]:
    """The different layers of placements in workload order: those that differ in nothing a cost or a size depends on
    are one. Raises ValueError for another number of placements than shards."""
    if (len(linears), len(kv)) != (len(workload.linears), len(workload.kv)):
        raise ValueError(
            f"workload {workload.model} has {len(workload.linears)} linears and {len(workload.kv)} caches, got "
            f"placements of {len(linears)} and {len(kv)}"
        )
    cuts = _cuts(workload, linears)
    caches = [(placed.gpu_kv_heads, placed.gpu_tokens) for placed in kv]
    alike: dict[tuple[object, ...], list[LayerShards]] = {}
    for layer in workload.by_layer:
        kind, indices, at = layer
        key = kind, None if at is None else caches[at], *[cuts[i] for i in indices]
        layers = alike.get(key)
        if layers is None:
            alike[key] = [layer]
        else:
            layers.append(layer)

    def placed(key: tuple[object, ...], layers: list[LayerShards]) -> PlacedLayer:
        first = layers[0]
        cache = None if first.kv is None else (workload.kv[first.kv], kv[first.kv])
        return PlacedLayer(len(layers), tuple((workload.linears[i], linears[i]) for i in first.linears), cache, key)

    return tuple(placed(key, layers) for key, layers in alike.items())


def _cuts(workload: Workload, linears: Sequence[LinearPlacement]) -> list[tuple[object, ...]]:
    """What of each placement a cost depends on, with how warm experts are where some are in expert slots or streamed by
    heat, or rows are neighbours."""
    drafts = workload.drafting is not None
    return [
        (placed.gpu_units, placed.stream_units, placed.expert_slots, shard.heat)
        if placed.expert_slots or drafts or shard.picks and placed.streams
        else (placed.gpu_units, placed.stream_units)
        for shard, placed in zip(workload.linears, linears, strict=True)
    ]


class LayerBytes(NamedTuple):
    """What a layer takes by place, as `memory_report` counts weights, expert slots and cache; and the largest staging
    slot that it needs."""

    gpu: int
    pinned: int
    host: int
    staging_slot: int


def layer_bytes(workload: Workload, layer: PlacedLayer) -> LayerBytes:
    """What one layer takes."""

    def at(place: str) -> int:
        weights = sum(linear_bytes(workload, shard, placement, place) for shard, placement in layer.linears)
        return weights + (KV_BYTES[place](workload, *layer.kv) if layer.kv else 0)

    expert_slots = sum(expert_slot_bytes(shard, placement) for shard, placement in layer.linears)
    pieces = (staging_piece_bytes(shard, workload) for shard, placement in layer.linears if placement.streams)
    return LayerBytes(at("gpu") + expert_slots, at("pinned"), at("host"), max(pieces, default=0))


def kv_bytes_at(workload: Workload, kv: Sequence[KvPlacement], context: int) -> tuple[int, int]:
    """What one sequence of `context` tokens takes of the cache: bytes in (GPU memory, DRAM), in whole pages."""
    gpu = dram = 0
    for shard, placement in zip(workload.kv, kv, strict=True):
        tokens = min(round_up(context, workload.page_size), workload.sequence_tokens(shard))
        near = min(tokens, kv_recent_tokens(workload, shard, placement.gpu_tokens))
        gpu += placement.gpu_kv_heads * near * shard.bytes_per_token
        dram += (placement.kv_heads * tokens - placement.gpu_kv_heads * near) * shard.bytes_per_token
    return gpu, dram
