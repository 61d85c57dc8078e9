"""Memory that whole units leave idle, given to linears.

A solution deals its units in equal parts to equal layers. What that leaves may be a few units in every layer, or more:
a unit of a paired block is a share of both of its linears. It is given to linears a step at a time, as the cost model
judges.
"""

from collections.abc import Iterator
from dataclasses import replace
from math import inf
from typing import NamedTuple

from placement.plan.memory import LinearPlacement
from placement.solve.classes import LayerClass
from placement.solve.pairing import pairs
from placement.solve.problem import Candidate
from placement.solve.whole_units import filled_up, free_tokens, with_linears, with_tokens

PARTS = (1, 2, 10)  # what there is room for, half of it and a tenth are tried
LEAST_GAIN = 1e-4  # of the seconds


class _Block(NamedTuple):
    """Linears of a class that are cut alike: by layer their indices in the workload, the last one's units counting;
    unit_bytes of one unit of the last and of what is beside it."""

    layers: tuple[tuple[int, ...], ...]
    unit_bytes: float


def with_room_used(candidate: Candidate) -> Candidate:
    """The candidate with more of its linears in GPU memory, as far as there is room and each step makes it faster."""
    if candidate.spread is None or candidate.problem.budgets.gpu == inf:
        return candidate
    while True:
        steps = [step for step in map(_within_budget, _steps(candidate)) if step.fits]
        best = min(steps, key=lambda each: each.seconds, default=candidate)
        if best.seconds >= (1 - LEAST_GAIN) * candidate.seconds:
            return filled_up(with_linears(candidate, candidate.linears))
        candidate = best


def _steps(candidate: Candidate) -> Iterator[Candidate]:
    """The candidate with more units of one block at home: what there is room for, parts of it, and as many as give all
    layers as much as most of them have, or one more."""
    problem = candidate.problem
    least = with_tokens(candidate, problem, problem.workload.min_gpu_tokens)
    room, most = (problem.budgets.gpu - each.used_bytes["gpu"] for each in (candidate, least))
    for block in (each for cls in problem.classes for each in _blocks(cls)):
        homes = [candidate.linears[layer[-1]].gpu_units for layer in block.layers]
        units = candidate.linears[block.layers[0][-1]].units
        fitting, possible = (
            min(int(size // block.unit_bytes), len(homes) * units - sum(homes)) for size in (room, most)
        )
        even = [len(homes) * level - sum(min(level, home) for home in homes) for level in (max(homes), max(homes) + 1)]
        for count in sorted({*(fitting // part for part in PARTS), *even, 1}):
            if 0 < count <= possible:
                yield from _with_more(candidate, block, _dealt(homes, count, units))


def _within_budget(candidate: Candidate) -> Candidate:
    """The candidate with so much less of the cache in GPU memory that the budget is kept, if that is enough."""
    if candidate.fits:
        return candidate
    return with_tokens(candidate, candidate.problem, candidate.gpu_tokens + free_tokens(candidate))


def _blocks(cls: LayerClass) -> Iterator[_Block]:
    """The linears of a class, those of a paired block as one."""
    beside = {second: first for first, second in pairs(cls)}
    for i, linear in enumerate(cls.linears):
        if i in beside.values() or linear.bounds.gpu is not None or linear.bounds.expert_slots:
            continue
        together = [cls.linears[j] for j in (beside[i], i)] if i in beside else [linear]
        unit_bytes = sum(each.shard.total_bytes for each in together) / linear.shard.units
        yield _Block(tuple(zip(*(each.indices for each in together), strict=True)), unit_bytes)


def _dealt(homes: list[int], count: int, most: int) -> list[int]:
    """The homes with so many units more, those that have least first."""
    level = min(homes)
    while level < most and count >= (wanted := sum(home == level for home in homes)):
        homes = [max(home, level + 1) for home in homes]
        count, level = count - wanted, level + 1
    for place, home in enumerate(homes):
        if home == level < most and count:
            homes = [*homes[:place], home + 1, *homes[place + 1 :]]
            count -= 1
    return homes


def _with_more(candidate: Candidate, block: _Block, homes: list[int]) -> Iterator[Candidate]:
    """The candidate with these homes, once taken from what the CPU computes first, once from what streams; its spread
    as it was."""
    problem, seen = candidate.problem, []
    is_paired = len(block.layers[0]) > 1  # whose streams stay as whole as they were
    for from_cpu in (True,) if is_paired else (True, False):
        placed = list(candidate.linears)
        for layer, home in zip(block.layers, homes, strict=True):
            units = placed[layer[-1]].units
            for index in layer:
                own_home, rest = divmod(home * placed[index].units, units)
                if rest:
                    return
                placed[index] = _at_home(placed[index], own_home, from_cpu)
        allowed = all(problem.bounds.linears[index].allows(placed[index]) for layer in block.layers for index in layer)
        if allowed and placed not in seen:
            seen.append(placed)
            yield replace(candidate, linears=tuple(placed))


def _at_home(placement: LinearPlacement, home: int, from_cpu: bool) -> LinearPlacement:
    """The linear with so many units at home."""
    added = home - placement.gpu_units
    streams = tuple(
        min(streamed, placement.units - home) if from_cpu else max(0, streamed - added)
        for streamed in placement.stream_units
    )
    return LinearPlacement(placement.name, home, streams, placement.units, placement.expert_slots)
