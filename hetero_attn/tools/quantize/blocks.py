"""GGUF's block types as grids that weights are rounded to: how a grid is fitted, and how its codes lie in the file.

Blocks of 32 inputs begin with float16 numbers; then come, of 5-bit types, the fifth bits of all in a word, and the
codes two in a byte, input j in the low and input j + 16 in the high nibble. Blocks of 256 have scales in two levels.
Layouts: ggml's block structures.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch

from hetero_attn.tools.quantize.fit import (
    codes_of,
    fit_affine,
    fit_symmetric,
    fit_table,
    half,
    inverse,
    least_squares_scale,
    nearest_entries,
    unrounded,
    weighted,
)

IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
ALTERNATIONS = 3  # between codes and the stored numbers of two levels

Importance: TypeAlias = torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Grid:
    """The values that the codes of some blocks can have: scale * code + minimum, of every group of a block.

    scale: float32 [blocks, groups], as a reader of the file computes it. minimum: likewise, None where there is none.
    stored: the numbers that a block keeps.
    """

    scale: torch.Tensor
    minimum: torch.Tensor | None
    stored: tuple[torch.Tensor, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockType:
    """A type that is made here.

    group: inputs that share a scale. low, high: the least and the greatest code. table: what codes stand for, where
    that is not the codes themselves. fit: (values [blocks, items], their importance or None) -> Grid. pack: (the
    grid's stored numbers, codes [blocks, items], whole numbers in float32) -> uint8 [blocks, block_bytes].
    """

    group: int
    low: int
    high: int
    fit: Callable[[torch.Tensor, Importance], Grid]
    pack: Callable[[tuple[torch.Tensor, ...], torch.Tensor], torch.Tensor]
    table: tuple[int, ...] = ()

    def codes(self, values: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor | float) -> torch.Tensor:
        """The nearest codes, float32; scale and minimum broadcast."""
        if self.table:
            return nearest_entries(values * inverse(scale), _table(self.table)).float()
        return codes_of(values, scale, minimum, self.low, self.high)

    def values(self, codes: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor | float) -> torch.Tensor:
        """What codes stand for, float32."""
        return (_table(self.table)[codes.long()] if self.table else codes) * scale + minimum


def _table(entries: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor(entries, dtype=torch.float32, device="cpu")


def _halves(*numbers: torch.Tensor) -> torch.Tensor:
    """uint8 [blocks, 2 * count] of float16 numbers [blocks]."""
    return torch.stack(numbers, 1).half().view(torch.uint8)


def _pairs(codes: torch.Tensor, run: int = 32) -> torch.Tensor:
    """uint8 [blocks, n / 2] of codes below 16 [blocks, n]: of every `run`, the first half low, the last half high."""
    low, high = codes.view(codes.shape[0], -1, 2, run // 2).unbind(2)
    return (low | high << 4).flatten(1)


def _fifth_bits(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [blocks, 4]: bit 4 of 32 codes, the first in the lowest bit."""
    bits = (codes >> 4 & 1).view(-1, 4, 8)
    return (bits << torch.arange(8, dtype=torch.uint8, device="cpu")).sum(2, dtype=torch.uint8)


def _small(bits: int, numbers: tuple[torch.Tensor, ...], codes: torch.Tensor) -> torch.Tensor:
    """Blocks of 32 inputs of 4 or 5 bits, codes from 0."""
    whole = codes.to(torch.uint8)
    upper = [_fifth_bits(whole)] if bits == 5 else []
    return torch.cat((_halves(*numbers), *upper, _pairs(whole & 15)), 1)


def _symmetric(bits: int) -> BlockType:
    """Q4_0 and Q5_0."""
    offset = 1 << (bits - 1)

    def fit(values: torch.Tensor, importance: Importance) -> Grid:
        scale = fit_symmetric(values, -offset, offset - 1, importance=importance)
        return Grid(scale[:, None], None, (scale,))

    return BlockType(
        group=32,
        low=-offset,
        high=offset - 1,
        fit=fit,
        pack=lambda numbers, codes: _small(bits, numbers, codes + offset),
    )


def _affine(bits: int) -> BlockType:
    """Q4_1 and Q5_1."""
    high = (1 << bits) - 1

    def fit(values: torch.Tensor, importance: Importance) -> Grid:
        scale, minimum = fit_affine(values, high, importance=importance)
        return Grid(scale[:, None], minimum[:, None], (scale, minimum))

    return BlockType(group=32, low=0, high=high, fit=fit, pack=lambda numbers, codes: _small(bits, numbers, codes))


def _fit_q8_0(values: torch.Tensor, importance: Importance) -> Grid:
    best = torch.zeros(values.shape[0], dtype=torch.float32, device="cpu")
    error = torch.full_like(best, torch.inf)
    for divisor in (127.0, 126.0, 126.5, 127.5, 128.0):
        scale = half(values.abs().amax(1) / divisor)
        missed = (values - codes_of(values, scale[:, None], 0.0, -127, 127) * scale[:, None]).square_()
        found = weighted(missed, importance).sum(1)
        best, error = torch.where(found < error, scale, best), torch.minimum(found, error)
    return Grid(best[:, None], None, (best,))


def _fit_iq4_nl(values: torch.Tensor, importance: Importance) -> Grid:
    scale = fit_table(values, _table(IQ4), importance=importance)
    return Grid(scale[:, None], None, (scale,))


def _two_level(numbers: torch.Tensor, weight: torch.Tensor, most: int, least: int = 0) -> tuple[torch.Tensor, ...]:
    """(d float16 [blocks], codes least..most [blocks, groups]) whose products are nearest to numbers [blocks, groups].

    weight: how much the square of each error counts. The largest number gets nearly the largest code; of a few such d
    the one of least squared error.
    """
    extreme = numbers.gather(1, numbers.abs().argmax(1, keepdim=True))[:, 0]
    best = torch.full(extreme.shape, torch.inf, device="cpu")
    found, codes = torch.zeros_like(extreme), torch.zeros_like(numbers)
    ends = [most - step for step in range(5)] + [least + step for step in range(5) if least < 0]
    for end in ends:
        d = half(extreme / end)
        tried = codes_of(numbers, d[:, None], 0.0, least, most)
        error = (weight * (numbers - tried * d[:, None]).square_()).sum(1)
        better = error < best
        best, found = torch.where(better, error, best), torch.where(better, d, found)
        codes = torch.where(better[:, None], tried, codes)
    return found, codes


def _with_minima(bits: int) -> BlockType:
    """Q4_K and Q5_K: (d * s) * code - dmin * m, with s and m of 6 bits for every 32 inputs."""
    high = (1 << bits) - 1

    def fit(values: torch.Tensor, importance: Importance) -> Grid:
        groups = values.view(-1, 8, 32)
        heavy = torch.ones_like(groups) if importance is None else importance.reshape(groups.shape)
        found = fit_affine(groups.view(-1, 32), high, below_zero=True, rounded=unrounded, importance=heavy.view(-1, 32))
        scale, minimum = (numbers.view(-1, 8) for numbers in found)
        square = codes_of(groups, scale[..., None], minimum[..., None], 0, high).square_()
        d, scales = _two_level(scale, (heavy * square).sum(2), 63)
        dmin, minima = _two_level(-minimum, heavy.sum(2), 63)
        return _alternated(groups, heavy, high, d, dmin, scales, minima)

    def pack(numbers: tuple[torch.Tensor, ...], codes: torch.Tensor) -> torch.Tensor:
        d, dmin, scales, minima = numbers
        whole, upper = codes.to(torch.uint8), []
        if bits == 5:
            shifts = torch.arange(8, dtype=torch.uint8, device="cpu")[:, None]
            upper = [((whole.view(-1, 8, 32) >> 4 & 1) << shifts).sum(1, dtype=torch.uint8)]
        return torch.cat((_halves(d, dmin), _six_bits(scales, minima), *upper, _pairs(whole & 15, 64)), 1)

    return BlockType(group=32, low=0, high=high, fit=fit, pack=pack)


def _alternated(
    groups: torch.Tensor,
    heavy: torch.Tensor,
    high: int,
    d: torch.Tensor,
    dmin: torch.Tensor,
    scales: torch.Tensor,
    minima: torch.Tensor,
) -> Grid:
    """The six-bit numbers that suit the codes, and codes that suit those, in turns: what is rounded first is made up
    for by what follows."""
    best = torch.full(scales.shape, torch.inf, device="cpu")
    kept_scales, kept_minima = scales, minima
    for turn in range(ALTERNATIONS):
        held, taken = (d[:, None] * scales)[..., None], (dmin[:, None] * minima)[..., None]
        codes = codes_of(groups, held, -taken, 0, high)
        error = (heavy * (groups - (held * codes - taken)).square_()).sum(2)
        better = error < best
        best = torch.where(better, error, best)
        kept_scales, kept_minima = torch.where(better, scales, kept_scales), torch.where(better, minima, kept_minima)
        if turn % 2 == 0:
            wanted = least_squares_scale(codes, groups + taken, heavy, 2)
            scales = (wanted * inverse(d[:, None])).round_().clamp_(0, 63)
        else:
            wanted = (heavy * (held * codes - groups)).sum(2) * inverse(heavy.sum(2))
            minima = (wanted * inverse(dmin[:, None])).round_().clamp_(0, 63)
    return Grid(d[:, None] * kept_scales, -(dmin[:, None] * kept_minima), (d, dmin, kept_scales, kept_minima))


def _six_bits(scales: torch.Tensor, minima: torch.Tensor) -> torch.Tensor:
    """uint8 [blocks, 12] of eight scales and eight minima of 6 bits."""
    scales, minima = scales.to(torch.uint8), minima.to(torch.uint8)
    first = scales[:, :4] | (scales[:, 4:] >> 4) << 6
    second = minima[:, :4] | (minima[:, 4:] >> 4) << 6
    return torch.cat((first, second, scales[:, 4:] & 15 | (minima[:, 4:] & 15) << 4), 1)


def _fit_q6_k(values: torch.Tensor, importance: Importance) -> Grid:
    groups = values.view(-1, 16, 16)
    heavy = torch.ones_like(groups) if importance is None else importance.reshape(groups.shape)
    scale = fit_symmetric(groups.view(-1, 16), -32, 31, unrounded, heavy.view(-1, 16)).view(-1, 16)
    square = codes_of(groups, scale[..., None], 0.0, -32, 31).square_()
    d, scales = _two_level(scale, (heavy * square).sum(2), 127, -128)
    return Grid(d[:, None] * scales, None, (d, scales))


def _pack_q6_k(numbers: tuple[torch.Tensor, ...], codes: torch.Tensor) -> torch.Tensor:
    d, scales = numbers
    halves = (codes + 32).to(torch.uint8).view(-1, 2, 4, 32)  # (block, half of 128, quarter, input)
    low = halves[:, :, :2] & 15 | (halves[:, :, 2:] & 15) << 4
    shifts = 2 * torch.arange(4, dtype=torch.uint8, device="cpu")[:, None]
    high = ((halves >> 4) << shifts).sum(2, dtype=torch.uint8)
    return torch.cat((low.flatten(1), high.flatten(1), scales.to(torch.int8).view(torch.uint8), _halves(d)), 1)


def _fit_iq4_xs(values: torch.Tensor, importance: Importance) -> Grid:
    table, groups = _table(IQ4), values.view(-1, 8, 32)
    heavy = torch.ones_like(groups) if importance is None else importance.reshape(groups.shape)
    scale = fit_table(groups.view(-1, 32), table, unrounded, heavy.view(-1, 32)).view(-1, 8)
    entries = table[nearest_entries(groups * inverse(scale)[..., None], table).int()]
    d, scales = _two_level(scale, (heavy * entries.square_()).sum(2), 31, -32)
    return Grid(d[:, None] * scales, None, (d, scales))


def _pack_iq4_xs(numbers: tuple[torch.Tensor, ...], codes: torch.Tensor) -> torch.Tensor:
    d, scales = numbers
    six = (scales + 32).to(torch.int32)
    low = (six & 15).to(torch.uint8)
    high = ((six >> 4) << 2 * torch.arange(8, dtype=torch.int32, device="cpu")).sum(1, dtype=torch.int32)
    head = torch.cat((_halves(d), high.to(torch.int16)[:, None].view(torch.uint8)), 1)
    return torch.cat((head, low[:, 0::2] | low[:, 1::2] << 4, _pairs(codes.to(torch.uint8))), 1)


BLOCK_TYPES: dict[str, BlockType] = {
    "Q4_0": _symmetric(4),
    "Q4_1": _affine(4),
    "Q5_0": _symmetric(5),
    "Q5_1": _affine(5),
    "Q8_0": BlockType(
        group=32,
        low=-127,
        high=127,
        fit=_fit_q8_0,
        pack=lambda numbers, codes: torch.cat((_halves(*numbers), codes.to(torch.int8).view(torch.uint8)), 1),
    ),
    "Q4_K": _with_minima(4),
    "Q5_K": _with_minima(5),
    "Q6_K": BlockType(group=16, low=-32, high=31, fit=_fit_q6_k, pack=_pack_q6_k),
    "IQ4_NL": BlockType(
        group=32,
        low=0,
        high=15,
        table=IQ4,
        fit=_fit_iq4_nl,
        pack=lambda numbers, codes: torch.cat((_halves(*numbers), _pairs(codes.to(torch.uint8))), 1),
    ),
    "IQ4_XS": BlockType(group=32, low=0, high=15, table=IQ4, fit=_fit_iq4_xs, pack=_pack_iq4_xs),
}
