"""The README is true: its Python runs, its plan is what is printed, its files exist, its commands are the
Makefile's."""

import importlib
import re
import subprocess
from pathlib import Path

from tests.support.processes.quick_python import quick_python

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """Fenced blocks of a language ("" for none), fences paired in the order they stand."""
    return [
        body
        for name, body in re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
        if name == language
    ]


def test_the_python_runs_and_prints_the_plan_shown():
    (code,) = blocks("python")
    code = code.replace('gpu_memory="8MiB"', 'gpu_memory="8MiB", num_threads=2')  # the plan shown is of two threads
    run = subprocess.run(quick_python("-c", code), capture_output=True, text=True, cwd=ROOT, check=False)
    assert run.returncode == 0, run.stderr
    shown = next(block for block in blocks("") if "GPU home" in block)

    assert run.stdout.startswith(shown)


def test_the_table_of_sources_is_what_the_results_say_and_lacks_no_format(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples" / "benchmarks")
    sources = importlib.import_module("sources")

    assert sources.table() in README
    assert sources.missing() == set()


def test_the_two_commands_are_targets():
    targets = re.findall(r"^make (\w+)", README, re.MULTILINE)

    assert targets == ["demo", "test"]
    assert all(re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE) for target in targets)


def tree_of_the_readme() -> list[str]:
    """Paths of the folders and files that the tree names, each with the folder above it."""
    (tree,) = [block for block in blocks("") if block.startswith("hetero_attn/ ")]
    paths, above = [], ""
    for indent, name in re.findall(r"^( *)([\w.]+/?) ", tree, re.MULTILINE):
        above = above if indent else name
        paths.append(above + name if indent else name)
    return paths


def test_everything_in_the_tree_exists_and_every_folder_is_in_it():
    paths = tree_of_the_readme()
    folders = {
        str(folder.relative_to(ROOT)) + "/"
        for package in ("hetero_attn", "placement", "cpu_kernels", "gpu_kernels")
        for folder in (ROOT / package).iterdir()
        if (folder / "__init__.py").exists()
    }

    assert len(folders) > 20
    assert [path for path in paths if not (ROOT / path).exists()] == [] and folders <= set(paths)
