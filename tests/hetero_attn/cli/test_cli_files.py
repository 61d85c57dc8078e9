"""`--gguf` and `--tokenizer`: which of several files a command takes, the same on every command that loads a model."""

import json
import shutil

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from hetero_attn.cli import app
from tests.support.models.gguf_models import make_gguf
from tests.support.models.toy import save_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two GGUF models, a projector beside them."""
    path = tmp_path_factory.mktemp("models")
    gguf_file, _ = make_gguf(path, {}, "Q8_0", layers=1, hidden=64, intermediate=64, num_heads=1, num_kv_heads=1)
    for name in ("m-Q8_0.gguf", "m-Q4_K_M.gguf", "mmproj-F16.gguf"):
        shutil.copy(gguf_file, path / name)
    gguf_file.unlink()
    return path


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_every_command_that_loads_a_model_has_both_options():
    found = {}
    for name, command in get_command(app).commands.items():
        options = {option for parameter in command.params for option in parameter.opts}
        if any(parameter.name == "model" for parameter in command.params):
            found[name] = {"--gguf", "--tokenizer"} & options

    assert len(found) >= 7 and all(options == {"--gguf", "--tokenizer"} for options in found.values()), found


def test_several_files_need_a_pattern_and_the_message_says_how(folder):
    result = run("plan", folder, "--device", "cpu")

    assert result.exit_code != 0
    words = " ".join(f"{result.output} {result.exception}".split())
    assert "--gguf" in words and "m-Q4_K_M.gguf, m-Q8_0.gguf" in words and "mmproj" not in words


def test_a_pattern_chooses_the_file(folder):
    result = run("plan", folder, "--gguf", "q8_0", "--device", "cpu", "--json", "--no-explain")

    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["model"] == "m-Q8_0.gguf"


def test_another_tokenizer_counts(folder, tmp_path):
    arguments = ("generate", folder, "--gguf", "Q4_K_M", "-p", "a", "-n", "1", "--device", "cpu", "--context", "64")
    save_tokenizer(tmp_path)

    assert run(*arguments, "--tokenizer", tmp_path, "--json").exit_code == 0
    refused = run(*arguments, "--tokenizer", tmp_path / "nothing")
    assert refused.exit_code != 0 and "no tokenizer is there" in f"{refused.output} {refused.exception}"
