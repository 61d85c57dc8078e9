"""How warm experts stay: what share of a layer's picks expert slots serve, kept by recency or with the most popular.

A curve has the share of picks that 0, 1, ... `experts` expert slots serve. What is not measured is assumed:

    kept by recency    1 - (1 - v)^a of a share v of the experts, a = experts / (4 picks) but 1 to 5; fewer than 2 picks
                       of them hold nothing, since each row puts as many on top
    most popular       v

The first is below what was published for Qwen3-30B (19, 38, 64 % of the experts: 74, 89, 96 % of the picks) and
Qwen3.8-Flash-Next (12, 33 %: 62, 85 %), and as was seen of OLMoE (50 %: 76 %). The second is what nobody knows better.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

GROWTH = 4, 1.0, 5.0  # of the assumed curve: picks an experts' power, the least and the greatest one
LEAST_ROWS = 2  # whose picks must find room, or slots kept by recency hold nothing


@dataclass(frozen=True, slots=True)
class ExpertHeat:
    """One layer's experts over a text, or as they are assumed.

    recent, fixed: curves of expert slots kept by recency, and of those that always hold the most popular experts.
    popular: expert ids, the most picked first. is_measured: False for what is assumed.
    """

    recent: tuple[float, ...]
    fixed: tuple[float, ...]
    popular: tuple[int, ...]
    is_measured: bool = True


@cache
def assumed_heat(experts: int, picks: int) -> ExpertHeat:
    """What a plan counts on where no text was followed."""
    each, low, high = GROWTH
    power = min(high, max(low, experts / (each * picks)))
    recent = tuple(
        1 - (1 - count / experts) ** power if count >= min(LEAST_ROWS * picks, experts) else 0.0
        for count in range(experts + 1)
    )
    fixed = tuple(count / experts for count in range(experts + 1))
    return ExpertHeat(recent, fixed, tuple(range(experts)), is_measured=False)


@cache
def distinct_experts(heat: ExpertHeat, picks: int, rows: int) -> float:
    """How many experts so many neighbouring tokens of a text choose between them.

    Slots kept by recency that are as many as the experts of the tokens before hold just those, so what they miss is new
    (Denning, The working set model for program behavior, 1968). Neighbours choose at least as alike as by chance.
    """
    experts, distinct = len(heat.recent) - 1, float(picks)
    for _ in range(rows - 1):
        below = min(int(distinct), experts - 1)
        held = heat.recent[below] + (distinct - below) * (heat.recent[below + 1] - heat.recent[below])
        distinct += picks * (1.0 - max(held, distinct / experts))
    return min(distinct, float(experts))


def by_gain(curves: Sequence[Sequence[float]], total: int) -> list[int]:
    """How many expert slots each layer gets of `total`, so that one more would gain as much in one layer as in another.

    A curve may rise late, since fewer than a row chooses hold nothing: they are given out by whole edges of the curve's
    upper hull, the steepest first, until the next one does not fit.
    """
    alike: dict[tuple[float, ...], list[int]] = {}
    for layer, curve in enumerate(curves):
        alike.setdefault(tuple(curve), []).append(layer)
    edges: dict[tuple[float, int], list[tuple[list[int], int]]] = {}
    for known, layers in alike.items():
        for start, stop in _hull(known):
            edges.setdefault((-_slope(known, start, stop), start), []).append((layers, stop))
    given = [0] * len(curves)
    for (_, start), of_layers in sorted(edges.items()):
        if not total:
            break
        for layer, stop in sorted((layer, stop) for layers, stop in of_layers for layer in layers):
            if given[layer] == start and stop - start <= total:
                given[layer], total = stop, total - (stop - start)
    return given


@cache
def _hull(curve: tuple[float, ...]) -> list[tuple[int, int]]:
    """The edges of the least concave curve that is nowhere below this one, those that rise."""
    corners: list[int] = []
    for at in range(len(curve)):
        while len(corners) > 1 and _slope(curve, corners[-2], corners[-1]) <= _slope(curve, corners[-1], at):
            corners.pop()
        corners.append(at)
    return [(start, stop) for start, stop in zip(corners, corners[1:], strict=False) if curve[stop] > curve[start]]


def _slope(curve: Sequence[float], start: int, stop: int) -> float:
    return (curve[stop] - curve[start]) / (stop - start)
