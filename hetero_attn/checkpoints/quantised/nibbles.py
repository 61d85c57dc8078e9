"""Linears of four bits a weight that are indexes of a table: MXFP4, NVFP4 and NF4.

  kind    codes, two in a byte                         scales
  mxfp4   weight_packed [out, in/2], first in low      weight_scale [out, in/32], exponents: 2^(e - 127)
          of gpt-oss, each expert:
          blocks [out, in/32, 16], likewise            scales [out, in/32]; rows of gate and up alternate
  nvfp4   weight_packed or weight, likewise            weight_scale [out, in/16], E4M3; and a float32 for the tensor:
                                                       divided by weight_global_scale, multiplied with weight_scale_2
  nf4     weight [out * in / 2, 1], first in high      weight.absmax of every 64, float32, or codes of
                                                       weight.nested_quant_map times weight.nested_absmax of every 256

A value of nvfp4 is code * (scale / global), of nf4 map[code] * absmax, each step rounded to float32.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cpu_kernels.formats import E2M1_HEADER_BYTES, E2M1_TYPE, NF4_TYPE, NF4_VALUES, SCALE_BYTES, SOURCE_TYPES
from hetero_attn.checkpoints.quantised.module import (
    Module,
    Read,
    RowWriter,
    Shapes,
    check_dtype,
    finite_scales,
    matrix,
    needed,
    refuse,
    refuse_shape,
    unsupported,
    write_blocks,
)

if TYPE_CHECKING:
    import torch

MXFP4_TYPE = SOURCE_TYPES["MXFP4"]
STATE = "weight.quant_state.bitsandbytes__nf4"
NESTED_GROUP = 256
MAX_STATE_BYTES = 1 << 16
FLOATS = ("F32", "BF16", "F16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mxfp4Module(Module):
    """codes, scales: its tensors. alternate: of how many linears its rows are, in turns."""

    codes: str
    scales: str
    alternate: int = 1

    def rows(self, read: Read, where: str) -> RowWriter:
        """See `Module.rows`."""
        import torch

        codes, scales = (read(name).view(self.out_features, -1) for name in (self.codes, self.scales))
        if self.alternate > 1:
            order = torch.arange(self.out_features, device="cpu").view(-1, self.alternate).t().flatten()
            codes, scales = codes[order], scales[order]

        def write(first: int, stop: int, out: torch.Tensor) -> None:
            mxfp4_blocks(codes[first:stop], scales[first:stop], out)

        return write


def mxfp4_blocks(codes: torch.Tensor, exponents: torch.Tensor, out: torch.Tensor) -> None:
    """Blocks as GGUF has them, whose low nibbles are the first 16 of 32, of codes whose low nibbles are the even ones.

    codes: uint8 [rows, in_features / 2]. exponents: uint8 [rows, in_features / 32]. out: uint8, written.
    """
    rows, groups = exponents.shape
    pairs = codes.reshape(rows, groups, 2, 8)  # the first 16, the last 16; two neighbours in a byte
    even, odd = pairs & 15, pairs >> 4
    target = out.view(rows, groups, MXFP4_TYPE.block_bytes)
    target[:, :, 0] = exponents
    target[:, :, 1::2] = even[:, :, 0] | even[:, :, 1] << 4
    target[:, :, 2::2] = odd[:, :, 0] | odd[:, :, 1] << 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Nvfp4Module(Module):
    """codes, scales, factor: its tensors. divides: whether the tensor's factor divides the scales."""

    codes: str
    scales: str
    factor: str
    divides: bool

    def rows(self, read: Read, where: str) -> RowWriter:
        """See `Module.rows`."""
        import torch

        factor = finite_scales(read(self.factor), self.factor, where).view(())
        if self.divides and factor.item() <= 0:
            refuse(where, self.factor, factor.item(), "a positive number to divide by")
        codes, scales = read(self.codes), finite_scales(read(self.scales), self.scales, where)
        if bool((scales < 0).any()):
            refuse(where, self.scales, "below 0", "scales of at least 0")
        # As header T16 has it, halved because its table of codes has twice the values.
        held = -factor * 2.0**-7 if self.divides else factor * 2.0**7
        if not self.divides and factor.item() < 0 or not torch.isfinite(held):
            refuse(where, self.factor, factor.item(), "a positive number of the size of weights")
        encoded = read(self.scales).view(torch.uint8)

        def write(first: int, stop: int, out: torch.Tensor) -> None:
            target = out.view(stop - first, -1, E2M1_TYPE.block_bytes)
            target[:, :, :SCALE_BYTES] = held.view(1).view(torch.uint8)
            target[:, :, SCALE_BYTES] = encoded[first:stop]
            target[:, :, SCALE_BYTES + 1 : E2M1_HEADER_BYTES] = 0
            target[:, :, E2M1_HEADER_BYTES:] = codes[first:stop].reshape(*target.shape[:2], -1)

        return write


