"""Checkpoint: reads what safetensors reads, only the bytes asked for; its check knows the tensors of every family."""

import json
import os
import struct
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from hetero_attn.checkpoints.checkpoint import Checkpoint
from hetero_attn.checkpoints.files import INDEX_NAME, SINGLE_NAME
from hetero_attn.checkpoints.safetensors import SafetensorsFile
from hetero_attn.errors import CheckpointError
from hetero_attn.models.decoder import decoder
from hetero_attn.spec.config import ModelConfig
from hetero_attn.spec.tensor_names import tensor_name
from tests.support.models.toy import FAMILIES, make_checkpoint


@pytest.fixture
def count_bytes(monkeypatch):
    """A list that receives the size of every pread."""
    sizes, preadv = [], os.preadv

    def counting(fd, buffers, offset):
        sizes.append(sum(len(buffer) for buffer in buffers))
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", counting)
    return sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
def test_reads_what_safetensors_reads(tmp_path, sharded, dtype):
    path = make_checkpoint(tmp_path, sharded=sharded, dtype=dtype, layers=2)
    expected = {}
    for file in sorted(path.glob("*.safetensors")):
        expected |= load_file(file)

    with Checkpoint.open(path) as checkpoint:
        assert set(expected) == set(checkpoint.names)
        assert sum(tensor.nbytes for tensor in expected.values()) == checkpoint.nbytes
        for name, tensor in expected.items():
            assert name in checkpoint
            assert tuple(tensor.shape) == checkpoint.shape(name)
            assert {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype] == checkpoint.dtype(
                name
            )
            assert torch.equal(tensor, checkpoint.read(name))


@pytest.mark.parametrize(
    "rows", [slice(0, 1), slice(5, 17), slice(300, None), slice(7, 7), slice(-2, None), slice(0, 999)]
)
def test_reads_only_the_rows_asked_for(tmp_path, count_bytes, rows):
    path = make_checkpoint(tmp_path, layers=1)
    embed = tensor_name("embed")
    expected = load_file(path / SINGLE_NAME)[embed][rows]

    with Checkpoint.open(path) as checkpoint:
        count_bytes.clear()
        part = checkpoint.read(embed, rows)

    assert torch.equal(expected, part)
    assert expected.nbytes == sum(count_bytes)


def test_reads_into_the_callers_buffer(tmp_path):
    path = make_checkpoint(tmp_path, layers=1)
    embed = tensor_name("embed")
    buffer = torch.full((8, 72), float("nan"))

    with Checkpoint.open(path) as checkpoint:
        out = checkpoint.read(embed, slice(2, 6), out=buffer[2:6])

    assert out.data_ptr() == buffer[2:6].data_ptr()
    assert torch.equal(load_file(path / SINGLE_NAME)[embed][2:6], buffer[2:6])
    assert buffer[[0, 1, 6, 7]].isnan().all()


@pytest.mark.parametrize(
    "out",
    [torch.empty(4, 71), torch.empty(4, 72, dtype=torch.bfloat16), torch.empty(72, 4).T],
    ids=["shape", "dtype", "stride"],
)
def test_a_buffer_that_does_not_fit_is_refused(tmp_path, out):
    with (
        Checkpoint.open(make_checkpoint(tmp_path, layers=1)) as checkpoint,
        pytest.raises(AssertionError, match="expected"),
    ):
        checkpoint.read(tensor_name("embed"), slice(0, 4), out=out)


def test_long_reads_are_split(tmp_path, monkeypatch):
    """Linux returns at most 2 GiB a call, and less when it likes; a short count is not the end of the file."""
    path = make_checkpoint(tmp_path, layers=1)
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: preadv(fd, [buffers[0][:1000]], offset))

    with Checkpoint.open(path) as checkpoint:
        embed = checkpoint.read(tensor_name("embed"))

    assert torch.equal(load_file(path / SINGLE_NAME)[tensor_name("embed")], embed)


def test_reading_from_several_threads(tmp_path):
    path = make_checkpoint(tmp_path, sharded=True)
    with Checkpoint.open(path) as checkpoint, ThreadPoolExecutor(4) as pool:
        names = checkpoint.names * 4
        tensors = list(pool.map(checkpoint.read, names))
        single = {name: checkpoint.read(name) for name in checkpoint.names}

    assert all(torch.equal(single[name], tensor) for name, tensor in zip(names, tensors, strict=True))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("biases", [False, True], ids=["plain", "biases"])
@pytest.mark.parametrize("family", FAMILIES)
def test_expected_tensors_are_those_that_transformers_writes(tmp_path, family, biases, tied):
    path = make_checkpoint(tmp_path, family, biases=biases, tied=tied, sharded=tied)
    config = ModelConfig.from_dir(path)

    with Checkpoint.open(path) as checkpoint:
        assert {name: checkpoint.shape(name) for name in checkpoint.names} == decoder(config).tensors
        assert [] == checkpoint.check(decoder(config))


