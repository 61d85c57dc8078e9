"""Sums that AVX2 keeps in int16 for a whole run of inputs, where codes and inputs are as large as they can be."""

import pytest
import torch

from cpu_kernels.formats import FORMATS, LINE_BYTES, unit_bytes
from cpu_kernels.linear.records import starts_of
from cpu_kernels.vectors.code_sums import CodeSums
from cpu_kernels.vectors.isa import named
from tests.support.kernels.cpu_oracles import kernels

IN_FEATURES = 512
CODED = [item for item in FORMATS.values() if not item.is_row_major]
ORDINARY = ("q5_0", "q6_k")  # nearest to what int16 holds; the others take seconds to compile
FARTHEST_BYTES = (0x00, 0xFF, 0x77)  # of code lines: the least and the largest code of every plane and table


def held_forms(isa: str) -> list:
    """The formats whose dot products begin with int16 pairs."""
    return [item for item in CODED if (starts := starts_of(named(isa), item)) and starts.are_pairs]


HELD = held_forms("avx2")


def weights_of(item, byte: int) -> torch.Tensor:
    """Four blocks, their codes all alike."""
    weight = torch.full((4, unit_bytes(item.name, IN_FEATURES)), 0x3C, dtype=torch.uint8)
    superblocks = weight.view(-1, item.superblock_bytes)
    superblocks[:, LINE_BYTES * item.header_lines :] = byte
    return weight


def test_only_sums_that_fit_are_held():
    assert {item.name for item in HELD} == {"q4_0", "q5_0", "q6_k", "mxfp4", "nvfp4"}
    assert not held_forms("avxvnni")


@pytest.mark.parametrize(
    ("largest", "offset", "inputs", "holds"),
    [(63, 32, 16, True), (63, 32, 32, False), (31, 16, 32, True), (31, 0, 32, False), (15, 8, 64, True)],
)
def test_sums_are_held_as_long_as_the_farthest_fit(largest, offset, inputs, holds):
    assert CodeSums(named("avx2"), largest).pairs_hold(offset, inputs) == holds
    assert (max(offset, largest - offset) * 127 * inputs // 2 <= 32767) == holds


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("byte", FARTHEST_BYTES, ids=hex)
@pytest.mark.parametrize(
    "item",
    [pytest.param(item, id=item.name, marks=() if item.name in ORDINARY else pytest.mark.matrix) for item in HELD],
)
def test_the_largest_codes_and_inputs_have_the_bits_of_int32_sums(item, byte, rows):
    """Inputs of one size are 127 and -127 as int8: all alike, by turns, and as a run has them farthest apart."""
    patterns = [torch.ones(IN_FEATURES), -torch.ones(IN_FEATURES), torch.tensor([1.0, -1.0]).repeat(IN_FEATURES // 2)]
    patterns.append(torch.tensor([1.0, 1.0, -1.0, -1.0]).repeat(IN_FEATURES // 4))
    x, weight = torch.stack(patterns), weights_of(item, byte)
    held, plain = torch.empty(len(x), 64), torch.empty(len(x), 64)

    for start in range(0, len(x), rows):
        kernels("avx2").linear(x[start : start + rows], weight, item.name, None, held[start : start + rows])
    kernels("portable").linear(x, weight, item.name, None, plain)

    assert held.isfinite().all() and torch.equal(held, plain)
