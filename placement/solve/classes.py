"""Layers that must look alike to the planner, so that 80 equal layers cost two sets of variables and not eighty.

Equal layers matter to the cost only through their totals and through how many of them hand work to the CPU, so a class
of them is described by those numbers (placement.solve.formulation) and laid out again afterwards
(placement.solve.search).
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

from placement.plan.shards import KvShard, LayerShards, LinearShard
from placement.plan.workload import Workload
from placement.policy.bounds import Bounds, KvBounds, LinearBounds

# From this many units on, one unit a layer is small enough to give equal layers equal cuts.
MANY_UNITS = 64


@dataclass(frozen=True, slots=True)
class LinearClass:
    """Equal linears of a class of layers: one shard and its bounds stand for all; indices into workload.linears."""

    shard: LinearShard
    bounds: LinearBounds
    indices: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class KvClass:
    """Equal KV shards of a class of layers; indices into workload.kv."""

    shard: KvShard
    bounds: KvBounds
    indices: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LayerClass:
    """Layers that are placed alike, up to single units. count: how many; kv is None for the head."""

    count: int
    linears: tuple[LinearClass, ...]
    kv: KvClass | None


def layer_families(workload: Workload, bounds: Bounds) -> list[list[LayerShards]]:
    """Group layers with equal shards and bounds; ordered by what they are, not by where they stand in the model."""
    known: dict[tuple[object, ...], str] = {}
    families: dict[str, list[LayerShards]] = {}
    of_linear, of_kv = ([*_numbered(of_shards)] for of_shards in (bounds.linears, bounds.kv))
    for layer in workload.by_layer:
        key = layer.kind, None if layer.kv is None else of_kv[layer.kv], *[of_linear[i] for i in layer.linears]
        if key not in known:
            known[key] = _signature(workload, bounds, layer)
        families.setdefault(known[key], []).append(layer)
    return [families[key] for key in sorted(families)]


def _numbered(bounds: Sequence[Hashable]) -> Iterator[int]:
    """A number for each of the bounds, equal ones alike. Most are one object, which is found sooner than its equals."""
    by_id: dict[int, int] = {}
    by_value: dict[Hashable, int] = {}
    for bound in bounds:
        number = by_id.get(id(bound))
        if number is None:
            number = by_id[id(bound)] = by_value.setdefault(bound, len(by_value))
        yield number


def _signature(workload: Workload, bounds: Bounds, layer: LayerShards) -> str:
    parts = [
        (
            s.kind,
            s.units,
            s.unit_bytes,
            s.unit_features,
            s.in_features,
            s.flops_per_row_per_unit,
            s.row_cut,
            s.picks,
            bounds.linears[i],
        )
        for i in layer.linears
        for s in (workload.linears[i],)
    ]
    kv = None if layer.kv is None else workload.kv[layer.kv]
    cache = (
        None if kv is None else (kv.kv_heads, kv.bytes_per_token, kv.window, kv.heads, kv.head_dim, bounds.kv[layer.kv])
    )
    return repr((parts, cache))


def layer_classes(workload: Workload, bounds: Bounds) -> list[LayerClass]:
    """One class for every family of equal layers."""
    return [_layer_class(workload, bounds, family) for family in layer_families(workload, bounds)]


def single_layers(workload: Workload, bounds: Bounds) -> list[LayerClass]:
    """Every layer in a class of its own: exact, for models of very few layers."""
    return [_layer_class(workload, bounds, [layer]) for family in layer_families(workload, bounds) for layer in family]


def _layer_class(workload: Workload, bounds: Bounds, layers: Sequence[LayerShards]) -> LayerClass:
    first = layers[0]
    linears = tuple(
        LinearClass(workload.linears[index], bounds.linears[index], tuple(layer.linears[i] for layer in layers))
        for i, index in enumerate(first.linears)
    )
    kv = (
        None
        if first.kv is None
        else KvClass(workload.kv[first.kv], bounds.kv[first.kv], tuple(layer.kv for layer in layers))
    )
    return LayerClass(len(layers), linears, kv)
