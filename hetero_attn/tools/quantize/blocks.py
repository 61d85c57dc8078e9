"""Rows of weights as blocks of GGUF's types, with the scales that `fit` finds; layouts: ggml's block structures.

Blocks of 32 inputs begin with float16 numbers; then come, of 5-bit types, the fifth bits of all in a word, and the
codes two in a byte, input j in the low and input j + 16 in the high nibble. Blocks of 256 have scales in two levels.
"""

from collections.abc import Callable

import torch

from cpu_kernels.formats import GGUF_TYPES, GgufType
from hetero_attn.tools.quantize.fit import (
    codes_of,
    fit_affine,
    fit_symmetric,
    fit_table,
    half,
    inverse,
    nearest_entries,
)

IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
CHUNK_WEIGHTS = 1 << 18  # encoded at once, in a core's cache
SUPERBLOCK = 256


def _halves(*numbers: torch.Tensor) -> torch.Tensor:
    """uint8 [blocks, 2 * count] of float16 numbers [blocks]."""
    return torch.stack(numbers, 1).half().view(torch.uint8)


def _pairs(codes: torch.Tensor, run: int = 32) -> torch.Tensor:
    """uint8 [blocks, n / 2] of codes below 16 [blocks, n]: of every `run`, the first half low, the last half high."""
    low, high = codes.to(torch.uint8).view(codes.shape[0], -1, 2, run // 2).unbind(2)
    return (low | high << 4).flatten(1)


def _fifth_bits(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [blocks, 4]: bit 4 of 32 codes, the first in the lowest bit."""
    bits = (codes.to(torch.uint8) >> 4 & 1).view(-1, 4, 8)
    return (bits << torch.arange(8, dtype=torch.uint8, device="cpu")).sum(2, dtype=torch.uint8)


def _symmetric(bits: int) -> Callable[[torch.Tensor], torch.Tensor]:
    offset = 1 << (bits - 1)

    def encode(values: torch.Tensor) -> torch.Tensor:
        scale = fit_symmetric(values, -offset, offset - 1)
        codes = codes_of(values, scale[:, None], 0.0, -offset, offset - 1) + offset
        upper = [_fifth_bits(codes)] if bits == 5 else []
        return torch.cat((_halves(scale), *upper, _pairs(codes.to(torch.uint8) & 15)), 1)

    return encode


def _affine(bits: int) -> Callable[[torch.Tensor], torch.Tensor]:
    high = (1 << bits) - 1

    def encode(values: torch.Tensor) -> torch.Tensor:
        scale, minimum = fit_affine(values, high)
        codes = codes_of(values, scale[:, None], minimum[:, None], 0, high)
        upper = [_fifth_bits(codes)] if bits == 5 else []
        return torch.cat((_halves(scale, minimum), *upper, _pairs(codes.to(torch.uint8) & 15)), 1)

    return encode


def _q8_0(values: torch.Tensor) -> torch.Tensor:
    best = half(values.abs().amax(1) / 127)
    error = (values - codes_of(values, best[:, None], 0.0, -127, 127) * best[:, None]).square_().sum(1)
    for divisor in (126.0, 126.5, 127.5, 128.0):
        scale = half(values.abs().amax(1) / divisor)
        found = (values - codes_of(values, scale[:, None], 0.0, -127, 127) * scale[:, None]).square_().sum(1)
        best, error = torch.where(found < error, scale, best), torch.minimum(found, error)
    codes = codes_of(values, best[:, None], 0.0, -127, 127)
    return torch.cat((_halves(best), codes.to(torch.int8).view(torch.uint8)), 1)


def _iq4_nl(values: torch.Tensor) -> torch.Tensor:
    table = torch.tensor(IQ4, dtype=torch.float32, device="cpu")
    scale = fit_table(values, table)
    return torch.cat((_halves(scale), _pairs(nearest_entries(values * inverse(scale)[:, None], table))), 1)


def _two_level(numbers: torch.Tensor, most: int, least: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(d float16 [blocks], codes least..most [blocks, groups]) whose products are nearest to numbers [blocks, groups].

    The largest number gets nearly the largest code; of a few such d the one of least squared error.
    """
    extreme = numbers.gather(1, numbers.abs().argmax(1, keepdim=True))[:, 0]
    best = torch.full(extreme.shape, torch.inf, device="cpu")
    found, codes = torch.zeros_like(extreme), torch.zeros_like(numbers)
    ends = [most - step for step in range(4)] + [least + step for step in range(4) if least < 0]
    for end in ends:
        d = half(extreme / end)
        tried = codes_of(numbers, d[:, None], 0.0, least, most)
        error = (numbers - tried * d[:, None]).square_().sum(1)
        better = error < best
        best, found = torch.where(better, error, best), torch.where(better, d, found)
        codes = torch.where(better[:, None], tried, codes)
    return found, codes


def _same(values: torch.Tensor) -> torch.Tensor:
    return values


def _with_minima(bits: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Q4_K and Q5_K."""
    high = (1 << bits) - 1

    def encode(values: torch.Tensor) -> torch.Tensor:
        groups = values.view(-1, 8, 32)
        scale, minimum = fit_affine(groups.view(-1, 32), high, below_zero=True, rounded=_same)
        d, scales = _two_level(scale.view(-1, 8), 63)
        dmin, minima = _two_level(-minimum.view(-1, 8), 63)
        held, taken = (d[:, None] * scales)[..., None], (dmin[:, None] * minima)[..., None]
        codes = codes_of(groups, held, -taken, 0, high).to(torch.uint8)
        upper = []
        if bits == 5:
            shifts = torch.arange(8, dtype=torch.uint8, device="cpu")[:, None]
            upper = [((codes >> 4 & 1) << shifts).sum(1, dtype=torch.uint8)]
        nibbles = _pairs((codes & 15).flatten(1), 64)
        return torch.cat((_halves(d, dmin), _six_bits(scales, minima), *upper, nibbles), 1)

    return encode


def _six_bits(scales: torch.Tensor, minima: torch.Tensor) -> torch.Tensor:
    """uint8 [blocks, 12] of eight scales and eight minima of 6 bits."""
    scales, minima = scales.to(torch.uint8), minima.to(torch.uint8)
    first = scales[:, :4] | (scales[:, 4:] >> 4) << 6
    second = minima[:, :4] | (minima[:, 4:] >> 4) << 6
    return torch.cat((first, second, scales[:, 4:] & 15 | (minima[:, 4:] & 15) << 4), 1)


def _q6_k(values: torch.Tensor) -> torch.Tensor:
    groups = values.view(-1, 16, 16)
    scale = fit_symmetric(groups.view(-1, 16), -32, 31, rounded=_same)
    d, scales = _two_level(scale.view(-1, 16), 127, -128)
    codes = codes_of(groups, (d[:, None] * scales)[..., None], 0.0, -32, 31) + 32
    halves = codes.to(torch.uint8).view(-1, 2, 4, 32)  # (block, half of 128, quarter, input)
    low = halves[:, :, :2] & 15 | (halves[:, :, 2:] & 15) << 4
    shifts = 2 * torch.arange(4, dtype=torch.uint8, device="cpu")[:, None]
    high = ((halves >> 4) << shifts).sum(2, dtype=torch.uint8)
    return torch.cat((low.flatten(1), high.flatten(1), scales.to(torch.int8).view(torch.uint8), _halves(d)), 1)


def _iq4_xs(values: torch.Tensor) -> torch.Tensor:
    table = torch.tensor(IQ4, dtype=torch.float32, device="cpu")
    groups = values.view(-1, 8, 32)
    scale = fit_table(groups.view(-1, 32), table, rounded=_same)
    d, scales = _two_level(scale.view(-1, 8), 31, -32)
    codes = nearest_entries(groups * inverse(d[:, None] * scales)[..., None], table)
    six = (scales + 32).to(torch.int32)
    low = (six & 15).to(torch.uint8)
    high = ((six >> 4) << 2 * torch.arange(8, dtype=torch.int32, device="cpu")).sum(1, dtype=torch.int32)
    head = torch.cat((_halves(d), high.to(torch.int16)[:, None].view(torch.uint8)), 1)
    return torch.cat((head, low[:, 0::2] | low[:, 1::2] << 4, _pairs(codes.flatten(1))), 1)


ENCODERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "Q4_0": _symmetric(4),
    "Q4_1": _affine(4),
    "Q5_0": _symmetric(5),
    "Q5_1": _affine(5),
    "Q8_0": _q8_0,
    "Q4_K": _with_minima(4),
    "Q5_K": _with_minima(5),
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
}
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TYPES: dict[str, GgufType] = {item.name: item for item in GGUF_TYPES.values()}


def fits(name: str, in_features: int) -> bool:
    """Whether rows of so many inputs are whole blocks of a type that is made here."""
    return (name in ENCODERS or name in PLAIN) and in_features % TYPES[name].items == 0


def encode(name: str, rows: torch.Tensor) -> torch.Tensor:
    """uint8 [rows, row_bytes] of float32 rows in a GGUF type; `in_features` must be a multiple of its items."""
    if name in PLAIN:
        return rows.to(PLAIN[name]).contiguous().view(torch.uint8)
    kind, parts = TYPES[name], []
    blocks = rows.reshape(-1, kind.items)
    step = max(1, CHUNK_WEIGHTS // kind.items)
    for start in range(0, blocks.shape[0], step):
        parts.append(ENCODERS[name](blocks[start : start + step]))
    return torch.cat(parts).view(rows.shape[0], -1)
