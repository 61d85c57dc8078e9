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
from hetero_attn.checkpoints.raw_file import Extent, RawFile
from hetero_attn.errors import CheckpointError
from hetero_attn.spec.weights import LinearSpec, Part


def alone(spec):
    """A linear to be read."""
    return Filling(spec, place=None)


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

    def extent(self, name, start, stop):
        return None


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


def numbers(*names, rows=48):
    """A source of matrices of 32 inputs."""
    draw = torch.Generator().manual_seed(0)
    return Plain(**{name: torch.randn(rows, 32, generator=draw).bfloat16() for name in names})


def linear(*names, dtype="bf16", rows=48, rows_per_unit=16):
    """A linear of these tensors."""
    parts = tuple(Part(name, rows_per_unit, rows, dtype) for name in names)
    return LinearSpec(f"layers.0.{'_'.join(names)}", "o", 0, 32, parts, False)


@pytest.mark.parametrize("dtype", ["bf16", "q8"])
def test_parts_with_a_block_in_each_unit_stay_apart(dtype, monkeypatch):
    """Every number was copied beside the other part's, and from there into its block."""
    monkeypatch.setattr("hetero_attn.checkpoints.loading.unit_rows.RUN_BYTES", 32 * 32 * 2)
    source, spec = numbers("a", "b"), linear("a", "b", dtype=dtype)

    for _, start, stop, (rows,) in UnitRows(source, (spec,), CpuKernels(1)).runs([alone(spec)]):
        assert len(rows) == 2
        assert all(
            torch.equal(part, source.tensors[name][16 * start : 16 * stop])
            for name, part in zip("ab", rows, strict=True)
        )


def test_parts_that_share_a_block_are_gathered_unit_by_unit():
    source, spec = numbers("a", "b", rows=20), linear("a", "b", rows=20, rows_per_unit=4)
    expected = torch.cat([source.tensors[name].view(5, 4, 32) for name in "ab"] + [torch.zeros(5, 8, 32)], 1)

    ((_, start, stop, (rows,)),) = UnitRows(source, (spec,), CpuKernels(1)).runs([alone(spec)])

    assert (start, stop) == (0, 5)
    assert torch.equal(rows.float(), expected.view(-1, 32))


class Filed(Plain):
    """A source whose tensors lie behind each other in one file, which notes what it is asked for."""

    def __init__(self, path, first=64, **tensors):
        super().__init__(**tensors)
        self.asked, self.offsets = [], {}
        data = bytearray(first)
        for name, tensor in tensors.items():
            self.offsets[name] = len(data)
            data += tensor.view(torch.uint8).numpy().tobytes()
        path.write_bytes(data)
        self.file = RawFile(path)

    def extent(self, name, start, stop):
        return Extent(self, self.offsets[name] + 64 * start, 64 * (stop - start))

    def read_weights_within(self, buffer, offset, size):
        self.asked.append((offset, size))
        return self.file.read_weights_within(buffer, offset, size)

    def read(self, name, rows, out):
        raise AssertionError(f"{name} lies in one piece in the file")


def test_what_lies_side_by_side_in_the_file_is_read_at_once(tmp_path):
    """Experts were read a megabyte at a time, and each cost a turn of the disk and of Python."""
    source = Filed(tmp_path / "weights", **numbers("a", "b", "c", "d").tensors)
    specs = [linear("a", "c"), linear("d"), linear("b")]

    runs = list(UnitRows(source, tuple(specs), CpuKernels(1)).runs(map(alone, specs)))

    assert source.asked == [(64, 4 * 48 * 64)]
    found = {part.tensor: rows for filling, *_, each in runs for part, rows in zip(filling.spec.parts, flat(each))}
    assert found.keys() == source.tensors.keys()
    assert all(torch.equal(rows, source.tensors[name]) for name, rows in found.items())


def flat(runs):
    """The rows of every part."""
    return [part for rows in runs for part in (rows if isinstance(rows, tuple) else [rows])]


@pytest.mark.parametrize("gap", [1, 64])
def test_what_lies_apart_in_the_file_is_read_by_itself(tmp_path, gap):
    """Also numbers at odd bytes, which no tensor can begin at."""
    tensors = numbers("a", "b").tensors
    source = Filed(tmp_path / "weights", a=tensors["a"], gap=torch.zeros(gap, dtype=torch.uint8), b=tensors["b"])
    source.read = lambda name, rows, out: out.copy_(tensors[name][rows])
    spec = linear("a", "b")

    ((*_, (rows,)),) = UnitRows(source, (spec,), CpuKernels(1)).runs([alone(spec)])

    assert len(source.asked) == (1 if gap == 1 else 2)
    assert all(map(torch.equal, rows, tensors.values()))


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
