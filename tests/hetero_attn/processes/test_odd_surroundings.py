"""Surroundings of a process that are odd: shadowed packages, streams of the shell, names and values of checkpoints.

| situation (user_reports.md)                                      | now                                            |
|------------------------------------------------------------------|------------------------------------------------|
| placement.py beside the script, another package of that name     | the error names the file                       |
| hetero_attn.__version__                                          | there                                          |
| stdout of latin-1, full, closed; stdin closed or no UTF-8        | replaced; one line; one line                   |
| stderr closed or full                                            | remarks are dropped, the result is whole       |
| a disk that is full when a result file is written                | printed before; the older file stays           |
| tensors without "model."                                         | loads                                          |
| pad_token_id or one of several end ids beyond the vocabulary     | loads, as transformers                         |
| bf16 file under a float32 config                                 | 2 bytes a weight                               |
| config alone, no dtype                                           | planned as bf16                                |
| hub id, `plan .`                                                 | owner/model, the folder's name                 |
| partial_rotary_factor in a Llama config                          | refused by name, see test_rope.py              |
"""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import hetero_attn
from hetero_attn import LLM, SamplingParams, plan_model
from hetero_attn.checkpoints.hub import resolve_model
from hetero_attn.errors import CheckpointError, ConfigError
from hetero_attn.spec.config import ModelConfig
from hetero_attn.tools.whole_file import write_whole
from tests.support.models.toy import edit_json, make_checkpoint

ROOT = Path(__file__).parents[3]
TINY = str(ROOT / "examples" / "tiny")
GREEDY = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
PACKAGES = ("cpu_kernels", "gpu_kernels", "placement")


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Python in a folder whose files come first, as beside a script."""
    paths = os.pathsep.join([str(folder), str(ROOT)])
    environment = os.environ | {"PYTHONPATH": paths}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("name", PACKAGES)
@pytest.mark.parametrize("form", ["file", "package"])
def test_a_file_that_shadows_a_package_is_named(tmp_path, name, form):
    """'placement is not a package' said nothing of whose file it was."""
    shadow = tmp_path / f"{name}.py" if form == "file" else tmp_path / name / "__init__.py"
    shadow.parent.mkdir(exist_ok=True)
    shadow.write_text("x = 1\n")
    done = python(tmp_path, "-c", "from hetero_attn import LLM")

    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and str(shadow) in last and "ShadowedPackageError" in last and "rename" in last
    command = python(tmp_path, "-m", "hetero_attn", "generate", TINY, "-p", "x")
    assert command.returncode == 5 and str(shadow) in command.stderr and "Traceback" not in command.stderr


def test_the_version_is_there():
    assert hetero_attn.__version__[0].isdigit()


def shell(command: str) -> subprocess.CompletedProcess:
    line = f"{sys.executable} -m hetero_attn {command}"
    return subprocess.run(["sh", "-c", line], cwd=ROOT, capture_output=True, check=False)


def test_a_closed_stdin_is_said():
    done = shell(f"generate {TINY} -p - <&-")

    assert done.returncode == 2 and b"stdin is closed" in done.stderr and b"Traceback" not in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
@pytest.mark.parametrize(
    "command", ["doctor", "--help", "--version", pytest.param("doctor --json", marks=pytest.mark.matrix)]
)
def test_a_full_stdout_is_said(command):
    """Of what is printed before a command is named there was a traceback."""
    done = shell(f"{command} > /dev/full")

    assert done.returncode == 5
    assert done.stderr.decode().strip() == "error: the output cannot be written: No space left on device"


@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
def test_a_stdout_that_takes_a_part_is_said(tmp_path, unbuffered):
    """With PYTHONUNBUFFERED, as containers set it, the rest was lost without a word and the code was 0."""
    code = (
        "import sys, typer; from hetero_attn.cli import app, main; app.command('say')(lambda: typer.echo('x' * 3000))"
    )
    line = f"ulimit -f 1; {sys.executable} -c \"{code}; sys.argv = ['x', 'say']; main()\" > {tmp_path}/out"
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(["sh", "-c", line], cwd=ROOT, env=environment, capture_output=True, check=False)

    assert done.returncode == 5 and b"the output cannot be written: File too large" in done.stderr


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "cp1252"])
def test_characters_that_a_terminal_has_not_are_replaced(encoding):
    code = "import sys; from hetero_attn.cli import app, main; app.command('say')(lambda: print('a\\U0001f600b'))"
    code += "; sys.argv = ['x', 'say']; main()"
    run = [sys.executable, "-c", code]
    done = subprocess.run(
        run, cwd=ROOT, env=os.environ | {"PYTHONIOENCODING": encoding}, capture_output=True, check=False
    )

    assert (done.returncode, done.stdout) == (0, b"a?b\n")


REMARKS = """
import sys, typer, warnings
from hetero_attn.cli import app, main
from hetero_attn.serving.progress import compile_note, working
@app.command()
def say():
    compile_note("x")
    typer.echo("a remark", err=True)
    warnings.warn("a warning")
    with working("x"):
        print("the result")
