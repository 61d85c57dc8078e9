"""What `quantization_config` says of a model's weights, and what of it is refused by name.

Keys: transformers' quantization documentation and the files of AutoGPTQ, AutoAWQ, compressed-tensors and ModelOpt.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hetero_attn.checkpoints.quantised.module import INSTEAD
from hetero_attn.errors import ConfigError, UnsupportedModelError, nearest
from hetero_attn.spec.config import READ_METHODS
from hetero_attn.spec.json_fields import JsonFields, read_json, show

COMPRESSED_FORMATS = (
    "pack-quantized",
    "int-quantized",
    "naive-quantized",
    "float-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mixed-precision",
)
MODELOPT_ALGORITHMS = ("FP8", "NVFP4", "W4A16_NVFP4", "FP8_PB_WO", "FP8_PER_CHANNEL_PER_TOKEN", "MIXED_PRECISION")
BITS = {"int": (4, 8), "float": (4, 8)}
MOST_WAYS = 64  # in which single modules of one model are quantised


@dataclass(frozen=True, slots=True)
class GroupScheme:
    """One way in which linears of a model are quantised. group: inputs that share a scale, 0 for a whole row.
    symmetric: whether every zero point is the middle. zero_offset: what a stored one lacks, None where the values tell
    (GPTQ, symmetric). block: rows and inputs that share a scale. targets: the modules, by compressed-tensors' rules.
    """

    method: str
    bits: int = 4
    group: int = 0
    symmetric: bool = True
    zero_offset: int | None = 0
    block: tuple[int, int] | None = None
    targets: tuple[str, ...] = ("Linear",)


@dataclass(frozen=True, slots=True)
class Scheme:
    """method: one of READ_METHODS. groups: the ways in which its linears are quantised, one but for compressed-tensors.
    ignore: modules that are not, by name. Expressions of strangers are not run: what a module is, its tensors say.
    """

    method: str
    groups: tuple[GroupScheme, ...]
    ignore: tuple[str, ...] = ()

    def of(self, prefix: str) -> tuple[GroupScheme, ...]:
        """The ways in which a module may be quantised: that which names it, else all."""
        return tuple(group for group in self.groups if prefix in group.targets) or self.groups


def read_scheme(path: Path) -> Scheme | None:
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
    if not isinstance(method, str) or method not in _READERS:
        raise _refused(values, "quant_method", method, READ_METHODS)
    return _READERS[method](values)


def _fp8(values: JsonFields) -> Scheme:
    block = _block(values, values.get("weight_block_size"))
    return Scheme("fp8", (GroupScheme("fp8", 8, block=block),), _names(values, "ignored_layers"))


def _fbgemm(values: JsonFields) -> Scheme:
    return Scheme("fbgemm_fp8", (GroupScheme("fbgemm_fp8", 8),))


def _modelopt(values: JsonFields) -> Scheme:
    algorithm = values.get("quant_algo")
    if algorithm not in MODELOPT_ALGORITHMS:
        raise _refused(values, "quant_algo", algorithm, MODELOPT_ALGORITHMS)
    block = (128, 128) if algorithm == "FP8_PB_WO" else None
    return Scheme("modelopt", (GroupScheme("modelopt", 8, block=block),))


def _mxfp4(values: JsonFields) -> Scheme:
    return Scheme("mxfp4", (GroupScheme("mxfp4", group=32),), _names(values, "modules_to_not_convert"))


def _bitsandbytes(values: JsonFields) -> Scheme:
    if not values.boolean("load_in_4bit", False):
        raise _refused(values, "load_in_4bit", False, ("true",))
    if (kind := values.get("bnb_4bit_quant_type", "fp4")) != "nf4":
        raise _refused(values, "bnb_4bit_quant_type", kind, ("nf4",))
    return Scheme("bitsandbytes", (GroupScheme("bitsandbytes"),))


def _gptq(values: JsonFields) -> Scheme:
    version = values.get("checkpoint_format", "gptq") or "gptq"
    if version not in ("gptq", "gptq_v2"):
        raise _refused(values, "checkpoint_format", version, ("gptq", "gptq_v2"))
    every = _gptq_group(values, version)
    ways = dict.fromkeys((every, *(_gptq_group(each, version) for each in _overrides(values, every))))
    if len(ways) > MOST_WAYS:
        values.fail("dynamic", f"{len(ways) - 1} ways to quantise", f"at most {MOST_WAYS}")
    return Scheme("gptq", tuple(ways))


def _gptq_group(values: JsonFields, version: str) -> GroupScheme:
    if (bits := values.get("bits")) not in (4, 8) or isinstance(bits, bool):
        raise _refused(values, "bits", bits, ("4", "8"))
    symmetric = values.boolean("sym", True)
    # Symmetric files of either version are told by their values: writers disagree with what they declare.
    offset = None if symmetric else int(version == "gptq")
    return GroupScheme("gptq", bits, _group(values, values.get("group_size", 128)), symmetric, offset)


def _overrides(values: JsonFields, every: GroupScheme) -> Iterator[JsonFields]:
    """What `dynamic` says of modules by expressions: which they are, their tensors say, as they say of those that it
    leaves unquantised. Zero points look alike, so that all modules are symmetric or none is."""
    found = values.get("dynamic") or {}
    if not isinstance(found, dict) or not all(isinstance(each, dict) for each in found.values()):
        values.fail("dynamic", found, "an object of objects")
    for pattern, each in found.items():
        if pattern.startswith("-:"):
            continue
        if each.get("sym", every.symmetric) != every.symmetric:
            raise _refused(values, f"dynamic: {pattern}: sym", each["sym"], (str(every.symmetric).lower(),))
        yield JsonFields(values.path, {**values.values, **each})


def _awq(values: JsonFields) -> Scheme:
    version = str(values.get("version", "gemm")).lower()
    if version != "gemm":
        raise _refused(values, "version", version, ("gemm",))
    _expect(values, "bits", values.get("bits", values.get("w_bit")), 4)
    if not values.boolean("zero_point", True):
        raise _refused(values, "zero_point", False, ("true",))
    group = _group(values, values.get("group_size", values.get("q_group_size", 128)))
    return Scheme("awq", (GroupScheme("awq", 4, group, False),))


def _compressed(values: JsonFields) -> Scheme:
    if (form := values.get("format")) not in COMPRESSED_FORMATS:
        raise _refused(values, "format", form, COMPRESSED_FORMATS)
    groups = values.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise _refused(values, "config_groups", groups, ("an object of groups",))
    if values.get("transform_config"):
        raise _refused(values, "transform_config", "transforms", ())
    found = tuple(_compressed_group(values, group) for group in groups.values())
    return Scheme("compressed-tensors", found, _names(values, "ignore"))


def _compressed_group(values: JsonFields, group: Any) -> GroupScheme:
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict):
        raise ConfigError(f"{values.path}: config_groups has no weights object; download config.json again")
    weights = JsonFields(values.path, weights)
    kind, bits = weights.get("type", "int"), weights.get("num_bits")
    if not isinstance(kind, str) or kind not in BITS:
        raise _refused(weights, "type", kind, tuple(BITS))
    if bits not in BITS[kind] or isinstance(bits, bool):
        raise _refused(weights, "num_bits", bits, tuple(map(str, BITS[kind])))
    strategy = weights.get("strategy")
    if strategy not in ("group", "channel", "tensor", "block", "tensor_group"):
        raise _refused(weights, "strategy", strategy, ("group", "channel", "tensor", "block", "tensor_group"))
    size = _group(weights, weights.get("group_size") if strategy in ("group", "tensor_group") else -1)
    block = _block(weights, weights.get("block_structure")) if strategy == "block" else None
    return GroupScheme(
        "compressed-tensors",
        bits,
        size,
        weights.boolean("symmetric", True),
        block=block,
        targets=_names(JsonFields(values.path, group), "targets"),
    )


def _names(values: JsonFields, key: str) -> tuple[str, ...]:
    """A list of names of modules."""
    found = values.get(key) or []
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        values.fail(key, found, "a list of names")
    return tuple(found)


def _block(values: JsonFields, found: Any) -> tuple[int, int] | None:
    if found is None:
        return None
    if isinstance(found, str):  # "128x128"
        found = [int(size) if size.isdecimal() else 0 for size in found.split("x")]
    good = isinstance(found, list) and len(found) == 2
    if not good or not all(type(size) is int and 0 < size <= 1 << 20 for size in found):
        values.fail("weight_block_size", found, "two numbers of rows and inputs")
    return found[0], found[1]


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


_READERS = {
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed,
    "fp8": _fp8,
    "fbgemm_fp8": _fbgemm,
    "modelopt": _modelopt,
    "bitsandbytes": _bitsandbytes,
    "mxfp4": _mxfp4,
}
