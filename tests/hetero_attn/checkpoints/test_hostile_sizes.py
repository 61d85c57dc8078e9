"""Bounded work before a refusal, and messages that can be shown, whatever a stranger's file is called or holds.

| a checkpoint's file                              | before                              | now                          |
|--------------------------------------------------|-------------------------------------|------------------------------|
| shape of 200,000 huge integers, 4 MB             | a minute and more                   | refused by its dimensions    |
| header of 20 MB with a million huge integers     | the same                            | the same                     |
| 1.4 million empty tensors, 90 MB                 | 83 s and 1.75 GB                    | refused by the header's size |
| 200,000 empty tensors, 20 MB                     | seconds, hundreds of MB             | refused before it is parsed  |
| index of 200,000 missing files                   | 5 MB of message                     | refused by their number      |
| name of 3 MB, name with terminal escapes         | 3 MB of message, raw escapes        | refused, quoted and cut      |
| yarn's beta of 1e-320                            | OverflowError                       | refused by its range         |
"""

import json
import struct
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hetero_attn.checkpoints.checkpoint import Checkpoint
from hetero_attn.checkpoints.files import INDEX_NAME, MAX_FILES, SINGLE_NAME
from hetero_attn.checkpoints.safetensors import MAX_TENSORS, SafetensorsFile
from hetero_attn.cli import app
from hetero_attn.errors import (
    MOST_CHARACTERS,
    MOST_LINES,
    CheckpointError,
    ConfigError,
    HeteroError,
    PromptError,
    printable,
)
from hetero_attn.spec.config import ModelConfig
from tests.support.models.toy import edit_json, make_checkpoint

MOST_GROWTH_MB = 256
MOST_CPU_S = 10  # 2 are wanted on a machine that does nothing else
REFUSE = """
import sys, time
from pathlib import Path
from hetero_attn.checkpoints.files import open_files
from hetero_attn.errors import CheckpointError

def peak_kib():  # not getrusage's, which begins with what the parent had
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])

before, began = peak_kib(), time.process_time()
try:
    open_files(Path(sys.argv[1]))
except CheckpointError as error:
    grown = (peak_kib() - before) >> 10
    print(grown, time.process_time() - began)
    print(error)
"""
ESCAPES = "\x1b]0;owned\x07\x1b[2J\r\u202e"


def write_header(path: Path, header: bytes) -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header)


def entry(name: str, shape: str = "[0]") -> str:
    return f'"{name}":{{"dtype":"F32","shape":{shape},"data_offsets":[0,0]}}'


def huge_integers(count: int, digits: int) -> bytes:
    return ("{" + entry("a", f"[{','.join(['9' * digits] * count)}]") + "}").encode()


def empty_tensors(count: int) -> bytes:
    return ("{" + ",".join(entry(f"t{number}") for number in range(count)) + "}").encode()


HEADERS = {
    "200,000 huge integers": lambda: huge_integers(200_000, 20),
    "a million huge integers": lambda: huge_integers(1_000_000 - 10, 19),
    "integers of a thousand digits": lambda: huge_integers(20_000, 1000),
    "1.4 million empty tensors": lambda: empty_tensors(1_400_000),
    "200,000 empty tensors": lambda: empty_tensors(200_000),
    "a name of 3 MB": lambda: ("{" + entry("A" * 3_000_000) + "}").encode(),
    "nested in an entry": lambda: ('{"a":{"dtype":"F32","shape":' + "[" * 90_000 + "]" * 90_000 + "}}").encode(),
}


@pytest.fixture(autouse=True)
def needs_proc(request: pytest.FixtureRequest) -> None:
    if "for_little" in request.node.name and not Path("/proc/self/status").exists():
        pytest.skip("the peak of a process is read from Linux's /proc")


def refusal(folder: Path) -> tuple[float, float, str]:
    """(MB of memory, seconds of CPU, message) of opening a folder in a process of its own."""
    run = [sys.executable, "-c", REFUSE, str(folder)]
    done = subprocess.run(run, capture_output=True, text=True, cwd=Path(__file__).parents[3], check=True)
    numbers, _, message = done.stdout.partition("\n")
    grown, seconds = map(float, numbers.split())
    return grown, seconds, message


