"""What a start imports: each of these takes up to a second of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NEEDLESS = (
    "transformers", "scipy", "matplotlib", "pandas", "triton", "starlette", "numba", "torch._dynamo", "torch._inductor"
)  # fmt: skip
GENERATE = ["generate", "examples/tiny", "-p", "A list", "-n", "2", "--device", "cpu"]


def imported(arguments: list[str], of: tuple[str, ...]) -> list[str]:
    """Which modules of `of` a command has imported at its end."""
    code = f"""
import atexit, json, sys
sys.argv = ["hetero-attn", *{arguments!r}]
atexit.register(lambda: print(json.dumps([name for name in {of!r} if name in sys.modules]), file=sys.stderr))
from hetero_attn.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stderr.splitlines()[-1])


def test_an_answer_imports_nothing_that_it_does_not_use():
    imported(GENERATE, ())  # compiles the kernels that are not kept yet

    assert imported(GENERATE, NEEDLESS) == []


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["plan", "--help"], ["--version"]])
def test_help_imports_neither_torch_nor_a_planner(arguments):
    assert imported(arguments, (*NEEDLESS, "torch", "numpy", "placement", "llvmlite")) == []
