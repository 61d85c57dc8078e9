"""How many layers stream their experts to prompts beside expert slots.

The program weighed that with experts at home, which serve prompts too; in slots they do not.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace
from math import inf

from placement.policy.bounds import FREE
from placement.solve.problem import Candidate, fastest_first
from placement.solve.whole_units import with_linears

EIGHTHS = 8  # of the layers with experts, tried first as the number that streams to prompts
LAYER_PARTS = 8  # of one of them that streams in part
FINEST = 64  # steps of the search for that number, over all layers


def with_streams_in_few_layers(candidate: Candidate, near: bool = False) -> Candidate:
    """The candidate with the experts of another number of layers streamed to prompts, those of one of them in part, and
    the CPU computing all others, the fastest that is found; itself where rules or a bus that streams nothing leave no
    choice. near: no other number than one near to that which it has."""
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
    streamed = [linears[i].stream_units[max(tiers)] / max(1, linears[i].dram_units) for i in at]
    wanted = [round(LAYER_PARTS * sum(streamed))] if near else [*range(0, most, step), most]
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


def streaming_as(one: Candidate, other: Candidate) -> Candidate:
    """The other candidate with as large a part of what each linear of experts has in DRAM streamed as the one has,
    where no rule says anything."""
    placed = list(other.linears)
    for i in (each for each in open_experts(other) if other.problem.bounds.linears[each] == FREE):
        ours, theirs = one.linears[i], placed[i]
        widths = (theirs.dram_units * units // max(1, ours.dram_units) for units in ours.stream_units)
        placed[i] = replace(theirs, stream_units=tuple(widths))
    return replace(other, linears=tuple(placed))


def open_experts(candidate: Candidate) -> list[int]:
    """The linears of experts of which no rule says what is at home or in slots."""
    problem = candidate.problem
    bounds = zip(problem.workload.linears, problem.bounds.linears, strict=True)
    return [
        i for i, (shard, bound) in enumerate(bounds) if shard.picks and (bound.gpu, bound.expert_slots) == (None, None)
    ]
