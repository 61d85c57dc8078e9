"""What is wrong with a wish by arguments, policy, config and files alone is told before anything is measured or
compiled, by every command: the kept profile is stale here, so that a command that gets so far measures."""

import itertools
import json
import shutil

import pytest
from typer.testing import CliRunner

import hetero_attn
from hetero_attn.cli import app
from hetero_attn.engine import build, measure
from hetero_attn.planning.profiles import is_kept, profile_path, stored_profile
from tests.support.processes.command import TINY

POLICIES = {"globs.yaml": "rules:\n  - {match: 'layers.99.*', gpu: 1}\n", "keys.yaml": "gpu_memorx: 3GiB\n"}
LOADING = {
    "dtype": (["--dtype", "q5"], "dtype is 'q5'"),
    "cache dtype": (["--kv-dtype", "q5"], "--kv-dtype is 'q5'"),
    "no policy": (["--policy", "nowhere.yaml"], "no such policy file"),
    "globs": (["--policy", "globs.yaml"], "matches no shard"),
    "keys": (["--policy", "keys.yaml"], "did you mean 'gpu_memory'"),
    "context": (["--context", "99999"], "2048 positions"),
    "device": (["--device", "tpu"], "device is 'tpu'"),
    "no such GPU": (["--device", "cuda:9"], "cuda"),
    "budget": (["--device", "emulated", "--gpu-memory", "500KiB"], "smallest that works"),
    "tokenizer": (["--tokenizer", "/nowhere"], "no tokenizer is there"),
    "threads": (["--threads", "0"], "--threads is 0"),
    "drafter": (["--speculate", "nowhere/x"], "nowhere/x"),
}
COMMANDS = {
    "generate": ["generate", TINY, "-p", "x"],
    "chat": ["chat", TINY],
    "bench": ["bench", TINY],
    "verify": ["verify", TINY],
    "serve": ["serve", TINY, "--port", "0"],
    "plan": ["plan", TINY],
}
OTHERS = [
    (["generate", "nowhere", "-p", "x"], "nowhere"),
    (["chat", "nowhere"], "nowhere"),
    (["serve", "nowhere", "--port", "0"], "nowhere"),
    (["verify", TINY, "--file", "nowhere"], "nowhere"),
    (["verify", TINY, "-p", ""], "no text to compare on"),
    (["verify", TINY, "--quality", "q8", "--file", "text", "--dtype", "q5"], "dtype is 'q5'"),
    (["generate", TINY, "-p", "x", "--temperature", "-1"], "temperature"),
    (["bench", TINY, "--depth", "99999"], "2048 positions"),
    (["bench", TINY, "-p", "0", "-n", "0"], "nothing to measure"),
    (["profile", "--for", "nowhere"], "nowhere"),
    (["profile", "--routes", TINY, "--file", "text", "--tokenizer", "/nowhere"], "no tokenizer is there"),
    (["generate", "damaged", "-p", "x"], "model.safetensors"),
    (["generate", "mute", "-p", "x"], "no tokenizer"),
    (["verify", "mute"], "no tokenizer"),
    (["generate", TINY, "--file", "text", "--context", "64"], "the context of this plan holds 64 including the answer"),
    (["generate", TINY, "--file", "text", "--chat", "--context", "64"], "holds 64 including the answer"),
    (["generate", TINY, "--file", "bytes"], "bytes is no UTF-8 text"),
    (["generate", TINY, "--file", "nowhere"], "cannot read nowhere"),
    (["generate", TINY, "-p", "x", "-n", "0"], "no number of tokens"),
    (["generate", TINY, "-p", "x", "--stop", ""], "stop"),
    (["generate", "base", "-p", "x", "--chat"], "no chat template"),
    (["chat", "base"], "no chat template"),
    (["chat", TINY, "--template-var", "messages=1"], "template_variables names messages"),
    (["generate", "unsure", "-p", "x"], "generation_config.json"),
    (["chat", "unsure"], "generation_config.json"),
]


class Begun(Exception):
    """Something was measured or compiled."""


@pytest.fixture(autouse=True)
def stale(tmp_path, monkeypatch):
    """A kept profile of another machine, and stand-ins that fail if something is measured or compiled."""

    def begun(*_, **__):
        raise Begun

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "kept"))
    profile_path().parent.mkdir(parents=True)
    profile_path().write_text("{}")
    profile_path().chmod(0o600)
    assert is_kept() and stored_profile() is None
    monkeypatch.setattr(measure, "profile_machine", begun)
    monkeypatch.setattr(hetero_attn, "profile_machine", begun)
    monkeypatch.setattr(build, "make_lanes", begun)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def files(tmp_path):
    """Policies, a text, and models that lack their weights and their tokenizer."""
    for name, text in {**POLICIES, "text": "some words " * 300}.items():
        (tmp_path / name).write_text(text)
    shutil.copytree(TINY, tmp_path / "damaged")
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"\0" * 8)
    shutil.copytree(TINY, tmp_path / "mute", ignore=shutil.ignore_patterns("tokenizer*"))
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    for name in ("base", "unsure"):
        shutil.copytree(TINY, tmp_path / name)
    (tmp_path / "base" / "chat_template.jinja").unlink(missing_ok=True)
    said = json.loads((tmp_path / "base" / "tokenizer_config.json").read_text())
    said.pop("chat_template", None)
    (tmp_path / "base" / "tokenizer_config.json").write_text(json.dumps(said))
    (tmp_path / "unsure" / "generation_config.json").write_text("[]")


def said(command):
    """What a command that is refused says."""
    done = CliRunner().invoke(app, command, input="")
    assert isinstance(done.exception, SystemExit), repr(done.exception)
    assert done.exit_code in (2, 3, 4)
    return " ".join(done.stderr.replace("│", " ").split())


@pytest.mark.parametrize(
    "command,wish", [each for each in itertools.product(COMMANDS, LOADING) if each != ("verify", "drafter")]
)
def test_a_wrong_wish_is_told_before_anything_is_measured(files, command, wish):
    options, reason = LOADING[wish]

    assert reason in said([*COMMANDS[command], *options])


@pytest.mark.parametrize(
    "command,reason", OTHERS, ids=lambda each: " ".join(each[:4]) if isinstance(each, list) else ""
)
def test_what_else_is_wrong_is_told_before_anything_is_measured(files, command, reason):
    assert reason in said(command)


@pytest.mark.parametrize("command", ["generate", "plan"])
def test_a_right_wish_measures(files, command):
    """Or nothing above would be shown."""
    done = CliRunner().invoke(app, COMMANDS[command])

    assert isinstance(done.exception, Begun)
