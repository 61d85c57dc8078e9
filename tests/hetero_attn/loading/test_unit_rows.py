"""Rows of units come through buffers that hold them whatever is wider, the numbers or the file's codes; the next ones
are read while some are packed."""

import threading
from contextlib import closing
from dataclasses import replace

import pytest
import torch

from cpu_kernels import CpuKernels
from cpu_kernels.formats import SOURCE_TYPES
from hetero_attn.checkpoints.loading.unit_rows import READERS, Filling, UnitRows
from hetero_attn.errors import CheckpointError
from hetero_attn.spec.weights import LinearSpec, Part


def alone(spec, home=None, first_unit=0):
    """A linear to be read."""
    return Filling(spec, home, first_unit, place=None)


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

    runs = list(UnitRows(source, (spec,), CpuKernels(1)).runs([alone(spec)]))

    assert [(start, stop) for _, start, stop, _ in runs] == [(0, 3)]
    assert torch.equal(runs[0][3][0], source.data)


class Plain(Codes):
    """A source of tensors of bfloat16, by name."""

    def __init__(self, **tensors):
        self.tensors = tensors

    def source_type(self, name):
        return None

    def is_coded(self, name):
        return False

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
    monkeypatch.setattr("hetero_attn.checkpoints.loading.unit_rows.RUN_BYTES", 32 * 32 * 2)
    draw = torch.Generator().manual_seed(0)
    source = Plain(**{name: torch.randn(48, 32, generator=draw).bfloat16() for name in "ab"})
    spec = LinearSpec("layers.0.gate_up", "gate_up", 0, 32, tuple(Part(name, 16, 48, dtype) for name in "ab"), False)
    home = torch.zeros(2 * (spec.units - first_unit), 16 * 32 * 2, dtype=torch.uint8)
    expected = torch.cat([source.tensors[name].view(3, 16, 32) for name in "ab"], 1)

    filling = alone(spec, home, first_unit)
    for _, start, stop, (rows,) in UnitRows(source, (spec,), CpuKernels(1)).runs([filling]):
        lies_at_home = rows.data_ptr() == home.data_ptr() + 64 * 32 * (start - first_unit)

        assert torch.equal(rows.view(-1, 32, 32), expected[start:stop])
        assert lies_at_home == (dtype == "bf16" and start >= first_unit)
    if dtype == "bf16":
        assert torch.equal(home.view(torch.bfloat16).view(-1, 32, 32), expected[first_unit:])


class Watched(Plain):
    """Tells which rows have been read; from a row on it cannot be read."""

    def __init__(self, damaged_from, **tensors):
        super().__init__(**tensors)
        self.damaged_from, self.begun, self.changed = damaged_from, set(), threading.Condition()

    def read(self, name, rows, out):
        if rows.start >= self.damaged_from:
            raise CheckpointError(f"row {rows.start}")
        super().read(name, rows, out)
        with self.changed:
            self.begun.add(rows.start // 16)
            self.changed.notify_all()


def watched_runs(damaged_from, monkeypatch):
    """(source, the reader, its linear) of twelve runs of one unit, to be packed as q8 and so read into buffers."""
    monkeypatch.setattr("hetero_attn.checkpoints.loading.unit_rows.RUN_BYTES", 16 * 32 * 2)
    source = Watched(damaged_from, a=torch.randn(192, 32, generator=torch.Generator().manual_seed(1)).bfloat16())
    spec = LinearSpec("layers.0.o", "o", 0, 32, (Part("a", 16, 192, "q8"),), False)
    return source, UnitRows(source, (spec,), CpuKernels(1)), spec


def test_the_next_runs_are_read_while_one_is_packed_and_leave_it_alone(monkeypatch):
    source, reader, spec = watched_runs(192, monkeypatch)
    with closing(reader):
        for _, start, _, (rows,) in reader.runs([alone(spec)]):
            ahead = set(range(min(12, start + 1 + READERS)))
            with source.changed:
                assert source.changed.wait_for(lambda wanted=ahead: wanted <= source.begun, 30), (start, source.begun)
                assert source.begun == ahead, "a run is read into the buffer of the one that is being packed"
            assert torch.equal(rows, source.tensors["a"][16 * start : 16 * (start + 1)])


def test_the_next_linear_is_read_while_the_last_run_of_one_is_packed(monkeypatch):
    """The disk stood still at the end of each linear: a third of a small model's runs were read while nothing else was
    done."""
    source, reader, spec = watched_runs(192, monkeypatch)
    first, second = (replace(spec, parts=(replace(spec.parts[0], rows=rows),)) for rows in (16, 192))
    with closing(reader):
        runs = reader.runs(map(alone, (first, second)))
        filling, start, stop, _ = next(runs)

        assert (filling.spec, start, stop) == (first, 0, 1)
        with source.changed:
            assert source.changed.wait_for(lambda: source.begun == set(range(READERS)), 30), source.begun
        assert [(filling.spec, start) for filling, start, _, _ in runs] == [(second, at) for at in range(12)]


def test_a_read_that_fails_is_raised_when_its_run_comes_and_no_thread_is_left(monkeypatch):
    source, reader, spec = watched_runs(16 * 5, monkeypatch)
    seen, before = [], set(threading.enumerate())
    with closing(reader), pytest.raises(CheckpointError, match="row 80"):
        for _, start, _, _ in reader.runs([alone(spec)]):
            seen.append(start)

    assert seen == [0, 1, 2, 3, 4]
    assert set(threading.enumerate()) <= before
