"""The pages of docs/ are true: their Python and commands run, their links lead somewhere, the generated page is of
today."""

import re
import runpy
import shlex
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hetero_attn.cli import app
from hetero_attn.errors import HeteroError
from placement.policy.policy import Policy, policy_schema
from placement.policy.reference import policy_page
from tests.support.processes.quick_python import quick_python

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))


def blocks(page: Path, language: str) -> list[str]:
    """Fenced blocks of a language, in the order they stand."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.stem)
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    """In a file, and in a process of its own, where another process is started, which imports what it is to call."""
    script = tmp_path / "page.py"
    script.write_text("\n".join(blocks(page, "python")))
    if "import multiprocessing" in script.read_text():
        done = subprocess.run(quick_python(script), cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return
    monkeypatch.chdir(ROOT)

    runpy.run_path(str(script), run_name="__main__")


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "console")], ids=lambda page: page.stem)
def test_the_commands_of_a_page_run(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for line in "".join(blocks(page, "console")).splitlines():
        prompt, command, *arguments = shlex.split(line)
        assert (prompt, command) == ("$", "hetero-attn")

        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, done.output


def test_links_lead_to_files():
    for page in sorted((ROOT / "docs").rglob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_page_of_measurements_is_in_its_index():
    index, *pages = sorted((ROOT / "docs" / "measured").glob("*.md"))

    assert index.name == "README.md"
    assert [page.name for page in pages if f"({page.name})" not in index.read_text()] == []


def test_the_results_that_pages_name_are_kept():
    """PATH and CPU stand for several files."""
    kept = {path.name for path in (ROOT / "examples" / "benchmarks" / "results").rglob("*.json")}
    for page in (ROOT / "docs" / "measured").glob("*.md"):
        named = set(re.findall(r"`(?:results/\w+/)?(\w+\.json)`", page.read_text()))

        assert {name for name in named if not re.search("PATH|CPU", name)} <= kept, page.name


def test_the_policy_page_is_that_of_the_schema():
    """`hetero-attn policy reference > docs/policy.md` writes it anew."""
    assert (ROOT / "docs" / "policy.md").read_text() == policy_page()


def test_every_machine_of_the_catalogue_is_named():
    """An error has no room for them all."""
    page = (ROOT / "docs" / "hardware.md").read_text()

    assert {path.stem for path in (ROOT / "placement" / "machine" / "catalogue").glob("*.yaml")} <= set(
        re.findall(r"`([\w-]+)`", page)
    )


def test_every_key_of_the_schema_is_described():
    schema = policy_schema()
    for part in (schema, *schema["$defs"].values()):
        assert [key for key, field in part["properties"].items() if not field.get("description")] == []


def test_the_policy_shown_is_one():
    (text,) = blocks(ROOT / "docs" / "policy.md", "yaml")

    assert Policy.parse(text).batch == 1


def test_exit_codes_are_those_of_the_errors():
    listed = set(map(int, re.findall(r"^\| (\d+) \|", (ROOT / "docs" / "exit_codes.md").read_text(), re.MULTILINE)))
    kinds, codes = [HeteroError], set()
    while kinds:
        kind = kinds.pop()
        codes.add(kind.exit_code)
        kinds += kind.__subclasses__()

    assert codes <= listed
    assert {0, 2, 130} <= listed