sys.argv = ["x", "say"]
main()
"""


@pytest.mark.parametrize("where", ["2>/dev/full", "2>&-", "2>&- <&-"])
def test_remarks_that_nobody_can_hear_cost_no_result(where):
    """A closed stderr ended every load in the progress bar, a full one after the answer."""
    if "full" in where and not Path("/dev/full").exists():
        pytest.skip("there is no device that is always full")
    line = f'{sys.executable} -c "$CODE" {where}'
    done = subprocess.run(
        ["sh", "-c", line], cwd=ROOT, env=os.environ | {"CODE": REMARKS}, capture_output=True, check=False
    )

    assert (done.returncode, done.stdout) == (0, b"the result\n"), done.stderr


def test_without_stdout_a_command_works_to_its_end():
    line = f'{sys.executable} -c "$CODE" >&-'
    done = subprocess.run(
        ["sh", "-c", line], cwd=ROOT, env=os.environ | {"CODE": REMARKS}, capture_output=True, check=False
    )

    assert done.returncode == 0 and b"a remark" in done.stderr and b"Traceback" not in done.stderr


def test_a_bar_without_stderr_is_none(path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    with LLM(path, device="cpu", max_context=64, num_threads=1, progress=True) as llm:
        assert llm.generate([5, 6], GREEDY)[0].token_ids


def test_a_result_that_cannot_be_written_leaves_what_was_there(tmp_path, monkeypatch):
    file, write = tmp_path / "talk.json", Path.write_bytes
    write_whole(file, "old")
    file.chmod(0o640)
    write_whole(file, "newer")
    assert file.read_text() == "newer" and file.stat().st_mode & 0o777 == 0o640

    def fail(path: Path, data: bytes) -> None:
        write(path, data[:2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="No space left.*talk.json"):
        write_whole(file, "newest")
    assert file.read_text() == "newer" and os.listdir(tmp_path) == ["talk.json"]


def test_a_result_goes_through_links_and_into_pipes(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    write_whole(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"

    os.mkfifo(tmp_path / "pipe")
    reader = subprocess.Popen(["cat", str(tmp_path / "pipe")], stdout=subprocess.PIPE)
    write_whole(tmp_path / "pipe", "through")
    assert reader.communicate()[0] == b"through"


@pytest.fixture
def path(tmp_path) -> Path:
    return make_checkpoint(tmp_path / "model", "llama", layers=1, tied=True)


def tokens(path: Path) -> tuple[int, ...]:
    with LLM(path, device="cpu", max_context=64, num_threads=1, progress=False) as llm:
        return llm.generate([5, 6], GREEDY)[0].token_ids


def test_tensors_without_their_common_prefix_load(path):
    """'N of N tensors are missing, download again' could not help."""
    expected, file = tokens(path), path / "model.safetensors"
    save_file({name.removeprefix("model."): tensor for name, tensor in load_file(file).items()}, file)

    assert tokens(path) == expected


@pytest.mark.parametrize("values", [{"pad_token_id": 307}, {"eos_token_id": [2, 307]}], ids=str)
def test_ids_that_can_never_come_up_do_not_block_a_model(path, values):
    edit_json(path / "generation_config.json", **values)
    config = ModelConfig.from_dir(path)

    assert config.pad_token_id is None and all(token_id < 307 for token_id in config.eos_token_ids)
    edit_json(path / "generation_config.json", bos_token_id=307)
    with pytest.raises(ConfigError, match="bos_token_id"):
        ModelConfig.from_dir(path)


def test_the_weight_files_decide_the_dtype(tmp_path):
    """bf16 weights were held in fp32, in twice the memory, because the config said so."""
    path = make_checkpoint(tmp_path, "llama", layers=1, dtype=torch.bfloat16)
    edit_json(path / "config.json", dtype="float32", torch_dtype="float32")
    workload = plan_model(path, device="cpu").workload
    assert (workload.weight_dtype, workload.kv_dtype) == ("bf16", "bf16")

    (path / "model.safetensors").unlink()
    assert plan_model(path, device="cpu").workload.weight_dtype == "fp32"
    edit_json(path / "config.json", dtype=..., torch_dtype=...)
    assert plan_model(path, device="cpu").workload.weight_dtype == "bf16"


def test_a_model_is_called_by_its_name(path, monkeypatch):
    snapshot = path.parent / "models--owner--some-model" / "snapshots" / ("0123456789" * 4)
    snapshot.parent.mkdir(parents=True)
    shutil.copytree(path, snapshot)
    assert plan_model(snapshot, device="cpu").model == "owner/some-model"

    monkeypatch.chdir(path)
    assert plan_model(".", device="cpu").model == "model"
    monkeypatch.setattr("hetero_attn.planning.settle.resolve_model", lambda name, file: snapshot)
    assert plan_model("owner/some-model", device="cpu").model == "owner/some-model"


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "~nobody-of-this-name/model"], ids=lambda name: repr(name)[:20])
def test_a_name_that_nothing_can_have_is_refused(name):
    with pytest.raises(CheckpointError):
        resolve_model(name)
