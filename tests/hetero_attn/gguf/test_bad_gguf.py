"""Damaged and hostile GGUF files: refused by name, at once, and with no more memory than the file is large."""

import struct

import numpy as np
import pytest

from hetero_attn import LLM
from hetero_attn.checkpoints.gguf.checkpoint import GgufCheckpoint
from hetero_attn.checkpoints.gguf.config import gguf_config
from hetero_attn.checkpoints.gguf.fields import GgufFields
from hetero_attn.checkpoints.gguf.file import GgufFile
from hetero_attn.checkpoints.gguf.headers import KnownHeaders
from hetero_attn.checkpoints.gguf.tokenizer import gguf_tokenizer
from hetero_attn.checkpoints.sources import read_config
from hetero_attn.errors import CheckpointError, ConfigError, HeteroError, UnsupportedModelError
from hetero_attn.planning.settle import plan_model
from tests.support.models.gguf_models import make_gguf


def text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: str, dims: tuple[int, ...], kind: int, offset: int) -> bytes:
    head = text(name) + struct.pack("<I", len(dims))
    return head + struct.pack(f"<{len(dims)}Q", *dims) + struct.pack("<IQ", kind, offset)


def gguf(keys=(), tensors=(), data: bytes = b"", version: int = 3, counts: tuple[int, int] | None = None) -> bytes:
    num_tensors, num_keys = counts or (len(tensors), len(keys))
    head = b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_keys) + b"".join(keys) + b"".join(tensors)
    return head + b"\0" * (-len(head) % 32) + data


ARCH = key("general.architecture", 8, text("llama"))
ROW = b"\0" * 64  # 16 float32

CASES = {
    "empty": (b"", "the file is empty; download it again"),
    "other magic": (b"GGML" + b"\0" * 60, "no GGUF file"),
    "lfs pointer": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "html": (b"<!DOCTYPE html><html>", "HTML page"),
    "cut after the magic": (b"GGUF\3\0\0\0", "ends after 8 bytes"),
    "version 1": (gguf(version=1), "version is 1"),
    "big endian": (gguf(version=3 << 24), "big-endian"),
    "too many keys": (gguf(counts=(0, 1 << 60)), "claims 1152921504606846976 keys"),
    "too many tensors": (gguf(counts=(1 << 60, 0)), "tensors, more than the file"),
    "empty key": (gguf([key("", 4, b"\0" * 4)]), "is empty or stands twice"),
    "key twice": (gguf([ARCH, ARCH]), "stands twice"),
    "key not utf-8": (gguf([struct.pack("<Q", 2) + b"\xff\xfe" + struct.pack("<I", 4) + b"\0" * 4]), "not UTF-8"),
    "long key": (gguf([struct.pack("<Q", 1 << 40) + b"\0" * 64]), "a key of 1099511627776 bytes"),
    "key of 64 KiB": (gguf([key("a" * ((1 << 16) + 1), 4, b"\0" * 4)]), "a key of 65537 bytes"),
    "string beyond the end": (gguf([text("a") + struct.pack("<IQ", 8, 1 << 50)]), "of 1125899906842624 bytes"),
    "unknown value type": (gguf([key("a", 13, b"\0" * 16)]), "value type 13"),
    "nested array": (gguf([key("a", 9, struct.pack("<IQ", 9, 1) + b"\0" * 16)]), "array of type 9"),
    "array of 2^30": (gguf([key("a", 9, struct.pack("<IQ", 0, 1 << 30))]), "claims 1073741824 items"),
    "strings of 2^30": (gguf([key("a", 9, struct.pack("<IQ", 8, 1 << 30))]), "claims 1073741824 items"),
    "item beyond the end": (gguf([key("a", 9, struct.pack("<IQQ", 8, 2, 1 << 40) + b"\0" * 64)]), "an item of a has"),
    "alignment 0": (gguf([key("general.alignment", 4, struct.pack("<I", 0))]), "general.alignment is 0"),
    "alignment 48": (gguf([key("general.alignment", 4, struct.pack("<I", 48))]), "general.alignment is 48"),
    "alignment 2^21": (gguf([key("general.alignment", 4, struct.pack("<I", 1 << 21))]), "general.alignment"),
    "alignment as text": (gguf([key("general.alignment", 8, text("32"))]), "general.alignment is '32'"),
    "5 dims": (gguf([ARCH], [tensor("a", (1,) * 5, 0, 0)], ROW), "has 5 dimensions"),
    "0 dims": (gguf([ARCH], [tensor("a", (), 0, 0)], ROW), "has 0 dimensions"),
    "a zero dim": (gguf([ARCH], [tensor("a", (16, 0), 0, 0)], ROW), r"dimensions \[16, 0\]"),
    "dims that wrap": (gguf([ARCH], [tensor("a", (1 << 32, 1 << 32), 0, 0)], ROW), "has dimensions"),
    "long name": (gguf([ARCH], [tensor("a" * 64, (16,), 0, 0)], ROW), "name of 64 bytes"),
    "name twice": (gguf([ARCH], [tensor("a", (16,), 0, 0), tensor("a", (16,), 0, 64)], 2 * ROW), "stands twice"),
    "dead type": (gguf([ARCH], [tensor("a", (16,), 4, 0)], ROW), "has type 4, which GGUF no longer has"),
    "unknown type": (gguf([ARCH], [tensor("a", (16,), 99, 0)], ROW), "has type 99"),
    "no whole blocks": (gguf([ARCH], [tensor("a", (48,), 8, 0)], ROW), "no multiple of 32"),
    "offset misaligned": (gguf([ARCH], [tensor("a", (16,), 0, 4)], ROW), "no multiple of 32"),
    "gap": (gguf([ARCH], [tensor("a", (16,), 0, 64)], 2 * ROW), "leave a gap"),
    "overlap": (gguf([ARCH], [tensor("a", (32,), 0, 0), tensor("b", (16,), 0, 64)], 3 * ROW), "overlap"),
    "beyond the end": (gguf([ARCH], [tensor("a", (32,), 0, 0)], ROW), "64 bytes short"),
    "too long": (gguf([ARCH], [tensor("a", (16,), 0, 0)], 2 * ROW), "64 bytes longer"),
    "no architecture": (gguf([], [tensor("a", (16,), 0, 0)], ROW), "no general.architecture"),
}


