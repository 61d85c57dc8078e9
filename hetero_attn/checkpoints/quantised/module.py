"""What every kind of quantised linear has: its shape, the tensors that it takes, and a way to its rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from cpu_kernels.formats import INT4_HEADER_BYTES, SCALE_BYTES, GgufType
from hetero_attn.errors import CheckpointError, UnsupportedModelError

if TYPE_CHECKING:
    import torch

AGAIN = "config and weights contradict each other, download both again"
INSTEAD = "take the model as GPTQ, AWQ (gemm), compressed-tensors, FP8, NF4 or GGUF, or unquantised"

Shapes = Mapping[str, tuple[str, tuple[int, ...]]]  # (safetensors dtype, shape) by name
Read = Callable[[str], "torch.Tensor"]  # a tensor of the file by its name, as it is there
RowWriter = Callable[[int, int, "torch.Tensor"], None]  # rows [first, stop) into a tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Module:
    """A linear `prefix`.weight, [out_features, in_features].

    names: the tensors of the file that it is made of. kind: the form of its rows, None for float32 values. why: in
    plain words, why they are held as those.
    """

    prefix: str
    names: tuple[str, ...]
    out_features: int
    in_features: int
    kind: GgufType | None
    why: str = ""

    @property
    def row_bytes(self) -> int:
        """Bytes of a row as it is read: whole groups of codes, or float32."""
        if self.kind is None:
            return 4 * self.in_features
        return -(-self.in_features // self.kind.items) * self.kind.block_bytes

    def input_order(self, read: Read) -> torch.Tensor | None:
        """Which input of the model each input of its rows is, int64 [in_features]; None where they are the same."""
        return None

    def rows(self, read: Read, where: str) -> RowWriter:
        """Read the module, check its values and return what writes its rows: uint8 [rows, row_bytes], or float32 [rows,
        in_features] where `kind` is None. Raises CheckpointError or UnsupportedModelError by name."""
        raise NotImplementedError


def refuse(where: str, name: str, found: object, expected: str) -> NoReturn:
    """Raise CheckpointError: a tensor is not what its module needs."""
    raise CheckpointError(f"{where}: {name} is {found}, expected {expected}; {AGAIN}")


def refuse_shape(where: str, shapes: Shapes, name: str, expected: object) -> NoReturn:
    """Raise CheckpointError: a tensor has another shape than its module needs."""
    raise CheckpointError(f"{where}: {name} has shape {list(shapes[name][1])}, expected {expected}; {AGAIN}")


def check_dtype(where: str, shapes: Shapes, name: str, dtypes: tuple[str, ...]) -> None:
    """CheckpointError where a tensor has none of these safetensors dtypes."""
    if (found := shapes[name][0]) not in dtypes:
        refuse(where, name, found, " or ".join(dtypes))


def needed(where: str, shapes: Shapes, prefix: str, suffix: str, kind: str) -> str:
    """The name of a tensor that a module must have; CheckpointError where it is not there."""
    if (name := f"{prefix}.{suffix}") not in shapes:
        raise CheckpointError(f"{where}: {prefix} has no {suffix}, which {kind} weights need; {AGAIN}")
    return name


def matrix(where: str, shapes: Shapes, name: str) -> tuple[int, int]:
    """The shape of a tensor of two dimensions that is not empty."""
    shape = shapes[name][1]
    if len(shape) != 2 or 0 in shape:
        refuse_shape(where, shapes, name, "a matrix")
    return shape[0], shape[1]


def check_said_shape(where: str, name: str, said: list[int], codes: tuple[int, int]) -> None:
    """CheckpointError where a tensor says another shape of a weight than its codes have."""
    if said != list(codes):
        raise CheckpointError(f"{where}: {name} says {said}, the codes are {list(codes)}; {AGAIN}")


def write_blocks(kind: GgufType, scales: torch.Tensor, codes: torch.Tensor, out: torch.Tensor) -> None:
    """Lay rows out as blocks of `kind`: float32 scales [rows, groups] and their codes, uint8 [rows, bytes], padded."""
    import torch

    rows, groups = scales.shape
    target = out.view(rows, groups, kind.block_bytes)
    width = groups * (kind.block_bytes - SCALE_BYTES)
    if codes.shape[1] < width:
        codes = torch.nn.functional.pad(codes, (0, width - codes.shape[1]))
    target[:, :, :SCALE_BYTES] = scales.contiguous().view(torch.uint8).view(rows, groups, SCALE_BYTES)
    target[:, :, SCALE_BYTES:] = codes.reshape(rows, groups, -1)


def write_zeroed_blocks(scales: torch.Tensor, zeros: torch.Tensor, codes: torch.Tensor, out: torch.Tensor) -> None:
    """Lay rows out as blocks of a form with zero points: float16 scales and u8 zero points [rows, groups], and codes,
    uint8 [rows, bytes], as formats/source_types.py says."""
    import torch

    target = out.view(*scales.shape, -1)
    target[:, :, :2] = scales[..., None].view(torch.uint8)
    target[:, :, 2] = zeros
    target[:, :, 3] = 0
    target[:, :, INT4_HEADER_BYTES:] = codes.reshape(*scales.shape, -1)


def finite_scales(values: torch.Tensor, name: str, where: str) -> torch.Tensor:
    """float32 scales; CheckpointError names the tensor that holds one that is not finite."""
    import torch

    found = values.float()
    if not torch.isfinite(found).all():
        raise CheckpointError(f"{where}: {name} holds a scale that is not finite; the checkpoint is damaged")
    return found


def unsupported(where: str, what: str) -> NoReturn:
    """Raise UnsupportedModelError with the way out."""
    raise UnsupportedModelError(f"{where}: {what}. {INSTEAD}")
