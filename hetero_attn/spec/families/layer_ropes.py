"""Rotary embeddings that differ between the layers of a model: with a window and without, turned and not."""

from collections.abc import Iterable
from typing import Any

from hetero_attn.spec.families.windows import FULL, SLIDING
from hetero_attn.spec.json_fields import JsonFields
from hetero_attn.spec.rope_config import RopeConfig, rope_from, rope_object

NO_ROPE = RopeConfig(2, "none")  # a pair that stands still: the narrowest table


def rope_of_kind(
    fields: JsonFields, kind: str, key: str, theta: float, head_dim: int, context: int, shares_base: bool = False
) -> RopeConfig:
    """That of the layers of a kind, from an object for each kind or from one that is only of layers that see
    everything. key, theta: where the object names no base, the key beside it and its default. shares_base: whether the
    base in the one object is that of all layers."""
    found = rope_object(fields)
    if isinstance(found.get(kind), dict):
        own = found[kind]
    elif kind != SLIDING and FULL not in found and SLIDING not in found:
        own = found
    else:
        own = {name: value for name, value in found.items() if shares_base and name == "rope_theta"}
    return rope_from(fields, own, fields.number(key, 1.0, 1e15, theta), head_dim, context)


def ropes_by_window(windows: Iterable[int], local: RopeConfig, rope: RopeConfig) -> dict[str, Any]:
    """The rotary embedding of every layer: `local` where it has a window, else `rope`."""
    return {"layer_ropes": tuple(local if window else rope for window in windows)}


def ropes_where(turned: Iterable[bool], rope: RopeConfig) -> dict[str, Any]:
    """The rotary embedding of every layer, of those that turn nothing none."""
    return {"layer_ropes": tuple(rope if turns else NO_ROPE for turns in turned)}