@pytest.mark.parametrize("case", CASES)
def test_damage_is_named(tmp_path, case):
    content, message = CASES[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)

    with pytest.raises(HeteroError, match=message) as caught:
        read_config(path)

    assert str(path) in str(caught.value)


def split(tmp_path, number, count, names):
    keys = [ARCH, key("split.no", 2, struct.pack("<H", number)), key("split.count", 2, struct.pack("<H", count))]
    keys.append(key("split.tensors.count", 5, struct.pack("<i", 2)))
    tensors = [tensor(name, (16,), 0, 64 * index) for index, name in enumerate(names)]
    path = tmp_path / f"m-{number + 1:05d}-of-{count:05d}.gguf"
    path.write_bytes(gguf(keys, tensors, ROW * len(names)))
    return path


def test_parts_make_one_model_by_any_of_their_names(tmp_path):
    split(tmp_path, 0, 2, ["output_norm.weight"])
    with GgufCheckpoint.open(split(tmp_path, 1, 2, ["blk.0.attn_norm.weight"])) as source:
        assert set(source.names) == {"model.norm.weight", "model.layers.0.input_layernorm.weight"}


@pytest.mark.parametrize(
    ("second", "message"),
    [(None, "part 2 of 2 is missing"), (["output_norm.weight"], "in another part too"), (["a", "b"], "hold 3 tensors")],
)
def test_parts_that_contradict_each_other_are_refused(tmp_path, second, message):
    first = split(tmp_path, 0, 2, ["output_norm.weight"])
    if second:
        split(tmp_path, 1, 2, second)

    with pytest.raises(CheckpointError, match=message):
        GgufCheckpoint.open(first)


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("m-00001-of-00002.gguf", ("split.no", 0), 1, "split.no is 1 and split.count 2; give the first part"),
        ("m-00001-of-00002.gguf", ("split.count", 2), 3, "first of 3 parts, but the name is not"),
        ("m-00002-of-00002.gguf", ("split.no", 1), 0, "split.no is 0, expected 1 of 2 parts"),
        ("m-00002-of-00002.gguf", ("split.count", 2), 3, "split.no is 1, expected 1 of 2 parts"),
    ],
)
def test_numbers_of_parts_that_contradict_each_other_are_named(tmp_path, name, old, new, message):
    first = split(tmp_path, 0, 2, ["output_norm.weight"])
    split(tmp_path, 1, 2, ["blk.0.attn_norm.weight"])
    path, (word, value) = tmp_path / name, old
    before, after = (key(word, 2, struct.pack("<H", number)) for number in (value, new))
    assert before in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(before, after))

    with pytest.raises(CheckpointError, match=message):
        GgufCheckpoint.open(first)


