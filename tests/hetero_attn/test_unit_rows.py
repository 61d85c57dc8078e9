"""The buffers through which rows of units are read hold them whatever is wider: the numbers, or the file's codes."""

import pytest
import torch

from cpu_kernels import CpuKernels
from cpu_kernels.formats import SOURCE_TYPES
from hetero_attn.checkpoints.loading.unit_rows import UnitRows
from hetero_attn.spec.weights import LinearSpec, Part


class Codes:
    """A source of one tensor of codes, every byte another."""

    def __init__(self, kind, rows, row_bytes):
        self._kind = kind
        self.data = (torch.arange(rows * row_bytes) % 251).to(torch.uint8).view(rows, row_bytes)

    def source_type(self, name):
        return self._kind

    def input_order(self, name):
        return None

    def row_bytes(self, name):
        return self.data.shape[1]

    def torch_dtype(self, name):
        return torch.uint8

    def read(self, name, rows, out):
        out.copy_(self.data[rows])


@pytest.mark.parametrize("kind", ["FP8_G128", "INT8_G128"])
def test_codes_of_few_inputs_are_wider_than_their_numbers(kind):
    """A row of 32 inputs is 128 bytes in float32 and 132 in groups of 128: the buffers were too small."""
    item = SOURCE_TYPES[kind]
    spec = LinearSpec("layers.0.o", "o", 0, 32, (Part("w", 16, 48, item.format),), False)
    source = Codes(kind, 48, item.block_bytes)

    runs = list(UnitRows(source, (spec,), CpuKernels(1)).runs(spec))

    assert [(start, stop) for start, stop, _ in runs] == [(0, 3)]
    assert torch.equal(runs[0][2][0], source.data)
