"""Layers that must look alike to the planner, so that 80 equal layers cost two sets of variables and not eighty.

By convexity of the step times some optimum treats equal layers with equal roles equally, so a family of equal layers needs
as many classes as there are roles. Two suffice: `leading` layers, held whole by one side (the concentrated shape), and the
others, cut alike (the spread shape); the planner searches over how many lead.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from placement.constraints import Bounds, KvBounds, LinearBounds
from placement.workload import KvShard, LinearShard, Workload


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


@dataclass(frozen=True, slots=True)
class _Layer:
    linears: tuple[int, ...]
    kv: int | None


def layer_families(workload: Workload, bounds: Bounds) -> list[list[_Layer]]:
    """Group layers with equal shards and bounds; ordered by what they are, not by where they stand in the model."""
    members: dict[int | None, list[int]] = {}
    for index, shard in enumerate(workload.linears):
        members.setdefault(shard.layer, []).append(index)
    kv_of = {shard.layer: index for index, shard in enumerate(workload.kv)}
    families: dict[str, list[_Layer]] = {}
    for layer in [*sorted(key for key in members.keys() | kv_of.keys() if key is not None), None]:
        entry = _Layer(tuple(members.get(layer, ())), kv_of.get(layer))
        if entry.linears or entry.kv is not None:
            families.setdefault(_signature(workload, bounds, entry), []).append(entry)
    return [families[key] for key in sorted(families)]


def _signature(workload: Workload, bounds: Bounds, layer: _Layer) -> str:
    parts = [(s.kind, s.units, s.unit_bytes, s.unit_features, s.in_features, s.flops_per_row_per_unit, bounds.linears[i])
             for i in layer.linears for s in (workload.linears[i],)]
    kv = None if layer.kv is None else workload.kv[layer.kv]
    cache = None if kv is None else (kv.groups, kv.bytes_per_token, kv.window, bounds.kv[layer.kv])
    return repr((parts, cache))


def layer_classes(workload: Workload, bounds: Bounds, leading_share: float) -> list[LayerClass]:
    """Classes in which the first `leading_share` of every family stands apart. 0 gives one class a family."""
    classes = []
    for family in layer_families(workload, bounds):
        leading = round(leading_share * len(family)) if len(family) > 1 else 0
        for part in (family[:leading], family[leading:]):
            if part:
                classes.append(_layer_class(workload, bounds, part))
    return classes


def single_layers(workload: Workload, bounds: Bounds) -> list[LayerClass]:
    """Every layer in a class of its own: exact, for models of a few layers."""
    return [_layer_class(workload, bounds, [layer]) for family in layer_families(workload, bounds) for layer in family]


def _layer_class(workload: Workload, bounds: Bounds, layers: Sequence[_Layer]) -> LayerClass:
    first = layers[0]
    linears = tuple(LinearClass(workload.linears[index], bounds.linears[index], tuple(layer.linears[i] for layer in layers))
                    for i, index in enumerate(first.linears))
    kv = None if first.kv is None else KvClass(workload.kv[first.kv], bounds.kv[first.kv],
                                               tuple(layer.kv for layer in layers))
    return LayerClass(len(layers), linears, kv)


def spread_total(total: int, count: int) -> list[int]:
    """Split `total` over `count` layers as evenly as whole numbers allow, the larger parts first.

    For totals a <= b every part of a is at most the same part of b, so nested boundaries stay nested.
    """
    return [total // count + (i < total % count) for i in range(count)]
