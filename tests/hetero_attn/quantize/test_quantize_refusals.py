"""What cannot be written, and wishes that are none: refused by name before anything is."""

import os
from types import SimpleNamespace

import numpy as np
import pytest

from cpu_kernels.formats import GGUF_BY_NAME
from hetero_attn.checkpoints.gguf.file import GgufFile
from hetero_attn.checkpoints.gguf.writer import NewTensor, write_gguf
from hetero_attn.errors import ArgumentError, CheckpointError, UnsupportedModelError
from hetero_attn.tools.quantize.write import quantize
from tests.support.models.toy import make_checkpoint
from tests.support.quantised.quantising import TINY, run


def test_what_a_file_cannot_say_is_refused_by_name(tmp_path):
    path = make_checkpoint(tmp_path / "windows", "mistral", sliding_window=9)

    with pytest.raises(UnsupportedModelError, match="cannot say this model's sliding_window"):
        quantize(path, tmp_path / "model.gguf", "q8", threads=2)


def test_what_cannot_be_written_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    taken = tmp_path / "there.gguf"
    taken.write_bytes(b"old")
    tensor = NewTensor("a", GGUF_BY_NAME["F32"], (4,))
    good = lambda _: [np.zeros(16, np.uint8)]  # noqa: E731

    with pytest.raises(CheckpointError, match="there already.*--force"):
        write_gguf(taken, {}, [tensor], good)
    with pytest.raises(CheckpointError, match="no such folder"):
        write_gguf(tmp_path / "none" / "x.gguf", {}, [tensor], good)
    with pytest.raises(CheckpointError, match="8 bytes of data, expected 16"):
        write_gguf(tmp_path / "x.gguf", {}, [tensor], lambda _: [np.zeros(8, np.uint8)])
    with pytest.raises(CheckpointError, match="fewer than 64 bytes"):
        write_gguf(tmp_path / "x.gguf", {}, [NewTensor("a" * 64, GGUF_BY_NAME["F32"], (4,))], good)
    with pytest.raises(ArgumentError, match="recipe is 'q3'; known: q8"):
        quantize(TINY, tmp_path / "x.gguf", "q3")
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(CheckpointError, match="bytes are to be written and 10 are free"):
        write_gguf(tmp_path / "x.gguf", {}, [tensor], good)
    assert taken.read_bytes() == b"old" and list(tmp_path.iterdir()) == [taken]


def test_a_link_stays_and_what_is_no_file_is_left(tmp_path):
    """The file came in the place of the link, on the disk of the link; a pipe or /dev/null was replaced by a file."""
    (tmp_path / "large disk").mkdir()
    link, pipe, target = tmp_path / "x.gguf", tmp_path / "pipe.gguf", tmp_path / "large disk" / "y.gguf"
    link.symlink_to(target)
    os.mkfifo(pipe)
    data = lambda _: [np.zeros(16, np.uint8)]  # noqa: E731
    tensors = [NewTensor("a", GGUF_BY_NAME["F32"], (4,))]
    for replace in (False, True):
        write_gguf(link, {}, tensors, data, replace)

    assert link.is_symlink() and target.is_file() and [target] == list(target.parent.iterdir())
    with pytest.raises(CheckpointError, match="pipe.gguf: this is there already and is no file"):
        write_gguf(pipe, {}, tensors, data, replace=True)
    with pytest.raises(ArgumentError, match="--out is .*pipe.gguf, which is no file"):
        quantize(TINY, pipe, force=True)
    assert pipe.is_fifo()


def test_room_is_looked_for_before_weights_are_measured(tmp_path, monkeypatch):
    """A model was measured for minutes before its disk was found too small."""
    monkeypatch.setattr("hetero_attn.tools.quantize.write.expected_losses", lambda *_: pytest.fail("measured"))
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10))

    for wanted in ({"recipe": "q4"}, {"bits": 4.6}):
        with pytest.raises(CheckpointError, match="bytes are to be written and 10 are free"):
            quantize(TINY, tmp_path / "x.gguf", **wanted)


def test_a_file_that_is_there_is_a_usage_error_and_a_folder_that_is_not_is_made(halved, tmp_path):
    """Both are looked at before the weights."""
    taken = tmp_path / "there.gguf"
    taken.write_bytes(b"old")
    code, _, said = run("quantize", TINY, "--out", taken)

    assert code == 2 and "there already" in said and "--force" in said and taken.read_bytes() == b"old"
    assert run("quantize", TINY, "--out", tmp_path / "none.gguf", "--recipe", "q3")[0] == 2
    assert run("quantize", halved, "--out", tmp_path / "new" / "model.gguf", "--recipe", "q8")[0] == 0
    assert (tmp_path / "new" / "model.gguf").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "q4", "--bits", "5"], "exclude each other"),
        (["--bits", "3"], "give 4 to 16"),
    ],
)
def test_wrong_options_are_usage_errors(tmp_path, arguments, message):
    code, _, complaint = run("quantize", TINY, "--out", tmp_path / "x.gguf", *arguments)

    assert code == 2
    assert message in complaint


def test_numbers_beyond_64_bits_are_named(tmp_path):
    out, tensor = tmp_path / "x.gguf", NewTensor("w", GGUF_BY_NAME["F32"], (2, 4))
    for value in (1 << 64, -(1 << 63) - 1):
        with pytest.raises(CheckpointError, match="answer: .* more than the 64 bits"):
            write_gguf(out, {"answer": value}, [tensor], lambda _: [])
    write_gguf(out, {"answer": -(1 << 40)}, [tensor], lambda _: [np.zeros(32, np.uint8)])
    file = GgufFile(out)
    assert file.metadata["answer"] == -(1 << 40)
    file.close()


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (
            "tokenizer.json",
            '{"model": {"type": "Unigram", "vocab": []}}',
            "'Unigram', and only BPE is written; take a GGUF",
        ),
        ("tokenizer.model", "", "not as tokenizer.json.*save_pretrained, or take a GGUF"),
    ],
)
def test_tokenizers_that_are_not_written_are_refused_by_name(tmp_path, file, content, message):
    """A model with nothing but a tokenizer.model became a file without a tokenizer."""
    path = make_checkpoint(tmp_path / "model", "llama", hidden=64, intermediate=128, num_heads=2, num_kv_heads=2)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).unlink(missing_ok=True)
    (path / file).write_text(content)

    with pytest.raises(UnsupportedModelError, match=message):
        quantize(path, tmp_path / "model.gguf", "q8", threads=2)
    assert not (tmp_path / "model.gguf").exists()
