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


class Plain(Codes):
    """A source of tensors of bfloat16, by name."""

    def __init__(self, **tensors):
        self.tensors = tensors

    def source_type(self, name):
        return None

    def row_bytes(self, name):
        return 2 * self.tensors[name].shape[1]

    def torch_dtype(self, name):
        return torch.bfloat16

    def read(self, name, rows, out):
        out.copy_(self.tensors[name][rows])


@pytest.mark.parametrize("first_unit", [0, 1, 3])
@pytest.mark.parametrize("dtype", ["bf16", "q8"])
def test_numbers_held_as_they_are_are_read_straight_into_their_home(dtype, first_unit, monkeypatch):
    """Every number was copied twice or three times: into a buffer, beside the other parts', and into its block."""
    monkeypatch.setattr("hetero_attn.checkpoints.loading.unit_rows.RUN_BYTES", 32 * 32 * 4)
    draw = torch.Generator().manual_seed(0)
    source = Plain(**{name: torch.randn(48, 32, generator=draw).bfloat16() for name in "ab"})
    spec = LinearSpec("layers.0.gate_up", "gate_up", 0, 32, tuple(Part(name, 16, 48, dtype) for name in "ab"), False)
    home = torch.zeros(2 * (spec.units - first_unit), 16 * 32 * 2, dtype=torch.uint8)
    expected = torch.cat([source.tensors[name].view(3, 16, 32) for name in "ab"], 1)

    for start, stop, (rows,) in UnitRows(source, (spec,), CpuKernels(1)).runs(spec, home, first_unit):
        lies_at_home = rows.data_ptr() == home.data_ptr() + 64 * 32 * (start - first_unit)

        assert torch.equal(rows.view(-1, 32, 32), expected[start:stop])
        assert lies_at_home == (dtype == "bf16" and start >= first_unit)
    if dtype == "bf16":
        assert torch.equal(home.view(torch.bfloat16).view(-1, 32, 32), expected[first_unit:])
