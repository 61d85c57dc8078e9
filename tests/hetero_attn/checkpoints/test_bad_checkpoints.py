"""Broken and hostile checkpoints: each fault is one CheckpointError that names the file or tensor and the way out."""

import json
import os
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from hetero_attn import plan_model
from hetero_attn.checkpoints.checkpoint import Checkpoint
from hetero_attn.checkpoints.files import INDEX_NAME, SINGLE_NAME
from hetero_attn.errors import MOST_CHARACTERS, CheckpointError
from hetero_attn.models.decoder import decoder
from hetero_attn.spec.config import ModelConfig
from hetero_attn.spec.tensor_names import tensor_name
from tests.support.models.toy import edit_json, make_checkpoint

FIRST_SHARD = "model-00001-of-00004.safetensors"
SECOND_SHARD = "model-00002-of-00004.safetensors"


@pytest.fixture
def single(tmp_path):
    """A sound checkpoint in one file."""
    return make_checkpoint(tmp_path / "model", layers=2)


@pytest.fixture
def sharded(tmp_path):
    """A sound checkpoint in four files."""
    path = make_checkpoint(tmp_path / "model", sharded=True)
    assert (path / FIRST_SHARD).exists()
    return path


def refusal(path):
    """The message with which opening and checking the directory fails; no file stays open."""
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(CheckpointError) as caught, Checkpoint.open(path) as checkpoint:
        checkpoint.check(decoder(ModelConfig.from_dir(path)))

    assert before == len(os.listdir("/proc/self/fd"))
    assert 3 == caught.value.exit_code
    return str(caught.value)


def expect(message, *parts):
    for part in parts:
        assert part in message


def rewrite(path, change):
    """Save the single weight file again after `change(tensors)`."""
    tensors = load_file(path / SINGLE_NAME)
    change(tensors)
    save_file(tensors, path / SINGLE_NAME)


