"""Linears of one byte a weight: FP8 (E4M3) and int8, with a scale for the tensor, every row, or blocks of it.

  codes                                  scales, one of
  weight [out, in], F8_E4M3 or I8        none of two dimensions that are 1, [out, 1] or [out], [ceil(out/a), ceil(in/b)]
  weight_packed [out, in/4], int32       as those; a byte is the code with 128 added

A value is code * scale in float32. FP8 checkpoints call the scale weight_scale_inv and multiply with it all the same.
Zero points are weight_zero_point, int8 [out, groups], or int32 [out/4, groups], four of a column in a word with 128
added; a value is then (code - zero) * scale. With float16 scales a format holds these, with 128 added to both, and int8
without zero points in groups that are no multiple of 128 inputs, whose zero points are then 0. FP8 in such blocks is
held with a scale for every 64 or 32 inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cpu_kernels.formats import FP8_TYPE, FP8_TYPES, INT4_GROUPS, INT8_TYPE, UINT8_TYPES, GgufType
from hetero_attn.checkpoints.quantised.module import (
    Module,
    Read,
    RowWriter,
    Shapes,
    check_dtype,
    check_said_shape,
    finite_scales,
    matrix,
    needed,
    refuse,
    refuse_shape,
    write_blocks,
    write_zeroed_blocks,
)
from hetero_attn.errors import CheckpointError

if TYPE_CHECKING:
    import torch

FLOATS = ("F32", "BF16", "F16")
EXPONENTS = ("F8_E8M0", "U8")  # 2^(e - 127)
HELD_GROUP = INT8_TYPE.items
SCALE_NAMES = ("weight_scale_inv", "weight_scale", "scale")


@dataclass(frozen=True, slots=True, kw_only=True)
class ByteModule(Module):
    """block: rows and inputs that share a scale. zeros: the tensor of zero points, "" where they are 0."""

    codes: str
    scales: str
    block: tuple[int, int]
    zeros: str = ""

    def rows(self, read: Read, where: str) -> RowWriter:
        """See `Module.rows`."""
        import torch

        codes, scales = self._codes(read, where), self._scales(read, where)
        zeros = _zero_points(read(self.zeros), self.out_features) if self.zeros else None  # one for every row
        high, wide = self.block
        if zeros is None and self.kind in UINT8_TYPES.values():
            zeros = torch.zeros(self.out_features, -(-self.in_features // wide), dtype=torch.float32, device="cpu")

        def write(first: int, stop: int, out: torch.Tensor) -> None:
            groups = scales[torch.arange(first, stop, device="cpu") // high]
            if self.kind is None:
                of_input = torch.arange(self.in_features, device="cpu") // wide
                values = codes[first:stop].float()
                if zeros is not None:
                    values -= zeros[first:stop][:, of_input]
                torch.mul(values, groups[:, of_input], out=out)
                return
            of_block = torch.arange(self.row_bytes // self.kind.block_bytes, device="cpu") * self.kind.items // wide
            held, rows = groups[:, of_block], codes[first:stop].view(torch.uint8)
            if zeros is None:
                write_blocks(self.kind, held, rows, out)
            else:
                write_zeroed_blocks(held.half(), zeros[first:stop][:, of_block] + 128, rows ^ 128, out)

        return write

    def _codes(self, read: Read, where: str) -> torch.Tensor:
        """float8 or int8 [out, in]."""
        import torch

        found = read(self.codes)
        if found.dtype == torch.int32:
            found = (found.view(torch.uint8)[:, : self.in_features] ^ 128).view(torch.int8)
        elif found.dtype == torch.float8_e4m3fn and bool((found.view(torch.uint8) & 127 == 127).any()):
            raise CheckpointError(f"{where}: {self.codes} holds NaN; the checkpoint is damaged, download it again")
        return found

    def _scales(self, read: Read, where: str) -> torch.Tensor:
        """float32 [rows of blocks, columns of blocks]."""
        import torch

        found = read(self.scales)
        if found.dtype == torch.uint8:
            if bool((found == 255).any()):
                refuse(where, self.scales, "NaN (exponent 255)", "finite")
            found = torch.ldexp(torch.ones(found.shape, dtype=torch.float32, device="cpu"), found.int() - 127)
        high, wide = self.block
        return finite_scales(found, self.scales, where).view(-(-self.out_features // high), -1)[
            :, : -(-self.in_features // wide)
        ]


def _zero_points(packed: torch.Tensor, out_features: int) -> torch.Tensor:
    """float32 [out, groups]."""
    import torch

    if packed.dtype == torch.int8:
        return packed.view(out_features, -1).float()
    bytes_ = packed.t().contiguous().view(torch.uint8)[:, :out_features]
    return bytes_.t().float() - 128


def find_bytes(
    prefix: str, shapes: Shapes, where: str, read: Read, block: tuple[int, int] | None, group: int | None
) -> ByteModule:
    """A module of bytes by its tensors; `block`, `group`: what config.json says of its scales, None where nothing. Read
    are its shape, where that is a tensor, and scales that have zero points.

    Raises CheckpointError by name where a tensor is missing or contradicts another.
    """
    codes, kind, weight = _code_tensor(prefix, shapes, where)
    name = next((suffix for suffix in SCALE_NAMES if f"{prefix}.{suffix}" in shapes), "weight_scale")
    scales = needed(where, shapes, prefix, name, "fp8" if kind is FP8_TYPE else "int8")
    check_dtype(where, shapes, scales, FLOATS + EXPONENTS)
    found = _block(where, shapes, scales, weight, block, group)
    zeros = _zeros(where, shapes, f"{prefix}.weight_zero_point", (weight[0], -(-weight[1] // found[1])))
    shape = f"{prefix}.weight_shape"
    if shape in shapes:
        check_said_shape(where, shape, read(shape).tolist(), weight)
    fits = not zeros and (found[1] % HELD_GROUP == 0 or found[1] >= weight[1])
    if fits:
        held, why = kind, ""
    elif kind is FP8_TYPE:
        held, why = _fp8_in_groups(found[1], zeros)
    else:
        held, why = _int8_in_groups(found[1], weight[1], read(scales))
    return ByteModule(
        prefix=prefix,
        names=tuple(part for part in (codes, scales, zeros, shape, *_ignored(prefix)) if part in shapes),
        out_features=weight[0],
        in_features=weight[1],
        kind=held,
        why=why,
        codes=codes,
        scales=scales,
        block=found,
        zeros=zeros,
    )


def _code_tensor(prefix: str, shapes: Shapes, where: str) -> tuple[str, GgufType, tuple[int, int]]:
    """The tensor of codes, the type that holds them, outputs and inputs."""
    packed = f"{prefix}.weight" not in shapes
    codes = needed(where, shapes, prefix, "weight_packed" if packed else "weight", "8-bit")
    check_dtype(where, shapes, codes, ("I32",) if packed else ("F8_E4M3", "I8"))
    out, columns = matrix(where, shapes, codes)
    kind = FP8_TYPE if shapes[codes][0] == "F8_E4M3" else INT8_TYPE
    return codes, kind, (out, 4 * columns if packed else columns)


def _fp8_in_groups(wide: int, zeros: str) -> tuple[GgufType | None, str]:
    """The form of FP8 rows whose blocks are `wide` inputs, no multiple of 128; or None for float32, and why."""
    if zeros:
        return None, "FP8 codes with zero points"
    held = form_of_blocks(wide)
    return held, "" if held else f"FP8 scales of {wide} inputs, no multiple of {min(FP8_TYPES)}"


def form_of_blocks(wide: int) -> GgufType | None:
    """The form of FP8 rows whose scales are of `wide` inputs each; None where none is."""
    return next((FP8_TYPES[group] for group in sorted(FP8_TYPES, reverse=True) if wide % group == 0), None)


def _int8_in_groups(wide: int, inputs: int, scales: torch.Tensor) -> tuple[GgufType | None, str]:
    """The same of int8 rows with zero points, or in groups that `INT8_TYPE` does not have."""
    if not bool((scales.half().float() == scales.float()).all()):
        return None, f"8-bit codes in groups of {wide} inputs with scales that float16 does not hold"
    group = next((group for group in reversed(INT4_GROUPS) if wide % group == 0 and inputs % group == 0), None)
    if group is None:
        return None, f"8-bit codes in groups of {wide} inputs, no multiple of {INT4_GROUPS[0]}"
    return UINT8_TYPES[group], ""


def _zeros(where: str, shapes: Shapes, name: str, weight: tuple[int, int]) -> str:
    """The tensor of zero points, one for every row and group, or ""."""
    if name not in shapes:
        return ""
    check_dtype(where, shapes, name, ("I32", "I8"))
    shape = weight if shapes[name][0] == "I8" else (-(-weight[0] // 4), weight[1])
    if shapes[name][1] != shape:
        refuse_shape(where, shapes, name, list(shape))
    return name


def _ignored(prefix: str) -> tuple[str, ...]:
    """Scales of activations, which are rounded here by their own."""
    return tuple(f"{prefix}.{suffix}" for suffix in ("input_scale", "activation_scale", "input_scale_ub"))


def _block(
    where: str,
    shapes: Shapes,
    name: str,
    weight: tuple[int, int],
    block: tuple[int, int] | None,
    group: int | None,
) -> tuple[int, int]:
    """Rows and inputs that share a scale, by the shape of the scales."""
    (out, inputs), shape = weight, shapes[name][1]
    if all(size == 1 for size in shape):
        return out, inputs
    if shape in ((out,), (out, 1)):
        return 1, inputs
    if block is None and group is not None and len(shape) == 2 and shape == (out, -(-inputs // group)):
        return 1, group
    high, wide = block or (0, 0)
    if block is None or shape != (-(-out // high), -(-inputs // wide)):
        said = f" in blocks of {high}x{wide}" if block else f" in groups of {group}" if group else ""
        refuse_shape(where, shapes, name, f"scales of a weight of {list(weight)}{said}")
    return high, wide