@dataclass(frozen=True, slots=True, kw_only=True)
class Nf4Module(Module):
    """nested: whether absmax is quantised too."""

    nested: bool

    def rows(self, read: Read, where: str) -> RowWriter:
        """See `Module.rows`."""
        import torch

        state = self._state(read, where)
        table = read(f"{self.prefix}.weight.quant_map")
        if not torch.equal(table.float(), torch.tensor(NF4_VALUES, device="cpu")):
            unsupported(where, f"{self.prefix}.weight.quant_map is another table than NF4's")
        codes = read(f"{self.prefix}.weight").view(self.out_features, self.in_features // 2)
        codes = codes >> 4 | codes << 4  # the first of two in the low nibble
        absmax = self._absmax(read, state, where).view(self.out_features, -1)

        def write(first: int, stop: int, out: torch.Tensor) -> None:
            write_blocks(NF4_TYPE, absmax[first:stop], codes[first:stop], out)

        return write

    def _state(self, read: Read, where: str) -> dict[str, Any]:
        name = f"{self.prefix}.{STATE}"
        state = nf4_state(read(name), name, where)
        if state.get("shape") != [self.out_features, self.in_features] or state.get("blocksize") != NF4_TYPE.items:
            said = {key: state.get(key) for key in ("shape", "blocksize")}
            refuse(where, name, said, f"shape {[self.out_features, self.in_features]}, blocksize {NF4_TYPE.items}")
        return state

    def _absmax(self, read: Read, state: dict[str, Any], where: str) -> torch.Tensor:
        name = f"{self.prefix}.weight.absmax"
        if not self.nested:
            return finite_scales(read(name), name, where)
        outer = finite_scales(read(f"{self.prefix}.weight.nested_absmax"), f"{self.prefix}.weight.nested_absmax", where)
        table, offset = read(f"{self.prefix}.weight.nested_quant_map").float(), state.get("nested_offset")
        if type(offset) not in (int, float) or state.get("nested_blocksize") != NESTED_GROUP:
            refuse(where, f"{self.prefix}.{STATE}", state, f"nested_offset, and a nested_blocksize of {NESTED_GROUP}")
        codes = read(name)
        values = table[codes.int()] * outer.repeat_interleave(NESTED_GROUP)[: codes.shape[0]]
        return finite_scales(values + offset, name, where)


def nf4_state(values: torch.Tensor, name: str, where: str) -> dict[str, Any]:
    """The JSON object that bitsandbytes keeps as bytes."""
    try:
        state = json.loads(bytes(values.reshape(-1).tolist()))
    except (ValueError, RecursionError):
        state = None
    if not isinstance(state, dict):
        refuse(where, name, "no JSON object", "one with shape and blocksize")
    return state


def find_mxfp4(prefix: str, shapes: Shapes, where: str) -> Mxfp4Module:
    """A module of MXFP4 by its tensors; raises CheckpointError by name."""
    codes, scales = (needed(where, shapes, prefix, part, "mxfp4") for part in ("weight_packed", "weight_scale"))
    out, inputs = _packed_shape(where, shapes, codes)
    check_dtype(where, shapes, scales, ("U8", "F8_E8M0"))
    if shapes[scales][1] != (out, inputs // 32) or inputs % 32:
        refuse_shape(where, shapes, scales, [out, inputs // 32])
    return Mxfp4Module(
        prefix=prefix,
        names=(codes, scales),
        out_features=out,
        in_features=inputs,
        kind=MXFP4_TYPE,
        codes=codes,
        scales=scales,
    )


def find_stacked_mxfp4(prefix: str, shapes: Shapes, where: str) -> Mxfp4Module:
    """Gate and up, or down, of one of gpt-oss's experts; raises CheckpointError by name."""
    codes, scales = (needed(where, shapes, prefix, part, "mxfp4") for part in ("blocks", "scales"))
    check_dtype(where, shapes, codes, ("U8",))
    check_dtype(where, shapes, scales, ("U8", "F8_E8M0"))
    shape, alternate = shapes[codes][1], 2 if prefix.endswith(".gate_up_proj") else 1
    if len(shape) != 3 or shape[2] != 16 or shape[0] % alternate:
        refuse_shape(where, shapes, codes, "rows, alternately of gate and up, of blocks of 16 bytes")
    if shapes[scales][1] != shape[:2]:
        refuse_shape(where, shapes, scales, list(shape[:2]))
    return Mxfp4Module(
        prefix=prefix,
        names=(codes, scales),
        out_features=shape[0],
        in_features=32 * shape[1],
        kind=MXFP4_TYPE,
        codes=codes,
        scales=scales,
        alternate=alternate,
    )


def find_nvfp4(prefix: str, shapes: Shapes, where: str) -> Nvfp4Module:
    """A module of NVFP4 by its tensors, of compressed-tensors or of ModelOpt; raises CheckpointError by name."""
    divides = f"{prefix}.weight_packed" in shapes
    codes = f"{prefix}.weight_packed" if divides else f"{prefix}.weight"
    scales = needed(where, shapes, prefix, "weight_scale", "nvfp4")
    factor = needed(where, shapes, prefix, "weight_global_scale" if divides else "weight_scale_2", "nvfp4")
    out, inputs = _packed_shape(where, shapes, codes)
    check_dtype(where, shapes, scales, ("F8_E4M3",))
    check_dtype(where, shapes, factor, ("F32",))
    if shapes[scales][1] != (out, inputs // 16) or inputs % 16:
        refuse_shape(where, shapes, scales, [out, inputs // 16])
    if any(size != 1 for size in shapes[factor][1]):
        refuse_shape(where, shapes, factor, "one number")
    others = (f"{prefix}.{suffix}" for suffix in ("input_global_scale", "input_scale"))
    return Nvfp4Module(
        prefix=prefix,
        names=(codes, scales, factor, *(name for name in others if name in shapes)),
        out_features=out,
        in_features=inputs,
        kind=E2M1_TYPE,
        codes=codes,
        scales=scales,
        factor=factor,
        divides=divides,
    )


def find_nf4(prefix: str, shapes: Shapes, where: str, read: Read) -> Nf4Module:
    """A module of NF4 by its tensors; its shape stands in a small tensor of its own. Raises CheckpointError by name."""
    weight = needed(where, shapes, prefix, "weight", "nf4")
    check_dtype(where, shapes, weight, ("U8",))
    named = {part: needed(where, shapes, prefix, f"weight.{part}", "nf4") for part in ("absmax", "quant_map")}
    state_name = needed(where, shapes, prefix, STATE, "nf4")
    check_dtype(where, shapes, state_name, ("U8",))
    check_dtype(where, shapes, named["quant_map"], FLOATS)
    if math.prod(shapes[state_name][1]) > MAX_STATE_BYTES:
        refuse_shape(where, shapes, state_name, f"at most {MAX_STATE_BYTES} bytes")
    shape = nf4_state(read(state_name), state_name, where).get("shape")
    if not isinstance(shape, list) or len(shape) != 2 or not all(type(size) is int and size > 0 for size in shape):
        refuse(where, state_name, f"shape {shape}", "two sizes")
    out, inputs = shape
    if inputs % NF4_TYPE.items:
        unsupported(where, f"{prefix} has {inputs} inputs, which groups of {NF4_TYPE.items} do not divide")
    count, groups = out * inputs, out * inputs // NF4_TYPE.items
    nested = [name for part in ("nested_absmax", "nested_quant_map") if (name := f"{weight}.{part}") in shapes]
    if len(nested) == 1:
        refuse(where, nested[0], "there alone", "with the other of nested_absmax and nested_quant_map")
    for name in nested:
        check_dtype(where, shapes, name, FLOATS)
    check_dtype(where, shapes, named["absmax"], ("U8",) if nested else ("F32",))
    wanted = {weight: (count // 2, 1), named["absmax"]: (groups,), named["quant_map"]: (16,)}
    if nested:
        wanted |= dict(zip(nested, ((-(-groups // NESTED_GROUP),), (256,)), strict=True))
    for name, size in wanted.items():
        if shapes[name][1] != size:
            refuse_shape(where, shapes, name, list(size))
    return Nf4Module(
        prefix=prefix,
        names=(weight, *named.values(), state_name, *nested),
        out_features=out,
        in_features=inputs,
        kind=NF4_TYPE,
        nested=bool(nested),
    )


def _packed_shape(where: str, shapes: Shapes, name: str) -> tuple[int, int]:
    check_dtype(where, shapes, name, ("U8",))
    rows, columns = matrix(where, shapes, name)
    return rows, 2 * columns