def write_raw(path, header, data=b"", length=None):
    """A safetensors file with any header (bytes, or an object to be written as JSON)."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)


def test_truncated_file(sharded):
    size = (sharded / SECOND_SHARD).stat().st_size
    os.truncate(sharded / SECOND_SHARD, size - 100)

    expect(refusal(sharded), SECOND_SHARD, "100 bytes short", f"{size - 100} bytes", str(size), "download it again")


def test_truncated_within_the_header(single):
    os.truncate(single / SINGLE_NAME, 300)

    expect(refusal(single), SINGLE_NAME, "file of 300 bytes", "truncated")


@pytest.mark.parametrize(("size", "found"), [(0, "the file is empty"), (5, "the file has 5 bytes")])
def test_empty_file(sharded, size, found):
    os.truncate(sharded / FIRST_SHARD, size)

    expect(refusal(sharded), FIRST_SHARD, found, "expected a safetensors file")


def test_git_lfs_pointer(single):
    (single / SINGLE_NAME).write_text(
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345\n"
    )

    expect(refusal(single), SINGLE_NAME, "Git LFS pointer", "git lfs pull")


def test_trailing_bytes(single):
    with open(single / SINGLE_NAME, "ab") as file:
        file.write(b"PK\x03\x04")

    expect(refusal(single), SINGLE_NAME, "4 bytes too long")


def test_missing_shards_are_all_listed(sharded):
    (sharded / FIRST_SHARD).unlink()
    (sharded / SECOND_SHARD).unlink()

    expect(refusal(sharded), "2 of the 4 weight files", f"{FIRST_SHARD}, {SECOND_SHARD}", "Download")


def test_file_without_tensors(single):
    save_file({}, single / SINGLE_NAME)

    expect(refusal(single), "hold no tensors")


def test_missing_tensor(single):
    name = tensor_name("down", 1)
    rewrite(single, lambda tensors: tensors.pop(name))

    expect(refusal(single), "1 of 21 tensors", f"missing from the weight files: {name}.")


def test_many_missing_tensors_are_cut(single):
    edit_json(single / "config.json", num_hidden_layers=4)

    message = refusal(single)

    expect(
        message,
        "18 of 39 tensors",
        tensor_name("q", 2),
        "and 15 more. Download the checkpoint again, or correct config.json",
    )
    assert len(message) <= MOST_CHARACTERS


def test_missing_head_of_an_untied_model(single):
    rewrite(single, lambda tensors: tensors.pop("lm_head.weight"))

    expect(refusal(single), "1 of 21 tensors", "lm_head.weight")


def test_wrong_shape(single):
    name = tensor_name("k", 0)
    rewrite(single, lambda tensors: tensors.update({name: torch.zeros(96, 72)}))

    expect(refusal(single), SINGLE_NAME, f"tensor {name} has shape [96, 72], expected [80, 72]")


def test_wrong_number_of_heads_in_the_config(single):
    edit_json(single / "config.json", num_key_value_heads=3)

    expect(refusal(single), tensor_name("k", 0), "[80, 72], expected [120, 72]")


def test_layers_that_would_be_dropped(single):
    edit_json(single / "config.json", num_hidden_layers=1)

    expect(refusal(single), "layers up to 1", "num_hidden_layers in config.json is 1", "1 layers would be dropped")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float64], ids=["I8", "F8_E4M3", "F64"])
def test_dtype_that_cannot_be_run(single, request, dtype):
    name = tensor_name("up", 1)
    rewrite(single, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))

    expect(refusal(single), f"tensor {name} has dtype {request.node.callspec.id}", "F32, BF16, F16")


def test_head_that_a_tied_model_would_ignore(tmp_path):
    """transformers unties such a model; loading it tied would give other logits without a word."""
    path = make_checkpoint(tmp_path, layers=1, tied=True)
    rewrite(path, lambda tensors: tensors.update({"lm_head.weight": torch.ones(307, 72)}))

    expect(
        refusal(path), "tie_word_embeddings is true", "lm_head.weight", "different values", "set tie_word_embeddings"
    )


def test_only_pickle_files(single, tmp_path):
    (single / SINGLE_NAME).unlink()
    canary = tmp_path / "canary"
    (single / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR.")

    message = refusal(single)

    expect(message, "only pytorch_model.bin", "never opens them", "save_pretrained('model-safetensors')")
    assert not canary.exists()


@pytest.mark.parametrize("dtype", ["auto", "q4"])
def test_a_plan_looks_at_the_headers_of_weights_that_are_there(single, dtype):
    """It said "fits" of a model that loading then refused."""
    weights = single / SINGLE_NAME
    whole = weights.read_bytes()

    def planned():
        return plan_model(single, dtype=dtype, device="cpu")

    weights.write_bytes(whole[:-7])
    with pytest.raises(CheckpointError, match="7 bytes short"):
        planned()
    weights.rename(single / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="only pytorch_model.bin"):
        planned()
    (single / "pytorch_model.bin").unlink()
    assert planned().max_batch == 1, "a config alone is enough"


def test_only_gguf(single):
    (single / SINGLE_NAME).rename(single / "model-q4.gguf")

    expect(refusal(single), "only model-q4.gguf", "Hugging Face format")


def test_shards_without_an_index(sharded):
    (sharded / INDEX_NAME).unlink()

    expect(refusal(sharded), f"neither {SINGLE_NAME} nor {INDEX_NAME}", FIRST_SHARD)


def test_no_weights_at_all(single):
    (single / SINGLE_NAME).unlink()

    expect(
        refusal(single), "the directory holds", "config.json", "Check the path", "plan --dtype q4` needs config.json"
    )


def test_not_a_directory(single):
    with pytest.raises(CheckpointError, match=r"config\.json: not a directory"):
        Checkpoint.open(single / "config.json")


BAD_NAMES = ["../secret.safetensors", "/etc/x.safetensors", "a/b.safetensors", "a\0.safetensors", "\ud800.safetensors"]
BAD_NAMES += ["x" * 300 + ".safetensors", "model.bin", "", 7, None]


@pytest.mark.parametrize("name", BAD_NAMES, ids=lambda name: ascii(name)[:30])
def test_index_that_leaves_the_directory(sharded, tmp_path, name):
    """transformers follows `../` in the weight map (C24); the file outside is sound, so only the name is at fault."""
    os.link(sharded / FIRST_SHARD, tmp_path / "secret.safetensors")
    index = json.loads((sharded / INDEX_NAME).read_text())
    index["weight_map"]["lm_head.weight"] = name
    (sharded / INDEX_NAME).write_text(json.dumps(index))

    expect(refusal(sharded), INDEX_NAME, "lm_head.weight", repr(str(name)[:40]), "bare name", "do not use")


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', '{"weight_map": {}}', "[]", "{", ""])
def test_damaged_index(sharded, content):
    (sharded / INDEX_NAME).write_text(content)

    expect(refusal(sharded), INDEX_NAME, "download it again")


def test_index_names_a_tensor_that_no_file_holds(sharded):
    index = json.loads((sharded / INDEX_NAME).read_text())
    index["weight_map"]["model.layers.7.ghost.weight"] = FIRST_SHARD
    (sharded / INDEX_NAME).write_text(json.dumps(index))

    expect(refusal(sharded), INDEX_NAME, "1 tensors that no weight file holds: model.layers.7.ghost.weight")


def test_same_tensor_in_two_shards(sharded):
    tensors = load_file(sharded / SECOND_SHARD)
    name = next(iter(load_file(sharded / FIRST_SHARD)))
    save_file(tensors | {name: torch.zeros(1)}, sharded / SECOND_SHARD)

    expect(refusal(sharded), SECOND_SHARD, f"tensor {name} is in {FIRST_SHARD} too")


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HEADERS = {
    "not-json": (b"{]", "damaged header"),
    "not-utf8": (b"\xff\xfe\xfd", "damaged header"),
    "deep": (b'{"a":' * 50_000, "damaged header"),
    "list": ([1], "no JSON object"),
    "twice": (b'{"a": {"dtype": "I8", "shape": [8], "data_offsets": [0, 8]}, "a": 1}', "the same key stands twice"),
    "entry-no-object": ({"a": 3}, "header entry of tensor 'a' is 3"),
    "no-shape": ({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, "header entry of tensor 'a'"),
    "unknown-dtype": ({"a": GOOD | {"dtype": "Q3"}}, "known dtype"),
    "negative-shape": ({"a": GOOD | {"shape": [-2]}}, "header entry of tensor 'a'"),
    "huge-shape": ({"a": GOOD | {"shape": [2**62, 2**62]}}, "offsets of just that size"),
    "fraction": ({"a": GOOD | {"shape": [2.0]}}, "header entry of tensor 'a'"),
    "size-mismatch": ({"a": GOOD | {"shape": [3]}}, "offsets of just that size"),
    "backwards": ({"a": GOOD | {"data_offsets": [8, 0]}}, "header entry of tensor 'a'"),
    "overlap": (
        {"a": GOOD, "b": GOOD | {"shape": [1], "data_offsets": [4, 8]}},
        "tensor b starts at data byte 4, expected 8",
    ),
    "gap": ({"a": GOOD | {"shape": [1], "data_offsets": [4, 8]}}, "tensor a starts at data byte 4, expected 0"),
    "beyond-the-file": ({"a": GOOD | {"shape": [2**40], "data_offsets": [0, 2**42]}}, f"{2**42 - 8} bytes short"),
}


@pytest.mark.parametrize("fault", HEADERS)
def test_damaged_header(single, fault):
    header, part = HEADERS[fault]
    write_raw(single / SINGLE_NAME, header, bytes(8))

    expect(refusal(single), SINGLE_NAME, part, "ownload")


@pytest.mark.parametrize("length", [2**63, 100_000_001, 17])
def test_header_length_beyond_the_file(single, length):
    write_raw(single / SINGLE_NAME, b"{}", bytes(8), length=length)

    expect(refusal(single), SINGLE_NAME, f"header of {length} bytes in a file of 18 bytes")


def test_named_pipe_does_not_block(single):
    (single / SINGLE_NAME).unlink()
    os.mkfifo(single / SINGLE_NAME)

    expect(refusal(single), SINGLE_NAME, "not a regular file")


def test_file_truncated_while_open(single):
    """With mmap this is SIGBUS, which no handler survives; with pread it is an error like any other."""
    with Checkpoint.open(single) as checkpoint:
        os.truncate(single / SINGLE_NAME, (single / SINGLE_NAME).stat().st_size // 2)
        with pytest.raises(CheckpointError) as caught:
            for name in checkpoint.names:
                checkpoint.read(name)

    expect(str(caught.value), SINGLE_NAME, "changed while it was in use")


def test_file_overwritten_while_open(single):
    """Same size, other bytes: half of the tensors would be of another model."""
    with Checkpoint.open(single) as checkpoint:
        checkpoint.read(tensor_name("embed"))
        content = (single / SINGLE_NAME).read_bytes()
        (single / SINGLE_NAME).write_bytes(content)
        os.utime(single / SINGLE_NAME, ns=(1, 1))
        with pytest.raises(CheckpointError) as caught:
            checkpoint.read(tensor_name("embed"))

    expect(str(caught.value), SINGLE_NAME, "changed while it was in use")


def test_file_replaced_while_open_is_read_to_the_end(single):
    """A download that renames a new file into place leaves the open one as it was."""
    expected = load_file(single / SINGLE_NAME)[tensor_name("embed")]
    with Checkpoint.open(single) as checkpoint:
        save_file({"other": torch.zeros(1)}, single / "new")
        os.replace(single / "new", single / SINGLE_NAME)

        assert torch.equal(expected, checkpoint.read(tensor_name("embed")))


def test_unknown_tensor_name(single):
    with Checkpoint.open(single) as checkpoint, pytest.raises(CheckpointError, match="no tensor nonsense among the 21"):
        checkpoint.read("nonsense")
