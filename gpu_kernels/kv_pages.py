"""The oracle of KV pages: rows of K and V written into pages and read from them, in plain torch on any device.

Pages are [num_pages, page_size, row_items]; their torch dtype says what they hold.

  float32, bfloat16   rows of head_dim numbers
  int8 (q8)           per page: codes int8 [page_size, padded head_dim], then scales bfloat16 [groups, page_size];
                      groups of 64 dims; scale = bf16(absmax / 127), code = round(x / scale), x ~ code * scale
  uint8 (q4)          per page: codes [page_size, padded head_dim / 2], dim 2i in the low nibble of byte i; then scales
                      and then minima, each bfloat16 [groups, page_size]; groups of 32 dims; minimum = bf16(min),
                      scale = bf16((max - minimum) / 15), code = round((x - minimum) / scale),
                      x ~ code * scale + minimum

Rounding is to nearest even, in float32; a scale of 0 gives the code 0.

A key in pages of codes, and the query that meets it, are first multiplied by one orthonormal Walsh-Hadamard matrix
(see `spread`): q . k stays what it was, and a channel far larger than the others makes no scale too coarse for them.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP_DIMS = {torch.int8: 64, torch.uint8: 32}


def row_items(dtype: torch.dtype, head_dim: int) -> int:
    """Last dimension of pages of this dtype."""
    if dtype not in GROUP_DIMS:
        return head_dim
    groups = -(-head_dim // GROUP_DIMS[dtype])
    return groups * (64 + 2 if dtype == torch.int8 else 16 + 4)


def query_dtype(dtype: torch.dtype) -> torch.dtype:
    """What q is rounded to before it meets pages of this dtype."""
    return torch.bfloat16 if dtype in GROUP_DIMS else dtype


def hadamard_block(dtype: torch.dtype, head_dim: int) -> int:
    """Dims that `spread` mixes with each other: the largest power of two that divides head_dim; 1 for plain pages."""
    return head_dim & -head_dim if dtype in GROUP_DIMS else 1


def spread(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Rotated q or k [..., head_dim] as pages of this dtype want it: each block of dims times a Walsh-Hadamard matrix.

    At strides 1, 2, 4, ... (a, b) becomes (a + b, a - b) on the dims (i, i + stride); then all are multiplied
    by 1 / sqrt(block). The matrix is symmetric and its own inverse.
    """
    block = hadamard_block(dtype, rows.shape[-1])
    stride = 1
    while stride < block:
        a, b = rows.unflatten(-1, (-1, 2, stride)).unbind(-2)
        rows = torch.stack((a + b, a - b), -2).flatten(-3)
        stride *= 2
    return rows * block**-0.5


def write_rows(pages: Tensor, page: Tensor, offset: Tensor, rows: Tensor) -> None:
    """Store rows [..., head_dim] at (page, offset), int64 [...]."""
    if pages.dtype not in GROUP_DIMS:
        pages[page, offset] = rows.to(pages.dtype)
        return
    codes, numbers = quantize(rows.float(), pages.dtype)
    stored_codes, stored_numbers = _parts(pages, codes.shape[-1])
    stored_codes[page, offset] = codes
    stored_numbers[page, :, offset] = numbers.to(torch.bfloat16)


def read_rows(pages: Tensor, head_dim: int, dtype: torch.dtype) -> Tensor:
    """The numbers of whole pages [..., page_size, row_items] as `dtype` [..., page_size, head_dim]."""
    if pages.dtype not in GROUP_DIMS:
        return pages.to(dtype)
    group = GROUP_DIMS[pages.dtype]
    groups = -(-head_dim // group)
    codes, numbers = _parts(pages.contiguous(), groups * group // (1 if pages.dtype == torch.int8 else 2))
    numbers = numbers.to(dtype).transpose(-1, -2)[..., None]  # (..., page_size, groups or 2 groups, 1)
    if pages.dtype == torch.uint8:
        codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)
    values = codes.to(dtype).unflatten(-1, (groups, group)) * numbers[..., :groups, :]
    if pages.dtype == torch.uint8:
        values = values + numbers[..., groups:, :]
    return values.flatten(-2)[..., :head_dim]


def quantize(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows f32 [..., head_dim] -> codes as stored [..., bytes]; scales, then minima, f32 [..., groups or 2 groups]."""
    group = GROUP_DIMS[dtype]
    grouped = torch.nn.functional.pad(rows, (0, -rows.shape[-1] % group)).unflatten(-1, (-1, group))
    if dtype == torch.int8:
        scale = _bf16(grouped.abs().amax(-1) / 127)
        codes = _divided(grouped, scale).clamp(-127, 127).to(torch.int8)
        return codes.flatten(-2), scale
    inside = torch.arange(grouped.shape[-2] * group, device=rows.device).view(-1, group) < rows.shape[-1]
    minimum = _bf16(grouped.masked_fill(~inside, torch.inf).amin(-1))
    scale = _bf16((grouped.masked_fill(~inside, -torch.inf).amax(-1) - minimum) / 15)
    codes = torch.where(inside, _divided(grouped - minimum[..., None], scale).clamp(0, 15), 0).to(torch.uint8)
    low, high = codes.unflatten(-1, (-1, 2)).unbind(-1)
    return (low | high << 4).flatten(-2), torch.cat((scale, minimum), -1)


def _divided(grouped: Tensor, scale: Tensor) -> Tensor:
    quotient = grouped / torch.where(scale == 0, 1.0, scale)[..., None]
    return torch.round(torch.where(scale[..., None] == 0, 0.0, quotient))


def _bf16(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).float()


def _parts(pages: Tensor, code_bytes: int) -> tuple[Tensor, Tensor]:
    """Views (codes [..., page_size, code_bytes], numbers bfloat16 [..., n, page_size]) of quantised pages."""
    page_size = pages.shape[-2]
    whole = pages.view(*pages.shape[:-2], page_size * pages.shape[-1])
    codes, numbers = whole[..., : page_size * code_bytes], whole[..., page_size * code_bytes :]
    per_token = (pages.shape[-1] - code_bytes) // 2
    numbers = numbers.view(torch.bfloat16).unflatten(-1, (per_token, page_size))
    return codes.unflatten(-1, (page_size, code_bytes)), numbers
