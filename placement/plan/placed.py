"""A placement as its different layers, each with how many there are of it: a model of 80 layers has a handful; and
what a sequence takes of its cache."""

from collections.abc import Sequence
from typing import NamedTuple

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
from placement.plan.shards import KvShard, LinearShard
from placement.plan.workload import Workload, round_up

KV_BYTES = {"gpu": kv_gpu_bytes, "pinned": kv_pinned_bytes, "host": kv_host_bytes}


class PlacedLayer(NamedTuple):
    """`times` layers, or the head, that are alike and placed alike; one of them stands for all."""

    times: int
    linears: tuple[tuple[LinearShard, LinearPlacement], ...]
    kv: tuple[KvShard, KvPlacement] | None


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
    counts: dict[tuple[object, ...], int] = {}
    first: dict[tuple[object, ...], PlacedLayer] = {}
    for layer in workload.by_layer:
        cuts = [_cut(workload.linears[i], linears[i], workload.drafting is not None) for i in layer.linears]
        cache = None if layer.kv is None else (workload.kv[layer.kv], kv[layer.kv])
        key = layer.kind, cache and (cache[1].gpu_kv_heads, cache[1].gpu_tokens), *cuts
        counts[key] = counts.get(key, 0) + 1
        if key not in first:
            first[key] = PlacedLayer(1, tuple((workload.linears[i], linears[i]) for i in layer.linears), cache)
    return tuple(layer._replace(times=counts[key]) for key, layer in first.items())


def _cut(shard: LinearShard, placement: LinearPlacement, drafts: bool) -> tuple[object, ...]:
    """What of a placement a cost depends on, with how warm experts are where some are in expert slots or streamed by
    heat, or rows are neighbours."""
    is_by_heat = placement.expert_slots or drafts or (shard.picks and placement.streams)
    warm = (placement.expert_slots, shard.heat) if is_by_heat else ()
    return placement.gpu_units, placement.stream_units, *warm


def placed_bytes(workload: Workload, layers: Sequence[PlacedLayer], place: str) -> int:
    """Bytes of weights and cache at a place (gpu | pinned | host), as `memory_report` counts them."""
    kv_bytes = KV_BYTES[place]

    def of_linear(shard: LinearShard, placement: LinearPlacement) -> int:
        own = linear_bytes(workload, shard, placement, place)
        return own + expert_slot_bytes(shard, placement) if place == "gpu" else own

    return sum(
        layer.times
        * (
            sum(of_linear(shard, placement) for shard, placement in layer.linears)
            + (kv_bytes(workload, *layer.kv) if layer.kv else 0)
        )
        for layer in layers
    )


def placed_staging_slot_bytes(workload: Workload, layers: Sequence[PlacedLayer]) -> int:
    """Size of a staging slot, as `staging_slot_bytes` counts it."""
    pieces = (
        staging_piece_bytes(shard, workload)
        for layer in layers
        for shard, placement in layer.linears
        if placement.streams
    )
    return max(pieces, default=0)


def kv_bytes_at(workload: Workload, kv: Sequence[KvPlacement], context: int) -> tuple[int, int]:
    """What one sequence of `context` tokens takes of the cache: bytes in (GPU memory, DRAM), in whole pages."""
    gpu = dram = 0
    for shard, placement in zip(workload.kv, kv, strict=True):
        tokens = min(round_up(context, workload.page_size), workload.sequence_tokens(shard))
        near = min(tokens, kv_recent_tokens(workload, shard, placement.gpu_tokens))
        gpu += placement.gpu_kv_heads * near * shard.bytes_per_token
        dram += (placement.kv_heads * tokens - placement.gpu_kv_heads * near) * shard.bytes_per_token
    return gpu, dram
