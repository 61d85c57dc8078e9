"""Every test is asked for by a target of the Makefile, and those that CI checks by .ci/run; a table's parts are whole."""

import re
import tomllib
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.conftest import ON_REQUEST
from tests.support.suite.covering import leave_out_the_rest, one_of_each, ordinary

ROOT = Path(__file__).resolve().parents[2]
MAKEFILE = (ROOT / "Makefile").read_text()
# Markers that say what a test needs or how its parameters are taken, not when it runs.
OTHERS = {"gpu", "table"}


def asked_for(makefile: str) -> dict[str, set[str]]:
    """The markers that each target's pytest selects; none: the tests without a marker of ON_REQUEST."""
    rules = re.findall(r"^(test[\w-]*):.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    selected = {target: re.search(r'-m pytest.*?-m "?([\w ]+)"?$', body, re.MULTILINE) for target, body in rules}
    return {target: set(found[1].split(" or ")) if found else set() for target, found in selected.items()}


def test_every_marker_of_what_runs_on_request_is_asked_for_by_the_target_that_is_said():
    targets = asked_for(MAKEFILE)

    assert targets["test"] == set() and set().union(*targets.values()) == ON_REQUEST.keys()
    assert all(marker in targets[target.removeprefix("make ")] for marker, target in ON_REQUEST.items())
    assert re.search(r"^test-all: test test-matrix ", MAKEFILE, re.MULTILINE)


def test_no_other_marker_exists():
    markers = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["markers"]

    assert {re.match(r"\w+", marker)[0] for marker in markers} == ON_REQUEST.keys() | OTHERS


def test_ci_runs_what_leaves_the_ordinary_run():
    commands = re.findall(r"^make ([\w-]+)", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)

    assert commands == ["test", "test-matrix"]


def test_an_ordinary_run_takes_every_value_of_every_parameter():
    cells = list(product("abc", "12345", "xy"))
    kept = [cells[at] for at in ordinary(cells)]

    assert len(kept) == 5
    assert all(set(column) == set(whole) for column, whole in zip(zip(*kept), ("abc", "12345", "xy"), strict=True))


def test_one_of_each_kind_is_taken():
    params = one_of_each({"a": 1, "b": 2, "c": 1}, lambda value: value)

    assert [(param.values, bool(param.marks)) for param in params] == [(("a",), False), (("b",), False), (("c",), True)]


class Cell:
    """As much of a test with parameters as is looked at."""

    path, cls, originalname = Path("test_it.py"), None, "test_it"

    def __init__(self, *places: str, marked: tuple[str, ...] = ()) -> None:
        self.callspec, self.marked = SimpleNamespace(_idlist=places), [*marked]

    def get_closest_marker(self, name: str) -> pytest.Mark | None:
        return getattr(pytest.mark, name).mark if name in ("table", *self.marked) else None

    def add_marker(self, marker: pytest.MarkDecorator) -> None:
        self.marked.append(marker.name)


def test_cells_that_an_ordinary_run_leaves_are_marked_and_no_others():
    cells = [Cell(*places) for places in product("ab", "cd", "efg")]

    leave_out_the_rest(cells)

    assert all(cell.marked in ([], ["matrix"]) for cell in cells)
    assert sum(not cell.marked for cell in cells) == 3


def test_a_cell_that_is_marked_already_shows_nothing():
    cells = [Cell("a", "x", marked=("matrix",)), Cell("b", "x"), Cell("a", "y")]

    leave_out_the_rest(cells)

    assert [cell.marked for cell in cells] == [["matrix"], [], []]


def test_a_cell_that_is_asked_for_alone_runs():
    cell = Cell("a", "b")

    leave_out_the_rest([cell])

    assert cell.marked == []
