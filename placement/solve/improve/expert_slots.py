"""Expert slots in the memory of experts at home.

The program knows experts as units of which each step reads a share; it finds how much memory is left for them behind
what every token reads. Expert slots in the same memory serve more picks where experts stay warm, and need all experts
in DRAM. Prompts read nearly all of them, and gain nothing: the cost model decides.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from math import inf
from typing import NamedTuple

from placement.plan.memory import LinearPlacement
from placement.plan.warm import by_equal_gain, with_expert_slots
from placement.solve.improve.streamed_experts import open_experts, streaming_as, with_streams_in_few_layers
from placement.solve.problem import Candidate, judged_key

SHARE_PARTS = 32  # of the memory of experts at home, of which slots have as many as host memory leaves room for
SHARES = (1 / 32, 1 / 16, *(part / 8 for part in range(1, 8)))  # of it, tried for the fastest candidate
SHARE_STEPS = (1 / 16, 1 / 32)  # of it, then tried to either side of the best
CLOSE = 1.05  # times the fastest, of which other shares are looked at with what is best to stream
MOST_TRIED_INSERTS = 4
MOST_OF_OTHERS = 6  # candidates with the number of copies that suits the fastest one


class _Slotted(NamedTuple):
    """A candidate with expert slots, and in what share of the memory of which candidate's experts at home."""

    at_home: Candidate
    share: float
    found: Candidate

    def with_streams(self, near: bool = False) -> "_Slotted":
        """With what then is best to stream; near: to what it streams."""
        return self._replace(found=with_streams_in_few_layers(self.found, near))

    def with_inserts(self, inserts: int) -> "_Slotted":
        """With so many copies of a layer's experts behind a step at most."""
        return self._replace(found=_called_with(self.found, inserts))


def in_expert_slots(at_home: Sequence[Candidate]) -> list[Candidate]:
    """Candidates with expert slots in as much of the memory of experts at home as host memory allows, the fastest also
    with what then is best to stream, and with the number of copies and then the share that suit it."""
    shares = ((each, most_in_expert_slots(each)) for each in at_home)
    found = ((each, share, with_expert_slots_in(each, share)) for each, share in shares)
    slotted = [_Slotted(each, share, other) for each, share, other in found if other is not None]
    slotted += [best.with_streams() for best in _ranked(slotted)[:1]]
    slotted += _in_best_number(slotted)
    return [*(each.found for each in slotted), *map(_in_best_share, _ranked(slotted)[:1])]


def _ranked(slotted: Iterable[_Slotted]) -> list[_Slotted]:
    """The fastest first."""
    return sorted(slotted, key=lambda each: judged_key(each.found))


def _in_best_number(slotted: Sequence[_Slotted]) -> Iterator[_Slotted]:
    """The fastest of candidates with expert slots with the number of copies that suits it, where that is another one,
    and what then is best of them: what streams beside slots was chosen for the number before."""
    first, *others = _ranked(slotted) or [None]
    found = with_best_inserts(first.found) if first else None
    if first is not None and found is not None and found is not first.found:
        best = first._replace(found=found)
        inserts = found.problem.workload.inserts
        alike = [each.with_inserts(inserts) for each in others[: MOST_OF_OTHERS - 1]]
        yield from (best, _ranked([best, *alike])[0].with_streams())


def _in_best_share(slotted: _Slotted) -> Candidate:
    """The candidate with slots in the share of the experts' memory that suits it, and what then is best to stream. More
    slots serve more picks of a step and leave prompts fewer experts at home; few slots want other numbers of copies
    than many. So more than one share is better than those beside it, and each of them is looked at closely."""
    best, most, numbers = slotted, most_in_expert_slots(slotted.at_home), _numbers_of(slotted.found)

    def tried(shares: Iterable[float], *as_of: Candidate) -> list[_Slotted]:
        others = [other for share in shares if 0 < share <= most for other in _in_share(slotted.at_home, share, *as_of)]
        return _ranked(each.with_inserts(number) for each in others for number in numbers)

    grid = [fastest for share in SHARES for fastest in tried([share])[:1]]
    close = (each for each in _tops(grid) if each.found.judged_s < CLOSE * best.found.judged_s)
    best = _ranked([best, *(each.with_streams(near=True) for each in close)])[0]
    for step in SHARE_STEPS:
        best = _ranked([best, *tried((best.share - step, best.share + step), best.found)])[0]
    return best.found if best is slotted else best.with_streams(near=True).found


def _tops(row: Sequence[_Slotted]) -> list[_Slotted]:
    """Those of a row of shares that neither neighbour beats."""
    seconds = [inf, *(each.found.judged_s for each in row), inf]
    return [each for at, each in enumerate(row, 1) if seconds[at] <= min(seconds[at - 1], seconds[at + 1])]


def _in_share(at_home: Candidate, share: float, *as_of: Candidate) -> list[_Slotted]:
    """Slots in a share of the memory of experts at home, once streaming to prompts what was streamed without slots,
    once as much as another does."""
    other = with_expert_slots_in(at_home, share)
    ways = () if other is None else (other, *(streaming_as(one, other) for one in as_of))
    return [_Slotted(at_home, share, each) for each in {each.linears: each for each in ways}.values() if each.fits]


def _numbers_of(candidate: Candidate) -> Collection[int]:
    """Numbers of copies that the policy leaves open."""
    problem = candidate.problem
    return range(MOST_TRIED_INSERTS + 1) if problem.bounds.inserts is None else (problem.workload.inserts,)


def most_in_expert_slots(candidate: Candidate) -> float:
    """The largest share, in whole parts, of the memory of experts at home that may be slots: those experts are then in
    host memory, and all that is copied is pinned."""
    problem, used, budgets = candidate.problem, candidate.used_bytes, candidate.problem.budgets
    if (budgets.pinned, budgets.host) == (None, None):
        return 1.0
    sizes = [(problem.workload.linears[i].unit_bytes, candidate.linears[i]) for i in open_experts(candidate)]
    at_home, rounding = sum(unit * placed.gpu_units for unit, placed in sizes), sum(unit for unit, _ in sizes)
    pinned = used["pinned"] + sum(unit * placed.dram_units for unit, placed in sizes if not placed.is_copied)
    limits = (budgets.host, used["host"]), (budgets.pinned, pinned)
    room = min(limit - taken - rounding for limit, taken in limits if limit is not None)
    return max(0, min(SHARE_PARTS, SHARE_PARTS * room // max(1, at_home))) / SHARE_PARTS


def with_expert_slots_in(candidate: Candidate, share: float) -> Candidate | None:
    """The candidate with expert slots in so much of the memory of experts at home, where neither is given by a rule;
    None where that is nothing, or does not fit."""
    at = open_experts(candidate)
    linears = _exchanged(candidate, at, share) if at and share and candidate.on_gpu else None
    if linears is None:
        return None
    found = replace(candidate, linears=linears, label=f"{candidate.label}; {share:.0%} of experts in slots")
    return found if found.fits else None


def with_best_inserts(candidate: Candidate) -> Candidate:
    """The candidate with as many copies of a layer's experts behind a step at most as are best; itself where the policy
    says how many, or no other number is better. More serve more picks where the bus has time for them; where it has
    not, fewer are there sooner."""
    tried = (_called_with(candidate, number) for number in _numbers_of(candidate))
    return min(candidate, *tried, key=lambda each: each.judged_s)


def _called_with(candidate: Candidate, inserts: int) -> Candidate:
    if inserts == candidate.problem.workload.inserts:
        return candidate
    return replace(candidate, problem=candidate.problem.with_inserts(inserts))


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
