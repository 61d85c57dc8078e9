"""Rotary position embedding as a config describes it."""

import math
from dataclasses import dataclass
from typing import Any

from hetero_attn.errors import ConfigError, UnsupportedModelError, nearest
from hetero_attn.spec.json_fields import JsonFields, show
from hetero_attn.spec.limits import MAX_CONTEXT

MIN_BETA = 1e-6  # turns of yarn's slowest dimension: the logarithm of nearly nothing is no dimension
DEFAULT_THETA = 10000.0
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding: which frequencies, and how they stretch beyond the trained context.

    `rotary_dim` counts the leading dimensions of a head that are rotated; the rest pass through. Fields that a
    `rope_type` does not use keep their defaults. `original_max_position_embeddings` counts tokens;
    `attention_factor` None means "derive it from `factor`, `mscale` and `mscale_all_dim`" (yarn only). `divisors`, one
    for each pair, are the whole scaling of rope type "divisors", which only GGUF files have; of "longrope" they hold up
    to the trained context, and `long_divisors` beyond. Rope type "none" turns nothing.
    """

    rotary_dim: int
    rope_type: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True
    divisors: tuple[float, ...] = ()
    long_divisors: tuple[float, ...] = ()


def read_rope(fields: JsonFields, head_dim: int, max_position_embeddings: int, partial: bool = False) -> RopeConfig:
    """Rope parameters from the new form (`rope_parameters`) or the old (`rope_theta` beside `rope_scaling`).

    partial: whether the family turns only as much of a head as partial_rotary_factor says.
    """
    found = rope_object(fields)
    theta = fields.number("rope_theta", 1.0, 1e15, DEFAULT_THETA)
    return rope_from(fields, found, theta, head_dim, max_position_embeddings, partial)


def rope_object(fields: JsonFields) -> dict[str, Any]:
    """What stands in the config under either name of the rope parameters; empty where nothing does."""
    found = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    return found if isinstance(found, dict) else fields.fail("rope_scaling", found, "an object")


def rope_from(
    fields: JsonFields,
    found: dict[str, Any],
    theta: float,
    head_dim: int,
    max_position_embeddings: int,
    partial: bool = False,
) -> RopeConfig:
    """Rope parameters from one object of them. theta: where the object names none."""
    inherited = {"partial_rotary_factor": fields.get("partial_rotary_factor")}
    rope = JsonFields(fields.path, found, inherited)
    rope_type = found.get("rope_type", found.get("type", "default"))
    if "long_factor" in found and rope_type in ("su", "yarn"):  # what the first files with longrope called it
        rope_type = "longrope"
    if rope_type not in ROPE_TYPES:
        raise UnsupportedModelError(
            f"{fields.path}: rope type {show(rope_type)} is not supported{nearest(str(rope_type), ROPE_TYPES)}. "
            f"Known rope types: {', '.join(ROPE_TYPES)}"
        )
    if nested := [key for key, value in found.items() if isinstance(value, dict)]:
        raise UnsupportedModelError(
            f"{fields.path}: rope parameters per layer type ({', '.join(nested)}) are not supported, one set for all is"
        )
    factor = rope.number("partial_rotary_factor", 0.0, 1.0, 1.0)
    if not partial:
        _check_whole_rotation(rope, factor)
    rotary_dim = _rotary_dim(fields, head_dim, int(head_dim * factor))
    return RopeConfig(
        rotary_dim=rotary_dim,
        rope_type=rope_type,
        theta=rope.number("rope_theta", 1.0, 1e15, theta),
        **_rope_scaling(fields, rope, rope_type, max_position_embeddings),
        **(_long_divisors(rope, rotary_dim // 2) if rope_type == "longrope" else {}),
    )


def _long_divisors(rope: JsonFields, pairs: int) -> dict[str, Any]:
    """Both sets of longrope, a divisor for each pair."""
    found = {}
    for key, name in (("short_factor", "divisors"), ("long_factor", "long_divisors")):
        values = rope.get(key)
        good = isinstance(values, list) and len(values) == pairs
        if not good or not all(isinstance(value, int | float) and 0 < value < 1e9 for value in values):
            rope.fail(key, values, f"a list of {pairs} numbers above 0, one for each pair that is turned")
        found[name] = tuple(map(float, values))
    return found


def _check_whole_rotation(rope: JsonFields, factor: float) -> None:
    """A factor below 1 beside families that turn whole heads means nothing that all agree on: transformers ignores it
    for the default rope type and fails in the first layer for the others, vLLM applies it."""
    if factor != 1.0:
        raise UnsupportedModelError(
            f"{rope.path}: partial_rotary_factor is {factor:g}, and this architecture rotates whole heads; "
            "transformers ignores it here and others do not, so take it out of the config if the model was trained "
            "without it"
        )


def _rotary_dim(fields: JsonFields, head_dim: int, rotary_dim: int) -> int:
    if rotary_dim % 2 or rotary_dim < 4:
        raise ConfigError(
            f"{fields.path}: head_dim {head_dim} would be rotated in {rotary_dim} dimensions, expected an even number "
            "of at least 4, as rotation works on pairs"
        )
    return rotary_dim


def _rope_scaling(fields: JsonFields, rope: JsonFields, rope_type: str, max_position_embeddings: int) -> dict[str, Any]:
    """The fields that only scaled rope types have."""
    if rope_type == "default":
        return {}
    if rope_type in ("linear", "dynamic"):
        return {"factor": rope.number("factor", 0.0, 1e6)}
    # A value beside the rope parameters outranks the one inside them, as in transformers.
    original = fields.integer("original_max_position_embeddings", MAX_CONTEXT, 0) or rope.integer(
        "original_max_position_embeddings", MAX_CONTEXT, max_position_embeddings
    )
    scaling = {"original_max_position_embeddings": original}
    if rope_type == "llama3":
        low = rope.number("low_freq_factor", 0.0, 1e6)
        high = rope.number("high_freq_factor", low, 1e6)
        return scaling | {"factor": rope.number("factor", 0.0, 1e6), "low_freq_factor": low, "high_freq_factor": high}
    if rope_type == "longrope":
        factor = rope.number("factor", 0.0, 1e6, max_position_embeddings / original)
        recommended = (1 + math.log(factor) / math.log(original)) ** 0.5 if factor > 1.0 and original > 1 else 1.0
        return scaling | {"attention_factor": rope.number("attention_factor", 0.0, 1e6, recommended)}
    # transformers takes 0 as "not given" for every number of yarn that may be left out.
    yarn = JsonFields(rope.path, {key: value or None for key, value in rope.values.items() if key != "truncate"})
    return scaling | {
        "factor": yarn.number("factor", 0.0, 1e6, max_position_embeddings / original),
        "attention_factor": yarn.number("attention_factor", 0.0, 1e6, None),
        "beta_fast": yarn.number("beta_fast", MIN_BETA, 1e6, 32.0),
        "beta_slow": yarn.number("beta_slow", MIN_BETA, 1e6, 1.0),
        "mscale": yarn.number("mscale", 0.0, 1e6, 0.0),
        "mscale_all_dim": yarn.number("mscale_all_dim", 0.0, 1e6, 0.0),
        "truncate": rope.boolean("truncate", True),
    }
