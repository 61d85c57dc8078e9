"""Codes of 4 and 8 bits in the int32 words of checkpoints, as the rows of bytes that blocks are made of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hetero_attn.checkpoints.quantised.scheme import GroupScheme

if TYPE_CHECKING:
    import torch

IN_ORDER = (0, 1, 2, 3, 4, 5, 6, 7)
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
PER_WORD = 8  # of 4 bits


def stored_rows(
    scheme: GroupScheme, codes: torch.Tensor, first: int, stop: int, order: torch.Tensor | None
) -> torch.Tensor:
    """Codes as rows of blocks have them, a byte each or two in a byte, their inputs in this order."""
    if order is None:
        return (_codes if scheme.bits == 8 else _pairs)(scheme, codes, first, stop)
    rows = _codes(scheme, codes, first, stop).index_select(1, order)
    return rows if scheme.bits == 8 else rows[:, 0::2] | rows[:, 1::2] << 4


def _codes(scheme: GroupScheme, codes: torch.Tensor, first: int, stop: int) -> torch.Tensor:
    """uint8 [rows, in_features]."""
    import torch

    if scheme.bits == 8:
        return codes[:, first:stop].t().contiguous().view(torch.uint8)
    pairs = _pairs(scheme, codes, first, stop)
    return torch.stack((pairs & 15, pairs >> 4), -1).flatten(1)


def nibbles(words: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """uint8 [..., 8n] of int32 [..., n]; order: which nibble of its word every value is."""
    import torch

    shifts = torch.tensor(order, dtype=torch.int32, device="cpu") * 4
    return ((words[..., None] >> shifts) & 15).to(torch.uint8).flatten(-2)


def _pairs(scheme: GroupScheme, codes: torch.Tensor, first: int, stop: int) -> torch.Tensor:
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
