"""How warm a model's experts were over a text, kept for later plans of the model where it lies."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from hetero_attn.planning.kept import keep, kept
from placement.plan.heat import ExpertHeat
from placement.plan.shards import LinearShard
from placement.plan.workload import Workload

HEAT = "heat"


def keep_heat(model: Path, heats: Mapping[str, ExpertHeat]) -> None:
    """Keep what was found of every layer, by the name of its experts, in place of what was before; warns where that is
    not possible."""
    keep(HEAT, model, {name: asdict(heat) for name, heat in heats.items()}, "the heat of the experts is")


def with_heat(workload: Workload, model: Path) -> Workload:
    """The workload with what is kept of its experts; as it is where nothing is, or what is there fits no layer."""
    if not any(shard.picks for shard in workload.linears):
        return workload
    found = kept(HEAT, model)
    return replace(workload, linears=tuple(_warmed(shard, found.get(shard.name)) for shard in workload.linears))


def _warmed(shard: LinearShard, found: Any) -> LinearShard:
    if not shard.picks or not isinstance(found, dict):
        return shard
    recent, fixed, popular = (found.get(name) for name in ("recent", "fixed", "popular"))
    if not (_is_curve(recent, shard.units) and _is_curve(fixed, shard.units) and _is_order(popular, shard.units)):
        return shard
    return replace(shard, heat=ExpertHeat(tuple(recent), tuple(fixed), tuple(popular)))


def _is_curve(values: Any, experts: int) -> bool:
    """Whether these are shares from 0 to 1 that do not fall, one more than there are experts."""
    if not isinstance(values, list) or len(values) != experts + 1:
        return False
    if not all(type(value) in (int, float) for value in values):
        return False
    return values[0] >= 0 and values[-1] <= 1 and all(a <= b for a, b in zip(values, values[1:], strict=False))


def _is_order(ids: Any, experts: int) -> bool:
    """Whether every expert stands there once."""
    return isinstance(ids, list) and all(type(index) is int for index in ids) and sorted(ids) == list(range(experts))
