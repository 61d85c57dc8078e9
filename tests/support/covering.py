"""Which pairs of two lists an ordinary run tries: few, but every property of a kind of thing on every instruction set."""

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
