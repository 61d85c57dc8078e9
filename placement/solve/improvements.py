"""Placements improved by what no program knows: memory that whole units leave idle, and expert slots.

A solution deals its units in equal parts to equal layers. What that leaves may be a few units in every layer, or more:
a unit of a paired block is a share of both of its linears. It is given to linears a step at a time, as the cost model
judges.

The program knows experts as units of which each step reads a share; it finds how much memory is left for them behind
what every token reads. Expert slots in the same memory serve more picks where experts stay warm, and need all experts
in DRAM. Prompts read nearly all of them, and gain nothing: the cost model decides.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from math import inf
from typing import NamedTuple

from placement.plan.memory import LinearPlacement
from placement.plan.warm import by_equal_gain, with_expert_slots
from placement.policy.bounds import FREE
from placement.solve.classes import LayerClass
from placement.solve.pairing import pairs
from placement.solve.problem import Candidate, fastest_first
from placement.solve.whole_units import filled_up, free_tokens, with_linears, with_tokens

EIGHTHS = 8  # of the layers with experts, tried first as the number that streams to prompts
LAYER_PARTS = 8  # of one of them that streams in part
FINEST = 64  # steps of the search for that number, over all layers
SHARES = (1.0, 0.5)  # of the memory of experts at home that expert slots are tried in
MOST_TRIED_INSERTS = 4
MOST_OF_OTHERS = 6  # candidates with the number of copies that suits the fastest one
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


def in_expert_slots(at_home: Sequence[Candidate]) -> list[Candidate]:
    """Candidates with expert slots in shares of the memory of experts at home, the fastest of each share also with what
    then is best to stream, and with the number of copies that suits the fastest of all."""
    found: list[Candidate] = []
    for share in SHARES:
        slotted = [other for each in at_home if (other := _with_expert_slots_in(each, share)) is not None]
        found += [*slotted, *map(with_streams_in_few_layers, fastest_first(slotted)[:1])]
    return [*found, *in_best_number(found)]


def _with_expert_slots_in(candidate: Candidate, share: float) -> Candidate | None:
    """The candidate with expert slots in so much of the memory of experts at home, where neither is given by a rule;
    None where that is nothing, or does not fit."""
    problem = candidate.problem
    bounds = zip(problem.workload.linears, problem.bounds.linears, strict=True)
    at = [
        i for i, (shard, bound) in enumerate(bounds) if shard.picks and (bound.gpu, bound.expert_slots) == (None, None)
    ]
    linears = _exchanged(candidate, at, share) if at and candidate.on_gpu else None
    if linears is None:
        return None
    found = replace(candidate, linears=linears, label=f"{candidate.label}; {share:.0%} of experts in slots")
    return found if found.fits else None


def in_best_number(slotted: Sequence[Candidate]) -> Iterator[Candidate]:
    """The fastest of candidates with expert slots with the number of copies that suits it, where that is another one,
    and what then is best of them: what streams beside slots was chosen for the number before."""
    ranked = fastest_first(slotted)
    best = with_best_inserts(ranked[0]) if ranked else None
    if best is not None and best is not ranked[0]:
        inserts = best.problem.workload.inserts
        others = [replace(each, problem=each.problem.with_inserts(inserts)) for each in ranked[1:MOST_OF_OTHERS]]
        yield from (best, with_streams_in_few_layers(fastest_first([best, *others])[0]))


def with_best_inserts(candidate: Candidate) -> Candidate:
    """The candidate with as many copies of a layer's experts behind a step at most as are best; itself where the policy
    says how many, or no other number is better. More serve more picks where the bus has time for them; where it has
    not, fewer are there sooner."""
    problem = candidate.problem
    if problem.bounds.inserts is not None:
        return candidate
    others = (number for number in range(MOST_TRIED_INSERTS + 1) if number != problem.workload.inserts)
    tried = (replace(candidate, problem=problem.with_inserts(number)) for number in others)
    return min([candidate, *tried], key=lambda each: each.judged_s)


def with_streams_in_few_layers(candidate: Candidate) -> Candidate:
    """The candidate with the experts of another number of layers streamed to prompts, those of one of them in part, and
    the CPU computing all others, the fastest that is found; itself where rules or a bus that streams nothing leave no
    choice.

    The program weighed that with experts at home, which serve prompts too; in slots they do not.
    """
    problem, linears = candidate.problem, candidate.linears
    lowest = min(weighted.call.tier for weighted in problem.calls)
    tiers = {weighted.call.tier for weighted in problem.calls if weighted.call.q_len > 1} - {lowest}
    bounds = zip(problem.workload.linears, problem.bounds.linears, strict=True)
    at = [i for i, (shard, bound) in enumerate(bounds) if shard.picks and bound == FREE]
    if not (tiers and at and problem.staging_slots):
        return candidate
    # What expert slots serve need not be streamed: where they are fewest it gains most.
    at.sort(key=lambda i: (linears[i].expert_slots, -linears[i].stream_units[max(tiers)]))
    most, step, tried = len(at) * LAYER_PARTS, -(-len(at) // EIGHTHS) * LAYER_PARTS, {}
    wanted = [*range(0, most, step), most]
    while step >= max(1, most // FINEST):
        tried |= {parts: _streaming(candidate, at, parts, tiers) for parts in wanted}
        best = min(tried, key=lambda parts: tried[parts].judged_s if tried[parts].fits else inf)
        step //= 2
        wanted = [parts for parts in (best - step, best + step) if 0 <= parts <= most and parts not in tried]
    best_of_all = fastest_first([candidate, *(each for each in tried.values() if each.fits)])[0]
    return with_linears(best_of_all, best_of_all.linears)


def _streaming(candidate: Candidate, at: Sequence[int], parts: int, tiers: Collection[int]) -> Candidate:
    """The candidate with so many parts of layers of what some linears have in DRAM streamed in these row tiers, the
    first linears' whole, and nothing of the last ones; its spread as it was."""
    placed = list(candidate.linears)
    for place, i in enumerate(at):
        share = min(LAYER_PARTS, max(0, parts - place * LAYER_PARTS))
        width = placed[i].dram_units * share // LAYER_PARTS
        widths = [width if tier in tiers else old for tier, old in enumerate(placed[i].stream_units)]
        placed[i] = replace(placed[i], stream_units=tuple(widths))
    return replace(candidate, linears=tuple(placed))


def _exchanged(candidate: Candidate, at: Sequence[int], share: float) -> tuple[LinearPlacement, ...] | None:
    """Its linears with expert slots in so much of the memory of those experts at home, and in what is left over."""
    workload, linears, budget = candidate.problem.workload, candidate.linears, candidate.problem.budgets.gpu
    homes = {i: int(linears[i].gpu_units * (1 - share)) for i in at}
    given = sum((linears[i].gpu_units - homes[i]) * workload.linears[i].unit_bytes for i in at)
    left = budget - candidate.used_bytes["gpu"]
    tables = sum(8 * linears[i].units for i in at)
    size_bytes = given + (0 if left == inf else int(left)) - tables
    placed = list(linears)
    for i in at:
        placed[i] = with_expert_slots(linears[i], homes[i], 0)
    counts = by_equal_gain(workload, placed, at, max(0, size_bytes))
    if not any(counts.values()):
        return None
    for i, count in counts.items():
        placed[i] = replace(placed[i], expert_slots=count)
    return tuple(placed)