def test_a_scale_that_is_not_finite_is_named_with_its_tensor(seed, tmp_path):
    path = tmp_path / "changed.gguf"
    with GgufCheckpoint.open(seed) as source:
        entry = source._entries["model.layers.0.mlp.up_proj.weight"]
        content = bytearray(seed.read_bytes())
        content[entry.offset : entry.offset + 2] = struct.pack("<e", float("inf"))
    path.write_bytes(content)

    with pytest.raises(CheckpointError, match=r"up_proj.weight.*not finite.*download it again"):
        LLM(path, device="cpu", max_context=64, progress=False, num_threads=1)


def test_a_part_of_another_model_is_refused(tmp_path):
    first = split(tmp_path, 0, 2, ["output_norm.weight"])
    second = split(tmp_path, 1, 2, ["blk.0.attn_norm.weight"])
    second.write_bytes(second.read_bytes().replace(text("llama"), text("qwen2")))

    with pytest.raises(CheckpointError, match=r"general.architecture is another than in m-00001-of-00002.gguf"):
        GgufCheckpoint.open(first)


@pytest.fixture(scope="module")
def seed(tmp_path_factory):
    shape = {"layers": 1, "hidden": 64, "intermediate": 64, "num_heads": 1, "num_kv_heads": 1}
    return make_gguf(tmp_path_factory.mktemp("seed"), {}, "Q8_0", **shape)[0]


def replaced(seed, tmp_path, old: bytes, new: bytes):
    content = seed.read_bytes()
    assert content.count(old) == 1 and len(old) == len(new)
    path = tmp_path / "changed.gguf"
    path.write_bytes(content.replace(old, new))
    return path


def test_an_unknown_split_of_text_is_refused_with_the_ways_out(seed, tmp_path):
    path = replaced(seed, tmp_path, text("gpt-2"), text("gpt-9"))

    message = "(?s)'gpt-9'.*did you mean 'gpt-2'.*tokenizer.json beside.*--tokenizer.*token ids.*smollm"
    with GgufCheckpoint.open(path) as source, pytest.raises(UnsupportedModelError, match=message):
        gguf_tokenizer(source.fields)


def test_an_unknown_architecture_is_refused_with_the_known_ones(seed, tmp_path):
    path = replaced(seed, tmp_path, text("general.architecture") + struct.pack("<I", 8) + text("llama"),
                    text("general.architecture") + struct.pack("<I", 8) + text("lamda"))  # fmt: skip

    with pytest.raises(UnsupportedModelError, match=r"'lamda'.*did you mean 'llama'.*qwen3"):
        plan_model(path, device="cpu")


