"""What a start imports: each of these takes up to a second of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.models.gguf_models import make_gguf

ROOT = Path(__file__).resolve().parents[3]
NEEDLESS = (
    "transformers", "scipy", "matplotlib", "pandas", "triton", "starlette", "numba", "torch._dynamo", "torch._inductor"
)  # fmt: skip
GENERATE = ["generate", "examples/tiny", "-p", "A list", "-n", "2", "--device", "cpu"]


def imported_by(commands: list[list[str]], of: tuple[str, ...], exit_codes: tuple[int, ...] = (0,)) -> list[list[str]]:
    """Which modules of `of` one process has imported at the end of each of the commands that it runs."""
    code = f"""
import atexit, json, sys
found = []
atexit.register(lambda: print(json.dumps(found), file=sys.stderr))
from hetero_attn.cli import main
for arguments in {commands!r}:
    sys.argv = ["hetero-attn", *arguments]
    try:
        main()
    except SystemExit as end:
        if end.code not in {exit_codes!r}:
            raise
    found.append([name for name in {of!r} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stderr.splitlines()[-1])


def imported(arguments: list[str], of: tuple[str, ...]) -> list[str]:
    """Which modules of `of` a command has imported at its end."""
    return imported_by([arguments], of)[-1]


def test_an_answer_imports_nothing_that_it_does_not_use():
    commands = [GENERATE, [*GENERATE, "--chat"]]
    found = imported_by(commands, NEEDLESS)
    if "numba" in found[0]:  # it compiled the kernels that were not kept yet
        found = imported_by(commands, NEEDLESS)

    assert found == [[], []]


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["plan", "--help"], ["--version"]])
def test_help_imports_neither_torch_nor_a_planner(arguments):
    assert imported(arguments, (*NEEDLESS, "torch", "numpy", "placement", "llvmlite")) == []


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "-h"]])
def test_help_is_drawn_as_ever_without_a_reader_of_markdown(arguments):
    """A quarter of its time was the import of what it does not draw."""
    asked = [sys.executable, "-c", "import sys; from hetero_attn.cli import app, main; {0}(**{1})"]
    drawn = [
        subprocess.run(
            [*asked[:2], asked[2].format(*call), *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        for call in (("main", {}), ("app", {"prog_name": "hetero-attn"}))
    ]

    assert drawn[0] == drawn[1] and "Usage: hetero-attn" in drawn[0]
    assert imported(arguments, ("markdown_it", "pygments", "rich.markdown", "rich.traceback")) == []


TENSORS = ("torch", "numba", "llvmlite", "transformers", "tokenizers")
RULES = "version: 1\nrules:\n  - {match: layers.*.down, dtype: q8}\n"
PLANS = {
    "of a folder, for another machine": ["examples/tiny", "--hardware", "rtx4090-ddr5"],
    "for this machine": ["examples/tiny", "--device", "cpu", "--no-explain"],
    "by a policy file": [
        "examples/tiny",
        "--hardware",
        "rtx4090-ddr5",
        "--policy",
        "{folder}/rules.yaml",
        "--no-explain",
    ],
    "of a GGUF file": ["{folder}/model.gguf", "--hardware", "laptop-8gb-ddr5", "--no-explain"],
    "that does not fit": ["examples/tiny", "--hardware", "rtx4090-ddr5", "--gpu-memory", "1MiB"],
}


@pytest.fixture(scope="module")
def planned_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planned")
    (folder / "rules.yaml").write_text(RULES)
    make_gguf(folder, {})
    return folder


def test_a_plan_is_made_without_tensors(planned_folder):
    """Planning is arithmetic, and importing torch alone takes longer."""
    folder = str(planned_folder)
    commands = [["plan", *(each.replace("{folder}", folder) for each in arguments)] for arguments in PLANS.values()]
    found = imported_by(commands, TENSORS, exit_codes=(0, 4))

    assert dict(zip(PLANS, found, strict=True)) == {name: [] for name in PLANS}
