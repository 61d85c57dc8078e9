"""`quantize`: blocks that gguf reads as they were meant, files that read back as the same model, and a choice by bits."""

import json

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cpu_kernels.formats import GGUF_BY_NAME
from hetero_attn.checkpoints.gguf.checkpoint import GgufCheckpoint
from hetero_attn.checkpoints.gguf.file import GgufFile
from hetero_attn.checkpoints.gguf.writer import NewTensor, write_gguf
from hetero_attn.serving.text.tokenizer import Tokenizer
from hetero_attn.tools.quantize.header.metadata import copied_metadata
from hetero_attn.tools.quantize.write import quantize
from tests.support.models.runtime import nmse
from tests.support.models.toy import make_checkpoint, make_family_checkpoint
from tests.support.quantised.quantising import logits


def test_a_written_file_is_the_same_model_with_the_same_tokenizer(halved, written):
    text = "The list is 12 apples, they're red.\n\n  And more"
    ours, theirs = (Tokenizer.open(path) for path in (halved, written))
    tokens = ours.encode(text)

    assert theirs.encode(text) == tokens
    assert theirs.chat_template == ours.chat_template
    assert theirs.eos_token_ids == ours.eos_token_ids
    assert nmse(logits(written, tokens, dtype="fp32"), logits(halved, tokens, dtype="fp32")) < 1e-3


def test_gguf_itself_reads_the_file(written):
    reader = gguf.GGUFReader(written)
    with GgufCheckpoint.open(written) as ours:
        names = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
        assert len(names) == len(ours.names)
        assert names["blk.0.attn_q.weight"] == "Q8_0" and names["blk.0.attn_norm.weight"] == "F32"
        for tensor in reader.tensors[:3]:
            assert list(reversed(tensor.shape.tolist())) == list(ours._theirs[tensor.name].shape)


def test_a_gguf_file_is_quantised_again_with_its_metadata(written, tmp_path):
    made = quantize(written, tmp_path / "again.gguf", "q4", threads=2)
    with GgufCheckpoint.open(written) as before, GgufCheckpoint.open(made.path) as after:
        kept = [key for key in before.fields.values if key.startswith("tokenizer.")]
        assert kept and all(
            np.array_equal(before.fields.values[key], after.fields.values[key])
            if isinstance(before.fields.values[key], np.ndarray)
            else before.fields.values[key] == after.fields.values[key]
            for key in kept
        )
        assert before.config == after.config
    assert made.bits < 6


def test_the_alignment_of_the_source_is_not_said_of_the_new_file(written):
    """Tensors are written at multiples of 32 bytes; with 64 in the header readers would look elsewhere."""
    with GgufCheckpoint.open(written) as source:
        source.fields.values = {**source.fields.values, "general.alignment": 64}
        metadata = copied_metadata(source)

    assert "general.alignment" not in metadata and "general.architecture" in metadata


def assert_written_alike(path, file, tokens):
    quantize(path, file, "q8", threads=2)

    assert nmse(logits(file, tokens, dtype="fp32"), logits(path, tokens, dtype="fp32")) < 1e-2


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_every_family_is_written_as_its_own(tmp_path, family):
    sizes = {"layers": 2, "hidden": 64, "intermediate": 128, "num_heads": 4, "num_kv_heads": 2}
    path = make_checkpoint(tmp_path / "model", family, **sizes)

    assert_written_alike(
        path, tmp_path / "model.gguf", torch.randint(200, (16,), generator=torch.Generator().manual_seed(3)).tolist()
    )


@pytest.mark.parametrize(("family", "values"), [("olmo2", {}), ("starcoder2", {"sliding_window": 9})])
def test_families_with_norms_of_their_own_are_written_as_their_own(tmp_path, family, values):
    path = make_family_checkpoint(tmp_path / "model", family, hidden_size=64, head_dim=32, **values)
    (path / "tokenizer.json").unlink()
    (path / "tokenizer_config.json").unlink()

    assert_written_alike(path, tmp_path / "model.gguf", list(range(3, 30)))


def test_rope_of_llama3_becomes_divisors(tmp_path):
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    path = make_checkpoint(tmp_path / "model", "llama", hidden=64, intermediate=128, num_heads=2, num_kv_heads=2)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"rope_scaling": scaling, "rope_parameters": None}))

    assert_written_alike(path, tmp_path / "model.gguf", list(range(3, 60)))


def test_metadata_of_every_kind_is_read_back(tmp_path):
    values = {
        "general.architecture": "x",
        "b": True,
        "i": 7,
        "n": -7,
        "l": 1 << 40,
        "f": 0.5,
        "s": "grüße",
        "t": ["a", "", "ß"],
        "a": np.array([1, -2], np.int32),
        "g": np.array([0.5], np.float32),
        "y": np.array([True, False]),
    }
    out = tmp_path / "x.gguf"
    write_gguf(out, values, [NewTensor("w", GGUF_BY_NAME["F32"], (2, 4))], lambda _: [np.arange(32, dtype=np.uint8)])
    file = GgufFile(out)

    assert {key: list(item) if isinstance(item, np.ndarray) else item for key, item in file.metadata.items()} == {
        key: list(item) if isinstance(item, np.ndarray) else item for key, item in values.items()
    }
    file.close()
    found = gguf.GGUFReader(out)
    assert found.tensors[0].data.tobytes() == bytes(range(32))


def test_odd_rows_keep_the_sources_numbers(tmp_path):
    """100 inputs are no blocks. As float16, what is beyond 65504 became infinite."""
    path = make_checkpoint(tmp_path / "model", "llama", hidden=100, intermediate=128, num_heads=2, num_kv_heads=2)
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors = load_file(path / "model.safetensors")
    tensors[name][0, 0] = 1e6
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    made = quantize(path, tmp_path / "model.gguf", "q4", threads=2)

    with GgufCheckpoint.open(made.path) as source:
        assert source.read(name)[0, 0].item() == tensors[name][0, 0].item()
    assert made.types["model.layers.0.mlp.down_proj.weight"] == "IQ4_NL"


def test_codes_that_a_source_has_in_the_type_chosen_are_copied(written, tmp_path):
    made = quantize(written, tmp_path / "again.gguf", "q8", threads=2)
    with GgufCheckpoint.open(written) as before, GgufCheckpoint.open(made.path) as after:
        assert all(torch.equal(before.read(name), after.read(name)) for name in before.names)
    with_text = quantize(written, tmp_path / "text.gguf", "q8", text="Some words of no matter, twice over.", threads=2)
    with GgufCheckpoint.open(written) as before, GgufCheckpoint.open(with_text.path) as after:
        assert all(torch.equal(before.read(name), after.read(name)) for name in before.names)
