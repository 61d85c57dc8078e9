"""One quantised linear: its tensors in the file, checked, and rows of it in the order that everything else has.

  method               codes                              scales         zero points
  gptq                 qweight [in/8, out], along inputs  [groups, out]  qzeros [groups, out/8], along outputs
  awq (gemm)           qweight [in, out/8]                [groups, out]  qzeros [groups, out/8]
  compressed-tensors   weight_packed [out, in/8]          [out, groups]  weight_zero_point [out/8, groups]

All int32, eight codes each, the lowest bits first; awq has output 8c + i of its words at nibble 0 4 1 5 2 6 3 7.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cpu_kernels.formats import INT4_GROUPS, INT4_HEADER_BYTES
from hetero_attn.checkpoints.int4.scheme import INSTEAD, Int4Scheme
from hetero_attn.errors import CheckpointError, UnsupportedModelError

if TYPE_CHECKING:
    import torch

CODES, SCALES, ZEROS, GROUP_OF_INPUT, SHAPE = range(5)
PARTS = {
    "gptq": ("qweight", "scales", "qzeros", "g_idx", ""),
    "awq": ("qweight", "scales", "qzeros", "", ""),
    "compressed-tensors": ("weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape"),
}
IN_ORDER = (0, 1, 2, 3, 4, 5, 6, 7)
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
PER_WORD = 8
MIDDLE = 8  # the zero point of symmetric codes


@dataclass(frozen=True, slots=True)
class Module:
    """A linear `prefix`.weight, [out_features, in_features]; group: inputs that share a scale, as they are held.

    parts: names of its tensors, "" of those that it does not have. file_group: inputs of a scale in the file.
    """

    prefix: str
    parts: tuple[str, ...]
    out_features: int
    in_features: int
    group: int
    file_group: int

    @property
    def groups(self) -> int:
        """Groups of a row, as they are held."""
        return self.in_features // self.group

    @property
    def row_bytes(self) -> int:
        """Bytes of a row as blocks of groups."""
        return self.groups * (INT4_HEADER_BYTES + self.group // 2)


@dataclass(frozen=True, slots=True)
class ModuleTensors:
    """What was read of a module: packed codes as in the file, float16 scales and u8 zero points [out, groups]."""

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor


def find_module(prefix: str, scheme: Int4Scheme, shapes: dict[str, tuple[str, tuple[int, ...]]], where: str) -> Module:
    """A module by its tensors' (dtype, shape) in a file; raises CheckpointError or UnsupportedModelError by name."""
    names = tuple(f"{prefix}.{part}" if part else "" for part in PARTS[scheme.method])
    names = tuple(name if name in shapes else "" for name in names)
    compressed = scheme.method == "compressed-tensors"
    needs_zeros = not compressed or not scheme.symmetric
    for index in (CODES, SCALES, ZEROS)[: 3 if needs_zeros else 2]:
        if not names[index]:
            missing = PARTS[scheme.method][index]
            raise CheckpointError(f"{where}: {prefix} has no {missing}, which {scheme.method} weights need; {AGAIN}")
    for name, dtypes in zip(names, (("I32",), ("F16", "BF16"), ("I32",), ("I32",), ("I64", "I32")), strict=True):
        if name and shapes[name][0] not in dtypes:
            raise CheckpointError(f"{where}: {name} is {shapes[name][0]}, expected {' or '.join(dtypes)}; {AGAIN}")
    code, scale = shapes[names[CODES]][1], shapes[names[SCALES]][1]
    if len(code) != 2 or len(scale) != 2 or 0 in code or 0 in scale:
        raise CheckpointError(f"{where}: {prefix} has codes {list(code)} and scales {list(scale)}, expected matrices")
    rows, columns = code if compressed else code[::-1]
    out, inputs = (rows * PER_WORD, columns) if scheme.method == "awq" else (rows, columns * PER_WORD)
    groups = scale[1] if compressed else scale[0]
    if inputs % groups:
        raise CheckpointError(f"{where}: {prefix} has {inputs} inputs and scales for {groups} groups of them; {AGAIN}")
    each = inputs // groups
    if each != (scheme.group or inputs):
        raise CheckpointError(
            f"{where}: {prefix} has {groups} scales for {inputs} inputs, but group_size in config.json is "
            f"{scheme.group or -1}; {AGAIN}"
        )
    wide = -(-out // PER_WORD)
    wanted = {
        SCALES: (out, groups) if compressed else (groups, out),
        ZEROS: (wide, groups) if compressed else (groups, wide),
        GROUP_OF_INPUT: (inputs,),
        SHAPE: (2,),
    }
    for index, shape in wanted.items():
        if names[index] and shapes[names[index]][1] != shape:
            found = list(shapes[names[index]][1])
            raise CheckpointError(f"{where}: {names[index]} has shape {found}, expected {list(shape)}; {AGAIN}")
    return Module(prefix, names, out, inputs, _held_group(prefix, each, where), each)


AGAIN = "config and weights contradict each other, download both again"


def _held_group(prefix: str, each: int, where: str) -> int:
    """The largest group that a format has and that divides one of the file."""
    fitting = [group for group in INT4_GROUPS if each == group or each % group == 0 and group == INT4_GROUPS[-1]]
    if not fitting:
        raise UnsupportedModelError(
            f"{where}: {prefix} has groups of {each} inputs; run are groups of "
            f"{', '.join(map(str, INT4_GROUPS))} and whole multiples of {INT4_GROUPS[-1]}. {INSTEAD}"
        )
    return fitting[-1]


def read_module(module: Module, scheme: Int4Scheme, read: Callable[[str], torch.Tensor], where: str) -> ModuleTensors:
    """The tensors of a module, `read` by name, with what their values say checked."""
    import torch

    repeats = module.file_group // module.group
    compressed = scheme.method == "compressed-tensors"
    if name := module.parts[SHAPE]:
        found = read(name).tolist()
        if found != [module.out_features, module.in_features]:
            raise CheckpointError(
                f"{where}: {name} says {found}, the codes are {[module.out_features, module.in_features]}; {AGAIN}"
            )
    if name := module.parts[GROUP_OF_INPUT]:
        check_group_order(module, read(name), where)
    scales = read(module.parts[SCALES])
    halves = scales.half()
    if not torch.equal(halves.float(), scales.float()) and torch.isfinite(scales).all():
        raise UnsupportedModelError(
            f"{where}: {module.parts[SCALES]} holds bfloat16 scales that float16 cannot hold exactly. {INSTEAD}"
        )
    halves = halves if compressed else halves.t()
    zeros = _zeros(module, scheme, read, where) if module.parts[ZEROS] else torch.full_like(halves, MIDDLE).byte()
    return ModuleTensors(
        read(module.parts[CODES]),
        halves.repeat_interleave(repeats, 1).contiguous(),
        zeros.repeat_interleave(repeats, 1).contiguous(),
    )


def check_group_order(module: Module, found: torch.Tensor, where: str) -> None:
    """Groups must be runs of inputs; UnsupportedModelError for those that act-order scattered."""
    import torch

    if not torch.equal(found.long(), torch.arange(module.in_features, device="cpu") // module.file_group):
        raise UnsupportedModelError(
            f"{where}: {module.parts[GROUP_OF_INPUT]} scatters the groups over the inputs (desc_act, actorder), which "
            f"is not run; take the model quantised without it, or with static groups, or {INSTEAD}"
        )


def _zeros(module: Module, scheme: Int4Scheme, read: Callable[[str], torch.Tensor], where: str) -> torch.Tensor:
    """u8 [out, groups of the file]."""
    name = module.parts[ZEROS]
    words = read(name)
    if scheme.method == "compressed-tensors":
        stored = nibbles(words.t(), IN_ORDER).t()[: module.out_features]
    else:
        stored = nibbles(words, AWQ_ORDER if scheme.method == "awq" else IN_ORDER).t()[: module.out_features]
    if scheme.zero_offset is None:
        values = stored.unique().tolist()
        if values not in ([MIDDLE - 1], [MIDDLE]):
            raise CheckpointError(
                f"{where}: config.json says sym, but {name} holds zero points {values[:8]}, expected all {MIDDLE - 1} "
                f"or all {MIDDLE}; {AGAIN}"
            )
        return stored * 0 + MIDDLE
    if scheme.zero_offset and bool((stored == 15).any()):
        raise UnsupportedModelError(
            f"{where}: {name} stores a zero point of 15 in the first version of GPTQ's format, where programs disagree "
            f"whether it is 16 or 0. {INSTEAD}"
        )
    return stored + scheme.zero_offset


def nibbles(words: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """uint8 [..., 8n] of int32 [..., n]; order: which nibble of its word every value is."""
    import torch

    shifts = torch.tensor(order, dtype=torch.int32, device="cpu") * 4
    return ((words[..., None] >> shifts) & 15).to(torch.uint8).flatten(-2)


def row_blocks(
    module: Module, scheme: Int4Scheme, tensors: ModuleTensors, first: int, stop: int, out: torch.Tensor
) -> None:
    """Write rows [first, stop) into `out`, uint8 [rows, row_bytes], as formats/source_types.py lays them out."""
    import torch

    target = out.view(stop - first, module.groups, -1)
    target[:, :, :2] = tensors.scales[first:stop, :, None].view(torch.uint8)
    target[:, :, 2] = tensors.zeros[first:stop]
    target[:, :, 3] = 0
    target[:, :, INT4_HEADER_BYTES:] = _pairs(scheme, tensors.codes, first, stop).view(*target.shape[:2], -1)


def _pairs(scheme: Int4Scheme, codes: torch.Tensor, first: int, stop: int) -> torch.Tensor:
    """uint8 [rows, in_features / 2], two codes a byte."""
    import torch

    if scheme.method == "compressed-tensors":
        return codes[first:stop].contiguous().view(torch.uint8)
    if scheme.method == "gptq":
        return codes[:, first:stop].t().contiguous().view(torch.uint8)
    start = first // PER_WORD
    values = nibbles(codes[:, start : -(-stop // PER_WORD)], AWQ_ORDER)
    rows = values[:, first - start * PER_WORD : stop - start * PER_WORD].t()
    return (rows[:, 0::2] | rows[:, 1::2] << 4).contiguous()