@pytest.mark.parametrize("kind", HEADERS)
def test_a_hostile_header_is_refused_for_little(tmp_path, kind):
    write_header(tmp_path / SINGLE_NAME, HEADERS[kind]())
    grown, seconds, message = refusal(tmp_path)

    assert SINGLE_NAME in message and len(message) < 2 * MOST_CHARACTERS
    assert grown < MOST_GROWTH_MB and seconds < MOST_CPU_S, (grown, seconds)


@pytest.mark.parametrize("many", ["files", "tensors"])
def test_a_hostile_index_is_refused_for_little(tmp_path, many):
    file = "model-{:06}.safetensors" if many == "files" else "model-1.safetensors"
    weight_map = {f"t{number}": file.format(number) for number in range(200_000)}
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    grown, seconds, message = refusal(tmp_path)

    expected = f"names 200000 weight files, at most {MAX_FILES}" if many == "files" else "1 of the 1 weight files"
    assert expected in message
    assert grown < MOST_GROWTH_MB and seconds < MOST_CPU_S and len(message) < 2 * MOST_CHARACTERS


def test_a_model_with_as_many_tensors_as_allowed_is_opened(tmp_path):
    write_header(tmp_path / SINGLE_NAME, empty_tensors(MAX_TENSORS))
    file = SafetensorsFile(tmp_path / SINGLE_NAME)
    file.close()

    assert len(file.entries) == MAX_TENSORS


@pytest.mark.parametrize("name", [ESCAPES, "a" + ESCAPES, "a\nerror: b", "A" * 501, "\u2028", ""], ids=ascii)
def test_a_tensor_name_that_no_model_has_is_refused_and_quoted(tmp_path, name):
    header = {name: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}
    write_header(tmp_path / SINGLE_NAME, json.dumps(header).encode())

    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(tmp_path)
    assert str(caught.value).isprintable() and ("\x1b" not in name or "\\x1b" in str(caught.value))
    assert len(str(caught.value)) <= MOST_CHARACTERS


@pytest.mark.parametrize("name", [ESCAPES, "A" * 100_000], ids=["escapes", "long"])
def test_a_name_in_the_index_is_refused_and_quoted(tmp_path, name):
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": {name: "model.safetensors"}}))

    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(tmp_path)
    assert str(caught.value).isprintable() and len(str(caught.value)) <= MOST_CHARACTERS


@pytest.mark.parametrize("key", ["beta_fast", "beta_slow"])
@pytest.mark.parametrize("value", [1e-320, 1e-9])
def test_a_beta_of_nearly_nothing_is_refused(tmp_path, key, value):
    path = make_checkpoint(tmp_path, "llama", layers=1, rope="yarn")
    rope = json.loads((path / "config.json").read_text())["rope_parameters"] | {key: value}
    edit_json(path / "config.json", rope_parameters=rope)

    with pytest.raises(ConfigError, match=key):
        ModelConfig.from_dir(path)


def test_every_error_of_ours_can_be_shown():
    message = str(HeteroError(ESCAPES + "x" * 5_000_000 + "the way out"))

    assert message.isprintable() and message.endswith("the way out") and len(message) < 2 * MOST_CHARACTERS
    assert str(PromptError("plain")) == "plain"
    assert printable("a\nb") == "a\nb"
    many = printable("\n".join(map(str, range(100))))
    assert many.count("\n") == MOST_LINES and many.endswith("... and 88 more problems")


def test_a_long_list_is_cut_between_its_names():
    """The first letter of a machine's name was left out."""
    names = [f"machine-{number:03}" for number in range(100)]
    begin, _, end = printable(f"known: {', '.join(names)}").partition(" ... ")
    shown = [*begin.removeprefix("known: ").removesuffix(",").split(", "), *end.split(", ")]

    assert end and set(shown) <= set(names) and shown[-1] == names[-1]
    assert len(shown) > 20, "no more is left out than must be"


def test_warnings_and_errors_of_commands_pass_the_same_place(monkeypatch, tmp_path):
    """A warning was shown raw, with the line of code that raised it."""

    def warn(*arguments: object, **options: object) -> None:
        warnings.warn("odd " + ESCAPES, stacklevel=1)
        raise ConfigError("bad " + ESCAPES)

    monkeypatch.setattr("hetero_attn.cli.doctor.print_json", warn)
    result = CliRunner().invoke(app, ["doctor", "--json"])

    assert result.exit_code == 3
    assert [line.split()[:2] for line in result.stderr.splitlines()] == [["warning:", "odd"], ["error:", "bad"]]
    assert "\x1b" not in result.stderr and "\\x1b[2J" in result.stderr
