"""A model that lacks files: what lacks most is said first, in words that a person at a shell can act on."""

import shutil
from pathlib import Path

import pytest

from tests.support.command import TINY, run

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


def test_the_python_that_converts_a_pickle_is_python(model: Path) -> None:
    """Its argument `dtype=` had become an option."""
    (model / WEIGHTS).rename(model / "pytorch_model.bin")

    assert f"M.from_pretrained('{model}', dtype='auto').save_pretrained(" in refusal(model)
