"""Threads pack runs that others have read: where that is host memory, and never what has to be done in order."""

import threading
from contextlib import closing

import pytest
import torch

from cpu_kernels import CpuKernels
from cpu_kernels.formats import GGUF_TYPES
from hetero_attn.checkpoints.loading.homes import ColumnCut
from hetero_attn.checkpoints.loading.load import MAX_PACKERS
from hetero_attn.checkpoints.loading.packer import Packer, Packers
from hetero_attn.checkpoints.loading.unit_rows import Filling, UnitRows
from hetero_attn.engine.build import build_engine
from hetero_attn.errors import CheckpointError
from hetero_attn.planning.options import LoadOptions
from hetero_attn.planning.settle import settle
from hetero_attn.spec.weights import LinearSpec, Part
from tests.hetero_attn.loading.test_unit_rows import Plain
from tests.support.kernels.cpu_oracles import kernels
from tests.support.models.gguf_data import random_rows, repacked
from tests.support.models.toy import make_checkpoint

UNITS = 24


class Coded(Plain):
    """Numbers that are codes in the file."""

    def is_coded(self, name):
        return True


def placed_by(source, monkeypatch, is_in_host=True):
    """(threads that placed each run, units whose rows came to the caller, blocks) of a linear that becomes q8."""
    monkeypatch.setattr("hetero_attn.checkpoints.loading.unit_rows.RUN_BYTES", 16 * 32 * 2)
    spec = LinearSpec("layers.0.o", "o", 0, 32, (Part("a", 16, 16 * UNITS, "q8"),), False)
    blocks = torch.zeros(UNITS, spec.row_bytes, dtype=torch.uint8)
    threads = {}

    def place(start, stop, rows, packer):
        packer.pack_units(spec, rows, 32, blocks[start:stop])
        threads[start] = threading.current_thread().name

    with CpuKernels(2) as ops, closing(UnitRows(source, (spec,), ops, Packers(source, ops))) as reader:
        own, mine = Packer(source, ops), []
        for _, start, stop, rows in reader.runs([Filling(spec, place, is_in_host)]):
            if rows is not None:
                mine.append(start)
                place(start, stop, rows, own)
    return threads, mine, blocks


@pytest.fixture
def numbers():
    return torch.randn(16 * UNITS, 32, generator=torch.Generator().manual_seed(2)).bfloat16()


def test_packers_place_what_goes_to_host_memory(numbers, monkeypatch):
    """The team's threads waited for each other after every run, on cores that others read with."""
    threads, mine, blocks = placed_by(Plain(a=numbers), monkeypatch)
    _, _, expected = placed_by(Plain(a=numbers), monkeypatch, is_in_host=False)

    assert sorted(threads) == list(range(UNITS)) and not mine
    assert all(name.startswith("hetero-attn-packer") for name in threads.values())
    assert torch.equal(blocks, expected)


@pytest.mark.parametrize(("kind", "is_in_host"), [(Plain, False), (Coded, True)])
def test_the_caller_places_what_goes_elsewhere_and_what_is_compared(numbers, monkeypatch, kind, is_in_host):
    """There is one buffer for GPU memory, and sums over what codes have become are taken in order."""
    threads, mine, _ = placed_by(kind(a=numbers), monkeypatch, is_in_host)

    assert mine == list(range(UNITS))
    assert set(threads.values()) == {threading.current_thread().name}


def test_a_number_that_a_packer_finds_is_told_by_its_tensor(numbers, monkeypatch):
    numbers[100, 3] = float("nan")
    source = Plain(a=numbers)
    source.path = "model"
    with pytest.raises(CheckpointError, match="model: a: rows holds a non-finite value"):
        placed_by(source, monkeypatch)


class Parts(Coded):
    """Tensors of Q4_0."""

    def source_type(self, name):
        return "Q4_0"

    def row_bytes(self, name):
        return self.tensors[name].shape[1]

    def torch_dtype(self, name):
        return torch.uint8


@pytest.mark.parametrize("cut", [0, 1, 2, 3])
@pytest.mark.parametrize("rows", [48, 40])
def test_codes_of_gate_and_up_stay_apart_until_they_are_packed(cut, rows):
    """Three units, of which those before `cut` are placed from a run by themselves; the last one may be half empty."""
    kind = GGUF_TYPES[2]
    tensors = {name: random_rows(kind, rows, 64) for name in ("gate", "up")}
    source = Parts(**tensors)
    parts = tuple(Part(name, 16, rows, "q4_0") for name in tensors)
    spec = LinearSpec("layers.0.gate_up", "gate_up", 0, 64, parts, False)
    whole = [torch.nn.functional.pad(each, (0, 0, 0, 48 - rows)).view(3, 16, -1) for each in tensors.values()]
    expected = repacked(kernels(), kind, torch.cat(whole, 1).flatten(0, 1))
    first, last = (torch.zeros(units * 2, spec.row_bytes, dtype=torch.uint8) for units in (cut, 3 - cut))

    class Here:
        def place(self, spec, runs, in_features, target, on_device, packer):
            Packer(source, kernels()).pack_units(spec, runs, in_features, target)

    with closing(UnitRows(source, (spec,), kernels())) as reader:
        for _, *run in reader.runs([Filling(spec, None)]):
            ColumnCut(Here(), spec, first, last, cut).place(*run)

    assert torch.equal(torch.cat((first, last)), expected)


def loaded(path, dtype, threads):
    """(bytes of all linears, threads that progress was told on) of a load for the CPU."""
    told = set()
    options = LoadOptions(model=path, dtype=dtype, device="cpu", max_context=64, num_threads=threads)
    engine = build_engine(settle(options), progress=lambda count: told.add(threading.current_thread()))
    with closing(engine):
        layers = [block for layer in engine.weights.layers for block in layer]
        return [linear.dram.clone() for block in layers for linear in block.linears.values()], told


@pytest.mark.parametrize("dtype", ["auto", "q4"])
def test_a_large_team_packs_itself_to_the_same_bytes(tmp_path, dtype):
    path = make_checkpoint(tmp_path, layers=2, dtype=torch.bfloat16)
    few, told = loaded(path, dtype, 1)
    many, _ = loaded(path, dtype, MAX_PACKERS + 1)

    assert all(map(torch.equal, few, many)) and len(few) == len(many) > 4
    assert told == {threading.current_thread()}
