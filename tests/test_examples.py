"""Every example runs as it is shipped, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run_example(name: str) -> subprocess.CompletedProcess[str]:
    """Run an example as a reader would, with the packages of this checkout."""
    search_path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return subprocess.run(
        [sys.executable, str(ROOT / "examples" / name)],
        env=os.environ | {"PYTHONPATH": search_path},
        capture_output=True,
        text=True,
        check=False,
    )


def test_demo_gives_the_same_tokens_on_one_lane_and_on_three() -> None:
    run = run_example("demo.py")

    assert run.returncode == 0, run.stderr
    assert run.stdout.count("tokens/s\n") >= 4
    assert "EMULATED" in run.stdout
    assert "are the same." in run.stdout


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
    run = run_example(name)

    assert run.returncode == 0, run.stderr
    assert shown in run.stdout