def test_a_tensor_that_would_be_ignored_is_refused(seed, tmp_path):
    path = replaced(seed, tmp_path, text("blk.0.ffn_norm.weight"), text("blk.0.ffn_form.weight"))

    with pytest.raises(CheckpointError, match="missing"):
        plan_model(path, device="cpu")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            key("llama.attention.head_count_kv", 4, b"\1\0\0\0"),
            key("llama.attention.head_count_kv", 4, b"\2\0\0\0"),
            "multiple of 2 KV",
        ),
        (
            key("llama.block_count", 4, b"\1\0\0\0"),
            key("llama.block_count", 6, b"\0\0\x80?"),
            "block_count is 1.0, expected an integer",
        ),
        (
            key("llama.rope.freq_base", 6, struct.pack("<f", 1e4)),
            key("llama.rope.freq_base", 6, struct.pack("<f", float("nan"))),
            "freq_base is nan",
        ),
        (
            key("tokenizer.ggml.bos_token_id", 4, b"\1\0\0\0"),
            key("tokenizer.ggml.bos_token_id", 4, b"\xff\xff\0\0"),
            "bos_token_id is 65535",
        ),
    ],
)
def test_a_value_of_another_type_or_beyond_its_range_is_named(seed, tmp_path, old, new, message):
    with pytest.raises(ConfigError, match=message):
        plan_model(replaced(seed, tmp_path, old, new), device="cpu")


@pytest.mark.parametrize("name", ["expert_count", "attention.sliding_window"])
def test_a_number_for_each_layer_where_one_is_meant_is_refused(seed, name):
    with GgufCheckpoint.open(seed) as source:
        fields = GgufFields(seed, {**source.fields.values, f"llama.{name}": np.array([0, 2])})

        with pytest.raises(HeteroError, match=f"llama.{name} is"):
            gguf_config(fields, source._theirs, {})


def test_a_missing_key_is_named(seed, tmp_path):
    path = replaced(seed, tmp_path, text("llama.block_count"), text("llama.block_kount"))

    with pytest.raises(ConfigError, match="llama.block_count"):
        plan_model(path, device="cpu")


def test_a_large_vocabulary_is_read_as_it_is(tmp_path):
    tokens = [f"token {index}" for index in range(100_000)]
    array = struct.pack("<IQ", 8, len(tokens)) + b"".join(text(token) for token in tokens)
    scores = struct.pack("<IQ", 6, len(tokens)) + np.arange(len(tokens), dtype="<f4").tobytes()
    path = tmp_path / "vocabulary.gguf"
    path.write_bytes(gguf([ARCH, key("tokenizer.ggml.tokens", 9, array), key("tokenizer.ggml.scores", 9, scores)]))

    with GgufCheckpoint.open(path) as source:
        assert source.fields.texts("tokenizer.ggml.tokens") == tokens
        assert source.fields.numbers("tokenizer.ggml.scores", len(tokens))[-1] == len(tokens) - 1


def test_a_header_is_read_once_and_again_where_a_byte_of_it_changed(tmp_path, monkeypatch):
    """What was read before is known by its bytes, not by the file's name."""
    read, plain = [], GgufFile._read_metadata
    monkeypatch.setattr(GgufFile, "_read_metadata", lambda self, *rest: read.append(1) or plain(self, *rest))
    words = [key("tokenizer.ggml.tokens", 9, struct.pack("<IQ", 8, 1) + text(word)) for word in ("one", "two")]
    path, known = tmp_path / "model.gguf", KnownHeaders()

    found = []
    for written in (words[0], words[0], words[1], words[0]):
        path.write_bytes(gguf([ARCH, written], [tensor("a", (16,), 0, 0)], ROW))
        file = GgufFile(path, known)
        found.append((*file.metadata["tokenizer.ggml.tokens"], len(read), file.tensors["a"].offset))
        file.close()
        file.metadata.clear()
    offsets = {offset for *_, offset in found}

    assert [each[:2] for each in found] == [("one", 1), ("one", 1), ("two", 2), ("one", 2)] and len(offsets) == 1
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="8 bytes short"):
        GgufFile(path, known)
    known.forget()
    path.write_bytes(gguf([ARCH, words[0]], [tensor("a", (16,), 0, 0)], ROW))
    for _ in range(2):
        GgufFile(path, known).close()
    assert len(read) == 4
