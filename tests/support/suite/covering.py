"""Which pairs of two lists an ordinary run tries: few, but every property of a kind of thing on every instruction set."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeVar

import pytest

Kind = TypeVar("Kind")


def chosen(kinds: Sequence[Kind], turn: int, properties: Callable[[Kind], set]) -> list[Kind]:
    """Few of the kinds, with every property that any of them has; which ones, among equals, goes by `turn`."""
    order = [*kinds[turn % len(kinds) :], *kinds[: turn % len(kinds)]]
    wanted, found = set().union(*map(properties, kinds)), []
    while wanted:
        best = max(order, key=lambda kind: len(properties(kind) & wanted))
        wanted -= properties(best)
        found.append(best)
    return found


def covering(isas: Sequence[str], kinds: Sequence[Kind], properties: Callable[[Kind], set], name: Callable) -> list:
    """Parameters (isa, kind) for all pairs; those that an ordinary run leaves out are marked `matrix`.

    The first isa is the one that all other tests run on. A kernel is put together of what an instruction set does to
    one plane of codes and to one header, and takes two seconds to compile.
    """
    pairs = []
    for turn, isa in enumerate(isas):
        ordinary = kinds if turn == 0 else chosen(kinds, turn, properties)
        for kind in kinds:
            marks = () if any(kind is each for each in ordinary) else (pytest.mark.matrix,)
            pairs.append(pytest.param(isa, kind, marks=marks, id=f"{isa}-{name(kind)}"))
    return pairs


def one_of_each(values: dict[str, Kind], kind: Callable[[Kind], object]) -> list:
    """The names of values as parameters: an ordinary run takes the first of each kind, the others are `matrix`."""
    seen, params = set(), []
    for name, value in values.items():
        params.append(pytest.param(name, marks=pytest.mark.matrix if kind(value) in seen else ()))
        seen.add(kind(value))
    return params


def ordinary(cells: Sequence[Sequence[str]]) -> set[int]:
    """Which cells of a table an ordinary run tries: every row, every column and every layer is in one of them.

    cells: the names of each cell's place in every dimension.
    """
    facts = [set(enumerate(cell)) for cell in cells]
    left, found, used = set().union(*facts), set(), Counter()
    while left:
        best = max(range(len(cells)), key=lambda at: (len(facts[at] & left), -sum(used[fact] for fact in facts[at])))
        found.add(best)
        left -= facts[best]
        used.update(facts[best])
    return found


def leave_out_the_rest(items: Sequence[pytest.Item]) -> None:
    """Mark `matrix` what tests with the marker `table` leave to another run; each parametrize is a dimension."""
    tables: dict[tuple, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("table") and not item.get_closest_marker("matrix"):
            tables.setdefault((item.path, item.cls, item.originalname), []).append(item)
    for cells in tables.values():
        kept = ordinary([cell.callspec._idlist for cell in cells])
        for at, cell in enumerate(cells):
            if at not in kept:
                cell.add_marker(pytest.mark.matrix)
