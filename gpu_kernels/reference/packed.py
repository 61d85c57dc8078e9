"""Packed weights as the numbers they stand for, by hand, so that no table of the kernels can agree with itself."""

from __future__ import annotations

import torch
from torch import Tensor

from gpu_kernels.forms.unpack import FORMS, superblock_bytes, unpack_form

PLAIN_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BLOCK_FEATURES = 16
GROUP = 64
SUPERBLOCK_BYTES = {"q8": 1088, "q4": 576}  # of 64 inputs; those of the other coded formats follow from their form
LINE_BYTES = 64


def check_weight_dtype(weight_dtype: str) -> None:
    """Raise ValueError, which names those there are, unless this is a format of weights."""
    known = ("fp32", "bf16", *SUPERBLOCK_BYTES, "fp16", *FORMS)
    if weight_dtype not in known:
        raise ValueError(f"weight dtype {weight_dtype!r} is unknown; known: {', '.join(known)}")


def block_bytes(weight_dtype: str, in_features: int) -> int:
    """Bytes of 16 output features."""
    check_weight_dtype(weight_dtype)
    if weight_dtype in PLAIN_DTYPES:
        return BLOCK_FEATURES * in_features * PLAIN_DTYPES[weight_dtype].itemsize
    if weight_dtype in FORMS:
        form = FORMS[weight_dtype]
        return -(-in_features // form.inputs) * superblock_bytes(form)
    return -(-in_features // GROUP) * SUPERBLOCK_BYTES[weight_dtype]


def mix_of(weight_dtype: str) -> list[tuple[str, int]]:
    """(format, blocks in a unit) of every part of a mix; a plain format is one of one."""
    return [(name, int(count or 1)) for name, _, count in (part.partition("*") for part in weight_dtype.split("+"))]


def mixed_parts(weight: Tensor, weight_dtype: str, in_features: int) -> list[tuple[str, Tensor, Tensor | slice]]:
    """(format, blocks [count, block_bytes], output features) of every format of a mix; all of them of a plain
    format."""
    if "*" not in weight_dtype:
        return [(weight_dtype, weight, slice(None))]
    parts = mix_of(weight_dtype)
    found, at, first = [], 0, 0
    unit_blocks = sum(count for _, count in parts)
    features = torch.arange(weight.shape[0] * unit_blocks * BLOCK_FEATURES, device=weight.device)
    features = features.view(weight.shape[0], unit_blocks, BLOCK_FEATURES)
    for name, count in parts:
        size = count * block_bytes(name, in_features)
        blocks = weight[:, at : at + size].contiguous().view(weight.shape[0] * count, -1)
        found.append((name, blocks, features[:, first : first + count].flatten()))
        at, first = at + size, first + count
    return found


def unpack(weight: Tensor, weight_dtype: str, in_features: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Dequantise packed blocks to a dense `dtype` [num_blocks*16, in_features].

    weight: uint8 [num_blocks, block_bytes], contiguous. Raises ValueError for an unknown weight dtype.
    """
    check_weight_dtype(weight_dtype)
    if weight_dtype in PLAIN_DTYPES:
        return weight.view(PLAIN_DTYPES[weight_dtype]).reshape(-1, in_features).to(dtype)
    if weight_dtype in FORMS:
        return unpack_form(weight, weight_dtype, in_features, dtype)
    superblocks = -(-in_features // GROUP)
    lines = weight.view(weight.shape[0], superblocks, -1, LINE_BYTES)
    values = (_unpack_q4 if weight_dtype == "q4" else _unpack_q8)(lines, dtype)
    return values.reshape(weight.shape[0] * BLOCK_FEATURES, superblocks * GROUP)[:, :in_features]


def unpack_rows(weight: Tensor, weight_dtype: str, row_ids: Tensor, out: Tensor) -> None:
    """As `CpuKernels.unpack_rows`, into `out` of any float dtype."""
    if weight_dtype in PLAIN_DTYPES:
        out.copy_(weight[row_ids])
        return
    blocks = row_ids // BLOCK_FEATURES
    rows = unpack(weight[blocks], weight_dtype, out.shape[1], out.dtype)
    out.copy_(
        rows.view(-1, BLOCK_FEATURES, out.shape[1])[
            torch.arange(len(blocks), device=out.device), row_ids % BLOCK_FEATURES
        ]
    )


def _unpack_q4(lines: Tensor, dtype: torch.dtype) -> Tensor:
    num_blocks, superblocks = lines.shape[:2]
    header = lines[:, :, 0].contiguous().view(torch.float16).to(dtype)
    scale, minimum = (part.transpose(1, 2)[..., None] for part in header.split(BLOCK_FEATURES, dim=-1))
    pairs = lines[:, :, 1:].reshape(num_blocks, superblocks, 8, BLOCK_FEATURES, 4)
    nibbles = torch.stack((pairs & 15, pairs >> 4), dim=-2)  # (num_blocks, superblocks, 8 lines, 16 features, 2, 4)
    nibbles = nibbles.permute(0, 3, 1, 2, 4, 5).reshape(num_blocks, BLOCK_FEATURES, superblocks, GROUP)
    return nibbles.to(dtype) * scale + minimum


def _unpack_q8(lines: Tensor, dtype: torch.dtype) -> Tensor:
    num_blocks, superblocks = lines.shape[:2]
    header = lines[:, :, 0].contiguous().view(torch.float16).to(dtype)
    scale = header.view(num_blocks, superblocks, 2, BLOCK_FEATURES).permute(0, 3, 1, 2)[..., None]
    stored = lines[:, :, 1:].reshape(num_blocks, superblocks, 2, 8, BLOCK_FEATURES, 4)
    stored = stored.permute(0, 4, 1, 2, 3, 5).reshape(num_blocks, BLOCK_FEATURES, superblocks, 2, GROUP // 2)
    return (stored.to(dtype) - 128) * scale
