"""What `quantization_config` says of int4 weights, and what of it is refused by name.

Keys: transformers' quantization documentation and the files of AutoGPTQ, AutoAWQ and compressed-tensors.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hetero_attn.errors import ConfigError, UnsupportedModelError, nearest
from hetero_attn.spec.config import READ_METHODS
from hetero_attn.spec.json_fields import JsonFields, read_json, show

INSTEAD = "take the model as GPTQ, AWQ (gemm) or compressed-tensors with int4 weights, as GGUF, or unquantised"


@dataclass(frozen=True, slots=True)
class Int4Scheme:
    """method: one of READ_METHODS. group: inputs that share a scale, 0 for a whole row. symmetric: whether every zero
    point is the middle. zero_offset: what a stored one lacks, None where the values tell (GPTQ, symmetric).
    """

    method: str
    group: int
    symmetric: bool
    zero_offset: int | None = 0


def read_scheme(path: Path) -> Int4Scheme | None:
    """How the weights of a model directory are quantised; None where its config does not say that they are.

    Raises:
        ConfigError: the config is damaged or says something impossible.
        UnsupportedModelError: weights that are not read.
    """
    fields = JsonFields(path / "config.json", read_json(path / "config.json"))
    found = fields.get("quantization_config")
    if not isinstance(found, dict):
        return None
    values = JsonFields(fields.path, found)
    method = found.get("quant_method")
    if method == "compressed-tensors":
        return _compressed(values)
    if method == "gptq":
        return _gptq(values)
    if method == "awq":
        return _awq(values)
    raise _refused(values, "quant_method", method, READ_METHODS)


def _gptq(values: JsonFields) -> Int4Scheme:
    version = values.get("checkpoint_format", "gptq") or "gptq"
    if version not in ("gptq", "gptq_v2"):
        raise _refused(values, "checkpoint_format", version, ("gptq", "gptq_v2"))
    _expect(values, "bits", values.get("bits"), 4)
    if values.get("dynamic"):
        raise _refused(values, "dynamic", "overrides for single modules", ())
    symmetric = values.boolean("sym", True)
    # Symmetric files of either version are told by their values: writers disagree with what they declare.
    offset = None if symmetric else int(version == "gptq")
    return Int4Scheme("gptq", _group(values, values.get("group_size", 128)), symmetric, offset)


def _awq(values: JsonFields) -> Int4Scheme:
    version = str(values.get("version", "gemm")).lower()
    if version != "gemm":
        raise _refused(values, "version", version, ("gemm",))
    _expect(values, "bits", values.get("bits", values.get("w_bit")), 4)
    if not values.boolean("zero_point", True):
        raise _refused(values, "zero_point", False, ("true",))
    return Int4Scheme("awq", _group(values, values.get("group_size", values.get("q_group_size", 128))), False)


def _compressed(values: JsonFields) -> Int4Scheme:
    if (form := values.get("format")) != "pack-quantized":
        raise _refused(values, "format", form, ("pack-quantized",))
    groups = values.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1:
        raise _refused(
            values, "config_groups", f"{len(groups) if isinstance(groups, dict) else groups} groups", ("one",)
        )
    if values.get("transform_config"):
        raise _refused(values, "transform_config", "transforms", ())
    weights = next(iter(groups.values()))
    weights = weights.get("weights") if isinstance(weights, dict) else None
    if not isinstance(weights, dict):
        raise ConfigError(f"{values.path}: config_groups has no weights object; download config.json again")
    weights = JsonFields(values.path, weights)
    _expect(weights, "num_bits", weights.get("num_bits"), 4)
    _expect(weights, "type", weights.get("type", "int"), "int")
    strategy = weights.get("strategy")
    if strategy not in ("group", "channel"):
        raise _refused(weights, "strategy", strategy, ("group", "channel"))
    group = _group(weights, weights.get("group_size") if strategy == "group" else -1)
    return Int4Scheme("compressed-tensors", group, weights.boolean("symmetric", True))


def _group(values: JsonFields, size: Any) -> int:
    if size == -1:
        return 0
    if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= 1 << 20:
        values.fail("group_size", size, "-1 or a number of inputs")
    return size


def _expect(values: JsonFields, key: str, found: Any, wanted: Any) -> None:
    if found != wanted or isinstance(found, bool):
        raise _refused(values, key, found, (str(wanted),))


def _refused(values: JsonFields, key: str, found: Any, known: tuple[str, ...]) -> UnsupportedModelError:
    read = f"; read is {' or '.join(known)}{nearest(str(found), known)}" if known else ""
    return UnsupportedModelError(
        f"{values.path}: quantization_config: {key} is {show(found)}, not run{read}. {INSTEAD}"
    )
