"""Codes of eight bits that many rows on AVX2 multiply as magnitudes, with inputs whose bits are flipped for negative ones."""

import pytest
import torch

from cpu_kernels.formats import FORMATS, LINE_BYTES, unit_bytes
from cpu_kernels.linear.sizes import FLIPPED_PLANES, LARGEST_PAIRED, SPREAD_ROWS, spread_plane, spread_rows
from cpu_kernels.vectors.code_sums import CodeSums
from cpu_kernels.vectors.isa import named
from tests.support.kernels.cpu_oracles import kernels

IN_FEATURES, ROWS = 576, SPREAD_ROWS + 4
CODED = [item for item in FORMATS.values() if not item.is_row_major and not item.has_float_codes]
FLIPPED = [item for item in CODED if spread_plane(named("avx2"), item) in FLIPPED_PLANES.values()]
ORDINARY = ("q8", "iq4_xs", "int8", "uint8_g32")  # one of each header's kind; every format takes seconds to compile


def test_flipped_are_those_whose_products_would_not_fit_int16():
    assert {item.name for item in FLIPPED} == {item.name for item in CODED if magnitudes("avx2", item)}
    assert all(spread_rows(named("avx2"), item) == SPREAD_ROWS for item in FLIPPED)
    assert not any(spread_plane(named("avxvnni"), item) in FLIPPED_PLANES.values() for item in CODED)
    assert CodeSums(named("avx2"), LARGEST_PAIRED).kind == "pairs"
    assert CodeSums(named("avx2"), LARGEST_PAIRED + 1).kind == "magnitudes"


def magnitudes(isa: str, item) -> bool:
    """Whether a format's codes are multiplied as magnitudes where they lie."""
    return CodeSums(named(isa), item.largest_code).kind == "magnitudes"


def weights_of(item, kind: str) -> torch.Tensor:
    """Four blocks: codes all the least, all the largest, in turns, or drawn."""
    weight = torch.full((4, unit_bytes(item.name, IN_FEATURES)), 0x3C, dtype=torch.uint8)
    codes = weight.view(-1, item.superblock_bytes)[:, LINE_BYTES * item.header_lines :]
    if kind == "drawn":
        draw = torch.Generator().manual_seed(7)
        codes[:] = torch.randint(0, 256, codes.shape, generator=draw, dtype=torch.uint8)
    else:
        codes[:, 0::2], codes[:, 1::2] = {"least": (0, 0), "largest": (255, 255), "in turns": (0, 255)}[kind]
    return weight


@pytest.mark.parametrize("kind", ["least", "largest", "in turns", "drawn"])
@pytest.mark.parametrize(
    "item",
    [pytest.param(item, id=item.name, marks=() if item.name in ORDINARY else pytest.mark.matrix) for item in FLIPPED],
)
def test_the_largest_codes_and_inputs_have_the_bits_of_int32_sums(item, kind):
    """Rows of 127 and of -127 as int8, all alike, by turns and in pairs, zeros, and drawn ones."""
    ones = torch.ones(IN_FEATURES)
    pairs = torch.tensor([1.0, 1.0, -1.0, -1.0]).repeat(IN_FEATURES // 4)
    x = torch.randn(ROWS, IN_FEATURES, generator=torch.Generator().manual_seed(3))
    x[:8] = torch.stack([ones, -ones, pairs, -pairs, pairs.roll(1), -pairs.roll(1), 0 * ones, 1e-3 * ones])
    weight, flipped, plain = weights_of(item, kind), torch.empty(ROWS, 64), torch.empty(ROWS, 64)

    kernels("avx2").linear(x, weight, item.name, None, flipped)
    kernels("portable").linear(x, weight, item.name, None, plain)

    assert flipped.isfinite().all() and torch.equal(flipped, plain)
