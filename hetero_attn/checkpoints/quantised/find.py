"""Which linears of a model are quantised, and each how: told by their tensors, checked against the config."""

from __future__ import annotations

from collections.abc import Mapping

from hetero_attn.checkpoints.files import some
from hetero_attn.checkpoints.quantised.bytes import SCALE_NAMES, find_bytes
from hetero_attn.checkpoints.quantised.int4 import CODES, PARTS, find_int4
from hetero_attn.checkpoints.quantised.module import AGAIN, Module, Read, Shapes, unsupported
from hetero_attn.checkpoints.quantised.nibbles import STATE, find_mxfp4, find_nf4, find_nvfp4, find_stacked_mxfp4
from hetero_attn.checkpoints.quantised.scheme import GroupScheme, Scheme
from hetero_attn.errors import CheckpointError

WORDS = ("gptq", "awq")  # codes are words across several weights, whatever the config says beside
STACKED = "_proj.blocks"  # of the experts of gpt-oss
LOW_BIT = ("F8_E4M3", "I8", "U8")  # of a `weight` that is codes
# Tensors of a quantised linear that its product does without: activations and the cache are rounded by scales found
# here. All others, such as an order of inputs or factors on them, would change it.
BESIDE = ("bias", "activation_scale", "q_scale", "k_scale", "v_scale")
BESIDE_PREFIXES = ("input_", "output_")


def find_modules(scheme: Scheme, shapes: Shapes, read: Read, where: str) -> dict[str, Module]:
    """Modules by the name of their weight.

    Raises:
        CheckpointError: none, or tensors that are missing or contradict each other or the config.
        UnsupportedModelError: a layout that is not read.
    """
    prefixes = _prefixes(scheme, shapes)
    found = {f"{prefix}.weight": _find(prefix, scheme, shapes, read, where) for prefix in prefixes}
    if not found:
        looked_for = PARTS[scheme.method][CODES] if scheme.method in WORDS else "weight_packed, or weight of 8 bits"
        raise CheckpointError(
            f"{where}: config.json says {scheme.method}, but no tensor is called {looked_for}; config and weights are "
            "of different models, download both again"
        )
    taken = {name for module in found.values() for name in module.names}
    if both := [name for name in found if name in shapes and name not in taken]:
        raise CheckpointError(f"{where}: {both[0]} is there both quantised and plain; download the model again")
    if wrong := [module.prefix for module in found.values() if module.prefix in scheme.ignore]:
        raise CheckpointError(f"{where}: {some(wrong)} is quantised, but config.json says that it is not; {AGAIN}")
    if lost := [name for name in shapes if name not in taken and _is_scale(name)]:
        raise CheckpointError(
            f"{where}: {lost[0]} is a scale without quantised weights; the weights of its linear are not what they "
            "seem, download the model again"
        )
    if more := [name for name in shapes if name not in taken and _changes(name, found)]:
        unsupported(where, f"{more[0]} belongs to a quantised linear and is not read; without it values would be wrong")
    return found


def _prefixes(scheme: Scheme, shapes: Shapes) -> list[str]:
    """Of modules with a tensor that only quantised ones have."""
    if scheme.method in WORDS:
        suffixes = {part for part in PARTS[scheme.method] if part}
        return list(dict.fromkeys(name.rpartition(".")[0] for name in shapes if name.rpartition(".")[2] in suffixes))
    found = [
        name.rpartition(".")[0]
        for name, (dtype, _) in shapes.items()
        if name.endswith((".weight_packed", ".weight_shape", STACKED)) or name.endswith(".weight") and dtype in LOW_BIT
    ]
    return list(dict.fromkeys(found))


def _find(prefix: str, scheme: Scheme, shapes: Shapes, read: Read, where: str) -> Module:
    """One module by its tensors, as the first way of the config that fits them."""
    errors = []
    for group in scheme.of(prefix):
        try:
            return _find_as(prefix, scheme, group, shapes, read, where)
        except CheckpointError as error:
            errors.append(error)
    raise errors[0]


def _find_as(prefix: str, scheme: Scheme, group: GroupScheme, shapes: Shapes, read: Read, where: str) -> Module:
    if scheme.method in WORDS:
        return find_int4(prefix, group, shapes, where, read)
    if f"{prefix}.{STATE}" in shapes or scheme.method == "bitsandbytes":
        return find_nf4(prefix, shapes, where, read)
    if f"{prefix}.blocks" in shapes:
        return find_stacked_mxfp4(prefix, shapes, where)
    dtype = shapes.get(f"{prefix}.weight_packed", shapes.get(f"{prefix}.weight", ("I32", ())))[0]
    if dtype == "U8":
        small = shapes.get(f"{prefix}.weight_scale", ("", ()))[0]
        return find_mxfp4(prefix, shapes, where) if small in ("U8", "F8_E8M0") else find_nvfp4(prefix, shapes, where)
    if dtype == "I32" and group.bits == 4:
        return find_int4(prefix, group, shapes, where, read)
    return find_bytes(prefix, shapes, where, read, group.block, group.group or None)


def _changes(name: str, found: Mapping[str, Module]) -> bool:
    """Whether a tensor that no module took is of one, and may change what it computes."""
    prefix, _, part = name.rpartition(".")
    return f"{prefix}.weight" in found and part not in BESIDE and not part.startswith(BESIDE_PREFIXES)


def _is_scale(name: str) -> bool:
    return name.rpartition(".")[2] in (*SCALE_NAMES[:2], "weight_scale_2", "weight_global_scale")
