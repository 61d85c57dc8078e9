"""Blocks that gguf reads as they were meant, fitted at least as well as its own."""

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants

from hetero_attn.tools.quantize.blocks import BLOCK_TYPES
from hetero_attn.tools.quantize.encode import encode
from tests.support.models.runtime import nmse

# Relative squared error of normal weights: what gguf's own quantiser has, or llama.cpp's of the types that it lacks.
MOST_ERROR = {
    "Q4_0": 0.0074,
    "Q4_1": 0.0062,
    "Q5_0": 0.00184,
    "Q5_1": 0.00144,
    "Q8_0": 0.000035,
    "Q4_K": 0.0062,
    "Q5_K": 0.0016,
    "Q6_K": 0.0005,
    "IQ4_NL": 0.0062,
    "IQ4_XS": 0.0063,
}


def read_by_gguf(name, rows):
    found = quants.dequantize(encode(name, rows).numpy(), GGMLQuantizationType[name])
    return torch.from_numpy(found.astype(np.float32))


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_blocks_are_read_by_gguf_and_fitted_at_least_as_well(name):
    rows = torch.randn(16, 1024, generator=torch.Generator().manual_seed(1))

    assert nmse(read_by_gguf(name, rows), rows) < MOST_ERROR[name]


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_rows_of_zeros_of_one_number_and_of_huge_ones_are_finite(name):
    rows = torch.stack((torch.zeros(512), torch.full((512,), -3.0), torch.linspace(-9e5, 9e5, 512), torch.ones(512)))
    found = read_by_gguf(name, rows)

    assert torch.isfinite(found).all()
    assert not found[0].any()
    assert nmse(found[1], rows[1]) < 0.02


def test_values_on_a_grid_come_back_as_they_are():
    generator = torch.Generator().manual_seed(2)
    codes, scale = torch.randint(16, (8, 512), generator=generator), torch.tensor(0.25)
    codes.view(-1, 32)[:, 0], codes.view(-1, 32)[:, 1] = 0, 15
    rows = codes * scale - 2

    assert torch.equal(read_by_gguf("Q4_1", rows), rows)