def test_tensors_the_model_does_not_use_are_a_warning(tmp_path):
    path = make_checkpoint(tmp_path, layers=1)
    tensors = load_file(path / SINGLE_NAME) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(20)}
    save_file(tensors, path / SINGLE_NAME)

    with Checkpoint.open(path) as checkpoint:
        (warning,) = checkpoint.check(decoder(ModelConfig.from_dir(path)))

    assert "1 tensors are not used by this model: model.layers.0.self_attn.rotary_emb.inv_freq" in warning


def test_a_tied_model_may_carry_a_copy_of_its_head(tmp_path):
    path = make_checkpoint(tmp_path, layers=1, tied=True)
    tensors = load_file(path / SINGLE_NAME)
    save_file(tensors | {tensor_name("head"): tensors[tensor_name("embed")].clone()}, path / SINGLE_NAME)

    with Checkpoint.open(path) as checkpoint:
        assert [] == checkpoint.check(decoder(ModelConfig.from_dir(path)))


def test_an_index_that_names_the_wrong_file_is_a_warning(tmp_path):
    """The headers are the truth: transformers, too, loads such a checkpoint."""
    path = make_checkpoint(tmp_path, sharded=True)
    index = json.loads((path / INDEX_NAME).read_text())
    files = sorted(set(index["weight_map"].values()))
    moved = next(name for name, file in index["weight_map"].items() if file == files[0])
    index["weight_map"][moved] = files[1]
    (path / INDEX_NAME).write_text(json.dumps(index))

    with Checkpoint.open(path) as checkpoint:
        (warning,) = checkpoint.check(decoder(ModelConfig.from_dir(path)))

    assert INDEX_NAME in warning and moved in warning


def test_symlinked_files_of_the_hub_cache_are_followed(tmp_path):
    path = make_checkpoint(tmp_path / "blobs", layers=1)
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for file in path.iterdir():
        (snapshot / file.name).symlink_to(os.path.relpath(file, snapshot))

    with Checkpoint.open(snapshot) as checkpoint:
        assert [] == checkpoint.check(decoder(ModelConfig.from_dir(snapshot)))


def test_closed_files_leave_no_descriptor(tmp_path):
    path = make_checkpoint(tmp_path, sharded=True, layers=1)
    before = len(os.listdir("/proc/self/fd"))
    checkpoint = Checkpoint.open(path)

    checkpoint.close()
    checkpoint.close()

    assert before == len(os.listdir("/proc/self/fd"))
    with pytest.raises(CheckpointError, match="closed"):
        checkpoint.read(tensor_name("embed"))


HEADER_VALUES = st.one_of(
    st.none(),
    st.integers(-2, 40),
    st.sampled_from(["F32", "BF16", "I8", "Q9"]),
    st.lists(st.integers(-1, 9), max_size=3),
)
ENTRIES = st.one_of(
    HEADER_VALUES,
    st.fixed_dictionaries(
        {"dtype": st.sampled_from(["F32", "BF16", "I8", "F64", "Q9"])},
        optional={"shape": HEADER_VALUES, "data_offsets": st.lists(st.integers(0, 16), min_size=2, max_size=2)},
    ),
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=st.dictionaries(st.sampled_from("abc"), ENTRIES, max_size=3), size=st.integers(0, 24))
def test_nothing_is_accepted_that_safetensors_refuses(tmp_path, header, size):
    path = tmp_path / "fuzz.safetensors"
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(size))

    try:
        file = SafetensorsFile(path)
    except CheckpointError:
        return
    file.close()

    try:
        with safe_open(path, framework="pt") as reader:
            assert set(reader.keys()) == set(file.entries)
    except SafetensorError as error:
        pytest.fail(f"accepted {header} with {size} bytes of data: {error}")


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes=st.lists(st.lists(st.integers(0, 3), max_size=3), max_size=4),
    dtype=st.sampled_from([torch.float32, torch.int8]),
)
def test_everything_that_safetensors_writes_is_accepted(tmp_path, shapes, dtype):
    path = tmp_path / "fuzz.safetensors"
    tensors = {f"t{i}": torch.zeros(shape, dtype=dtype) for i, shape in enumerate(shapes)}
    save_file(tensors, path, metadata={"format": "pt"})

    file = SafetensorsFile(path)
    file.close()

    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        name: entry.shape for name, entry in file.entries.items()
    }
    assert all(first.offset + first.nbytes == second.offset for first, second in pairwise(file.entries.values()))
