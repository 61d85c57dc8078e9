"""A model that lacks files: what lacks most is said first, in words that a person at a shell can act on."""

import shutil
from pathlib import Path

import pytest

from tests.support.models.gguf_models import make_gguf
from tests.support.processes.command import TINY, run

TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
WEIGHTS = "model.safetensors"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The shipped model without its tokenizer."""
    return shutil.copytree(TINY, tmp_path / "model", ignore=shutil.ignore_patterns(*TOKENIZER))


def refusal(model: Path) -> str:
    """What `generate` says of a model, which is no wish of the person that could be another one."""
    result = run("generate", str(model), "-p", "Once", "--device", "cpu", "--context", "64")

    assert (result.exit_code, result.stdout) == (3, "")
    return result.stderr


def test_a_shell_is_told_of_the_option_for_a_tokenizer_not_of_lists_of_token_ids(model: Path, tmp_path: Path) -> None:
    sizes = {"layers": 1, "hidden": 64, "intermediate": 64, "num_heads": 1, "num_kv_heads": 1}
    without_vocabulary, _ = make_gguf(tmp_path, {}, **sizes)
    without_vocabulary.write_bytes(without_vocabulary.read_bytes().replace(b"tokenizer.ggml", b"elsewhere.ggml"))
    of_folder, of_file = refusal(model), refusal(without_vocabulary)

    assert "model has no tokenizer files; name the folder" in of_folder and "--tokenizer=" in of_folder
    assert "nor a vocabulary of its own; name the folder" in of_file and "--tokenizer=" in of_file
    assert "lists" not in of_folder + of_file


def test_weights_that_are_missing_are_said_before_a_tokenizer_that_is(model: Path) -> None:
    """A tokenizer was asked for, which helped nobody: there were no weights."""
    (model / WEIGHTS).unlink()

    assert f"neither {WEIGHTS} nor" in refusal(model)


def test_the_python_that_converts_a_pickle_is_python(model: Path) -> None:
    """Its argument `dtype=` had become an option."""
    (model / WEIGHTS).rename(model / "pytorch_model.bin")

    assert f"M.from_pretrained('{model}', dtype='auto').save_pretrained(" in refusal(model)
