"""A table of expert slots over a trace of choices, slow and obvious."""

from collections import OrderedDict
from collections.abc import Iterable, Sequence


def simulate(steps: Iterable[Sequence[int]], slots: int, inserts: int, first: Sequence[int]) -> tuple[int, set[int]]:
    """(hits, contents) of a table of so many slots over the picks of each step: after a step what was chosen last
    enters, at most `inserts`, each in the place of what was not chosen for longest.

    first: experts by how warm they are before the first step, the warmest at the front.
    """
    used = OrderedDict((expert, None) for expert in reversed(first))
    held, hits = set(first[:slots]), 0
    for step in steps:
        hits += sum(expert in held for expert in step)
        for expert in step:
            used.pop(expert, None)
            used[expert] = None
        order, swaps = list(used), 0
        while swaps < inserts:
            coming = next((expert for expert in reversed(order) if expert not in held), None)
            leaving = next((expert for expert in order if expert in held), None)
            if coming is None or leaving is None or order.index(coming) < order.index(leaving):
                break
            held, swaps = held - {leaving} | {coming}, swaps + 1
    return hits, held
