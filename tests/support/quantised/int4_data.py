"""Rows of groups of 4 or 8 bits: codes, scales and zero points drawn at random, their blocks, and their values."""

from typing import NamedTuple

import torch

from cpu_kernels.formats import INT4_GROUPS, INT4_TYPES, UINT8_TYPES, format_of

TYPES = {4: INT4_TYPES, 8: UINT8_TYPES}
BITS_AND_GROUPS = [(bits, group) for bits in TYPES for group in INT4_GROUPS]


class Groups(NamedTuple):
    """codes: uint8 [rows, in_features]; scales: float16 [rows, groups]; zeros: uint8 [rows, groups]; bits of a code."""

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    bits: int = 4

    @property
    def values(self) -> torch.Tensor:
        """float32 (code - zero) * scale, element by element as the formats' texts say."""
        each = self.codes.shape[1] // self.scales.shape[1]
        zeros, scales = (part.repeat_interleave(each, 1).float() for part in (self.zeros, self.scales))
        return (self.codes.float() - zeros) * scales


def random_groups(
    rows: int, in_features: int, group: int, most_zero: int | None = None, seed: int = 0, bits: int = 4
) -> Groups:
    """Every code and zero point that a file may hold, some scales negative."""
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(1 << bits, (rows, in_features), generator=draw, dtype=torch.uint8)
    scales = (torch.randn(rows, in_features // group, generator=draw) * 0.01).half()
    most_zero = {4: 16, 8: 255}[bits] if most_zero is None else most_zero
    zeros = torch.randint(most_zero + 1, scales.shape, generator=draw, dtype=torch.uint8)
    return Groups(codes, scales, zeros, bits)


def blocks(groups: Groups) -> torch.Tensor:
    """The rows as formats/source_types.py lays them out."""
    count = groups.scales.shape[1]
    each = groups.codes.shape[1] // count
    stored = groups.codes if groups.bits == 8 else groups.codes[:, 0::2] | groups.codes[:, 1::2] << 4
    parts = (
        groups.scales.view(torch.uint8).view(-1, count, 2),
        groups.zeros[..., None],
        torch.full((*groups.zeros.shape, 1), 77, dtype=torch.uint8),
        stored.view(-1, count, each * groups.bits // 8),
    )
    return torch.cat(parts, -1).flatten(1)


def packed(ops, groups: Groups) -> tuple[str, torch.Tensor]:
    """(format, packed weight) of the groups, padded with zero rows to whole blocks."""
    in_features = groups.codes.shape[1]
    kind, rows = TYPES[groups.bits][in_features // groups.scales.shape[1]], blocks(groups)
    rows = torch.nn.functional.pad(rows, (0, 0, 0, -rows.shape[0] % 16))
    out = torch.full((rows.shape[0] // 16, format_of(kind.format).block_bytes(in_features)), 171, dtype=torch.uint8)
    ops.repack(rows, kind.name, out)
    return kind.format, out
