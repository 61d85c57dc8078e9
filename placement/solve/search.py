"""The search for the fastest placement: an exact program for every KV size worth trying, laid out in whole units.

Every candidate is judged by the cost model itself, so the prediction that a plan prints is the number that chose it.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from heapq import heapify, heappop, heappush
from math import inf
from typing import NamedTuple

from placement.cost.objective import judged_s, reference_batch, reference_context
from placement.plan.workload import round_up
from placement.solve.decisions import Budgets
from placement.solve.formulation import Formulation, formulation
from placement.solve.improve.expert_slots import in_expert_slots
from placement.solve.improve.idle_memory import with_room_used
from placement.solve.problem import Candidate, KnownPlacements, Problem, fastest_first
from placement.solve.whole_units import filled_up, free_tokens, laid_out, with_tokens

# Placements that are tried with every prefill chunk, the fastest first.
MOST_TRANSFERRED = 4
MOST_WITH_ROOM = 2  # whose idle memory is given to linears, the fastest first
# A program that cannot get this much below the best placement found is not solved: its costs hold tie-breaks, and the
# solver stops at a gap.
PROGRAM_NOISE = 5e-4
FAR_BEHIND = 1.05  # times the best bound
ROUNDING = 1e-6  # of a bound by prices, so that a program is asked for its own before it is solved, and in its order


def candidates(problems: Sequence[Problem], below_s: float = inf) -> list[Candidate]:
    """Placements within the budgets, fastest first; empty when there is none. Only reference tiers are settled.

    problems: the same model cut or called otherwise; the fastest placement of any of them wins. below_s: judged seconds
    that are known to be reached, so that a program which cannot get below is not solved. Should rounding have pushed
    every one over a budget, they are returned all the same, for their bytes to be reported.
    """
    found = _placed(problems, below_s)
    limited = [p for p in problems if (p.budgets.pinned, p.budgets.host) != (None, None) and _may_hold_weights(p)]
    fitting = [each for each in (*found, *candidates_of_gpu_alone(limited, below_s=below_s)) if each.fits]
    at_home = fastest_first(fitting)[:MOST_TRANSFERRED]
    fitting += map(with_room_used, at_home[:MOST_WITH_ROOM])
    fitting += in_expert_slots(_different(at_home))
    return fastest_first(fitting or found)


def _may_hold_weights(problem: Problem) -> bool:
    """Whether all memory together is as large as the weights, so that a search is worth its time."""
    budgets, weights = problem.budgets, sum(shard.total_bytes for shard in problem.workload.linears)
    return budgets.host is None or weights <= budgets.gpu + budgets.host


def _placed(problems: Sequence[Problem], below_s: float) -> list[Candidate]:
    """What needs no search, and what programs find, those of the fastest with every prefill chunk; where nothing keeps
    the budgets, what does not."""
    fitting = list(_known(problems))
    too_large: list[Candidate] = []
    best_s = min([below_s, *(candidate.judged_s for candidate in fitting)])
    programs = _programs(problems)
    # Everything in GPU memory is among those known already; whatever else a program finds is judged as such.
    while programs and programs[0].least_s < (most_s := best_s / judged_s(1 - PROGRAM_NOISE, False)):
        program = heappop(programs)
        problem = program.problem
        if not program.is_own:
            formulated = program.formulated or formulation(problem, problem.calls, program.tokens)
            own = formulated.relaxed()
            if own is not None:
                least_s = own.cost + problem.once_s
                heappush(programs, program._replace(least_s=least_s, is_own=True, formulated=formulated))
            continue
        assert program.formulated is not None
        solved = program.formulated.solve(most_s - problem.once_s)
        for candidate in laid_out(problem, solved) if solved else ():
            if candidate.fits:
                fitting.append(filled_up(candidate))
                best_s = min(best_s, fitting[-1].judged_s)
            else:
                too_large.append(candidate)
    return [*fitting, *_with_other_chunks(problems, fitting)] or too_large


def _different(found: Sequence[Candidate]) -> list[Candidate]:
    """The candidates less those that are placed and called as one before them, and as fast."""
    kept: list[Candidate] = []
    for each in found:
        if not any(each.seconds == other.seconds and _is_same(each, other) for other in kept):
            kept.append(each)
    return kept


def candidates_of_gpu_alone(
    problems: Sequence[Problem], gpu_bytes: float | None = None, below_s: float = inf
) -> list[Candidate]:
    """What is found without budgets of host memory, as answers to the problems, whose budgets they may not keep:
    programs that know those leave room for what whole units may lose, and so miss placements that need none of it.
    Without expert slots, which take no less of any memory.

    gpu_bytes: the budget of GPU memory, None for that of each problem. below_s: as for `candidates`.
    """
    free = [replace(each, budgets=Budgets(each.budgets.gpu if gpu_bytes is None else gpu_bytes)) for each in problems]
    return [
        replace(each, problem=replace(each.problem, budgets=problem.budgets))
        for each in _placed(free, below_s)
        for problem in problems
        if problem.workload.is_called_alike(each.problem.workload)
    ]


def _known(problems: Sequence[Problem]) -> Iterator[Candidate]:
    """Placements that need no search and keep the budgets; of problems that ask for the same passes all of them once,
    and everything in GPU memory for each."""
    seen: set[Hashable] = set()
    known = KnownPlacements()
    for problem in problems:
        passes = _passes(problem)
        yield from (each for each in known.of(problem, only_whole=passes in seen) if each.fits)
        seen |= {passes} if passes else set()


def _with_other_chunks(problems: Sequence[Problem], fitting: Sequence[Candidate]) -> Iterator[Candidate]:
    """The fastest placements that were searched for, called with every other prefill chunk.

    Whole units lose less of one program's solution than of another's: what was found for one chunk may be better than
    what was found for the chunk that suits it.
    """
    searched = [candidate for candidate in fastest_first(fitting) if candidate.spread is not None]
    for candidate in searched[:MOST_TRANSFERRED]:
        found_for = candidate.problem
        for problem in problems:
            ours, theirs = problem.workload, found_for.workload
            if (
                ours.prefill_chunk != theirs.prefill_chunk
                and ours.drafting == theirs.drafting
                and problem.workload.linears == found_for.workload.linears
                and _tiers(problem) == _tiers(found_for)
            ):
                other = replace(found_for, workload=problem.workload, budgets=problem.budgets)
                moved = with_tokens(candidate, other, candidate.gpu_tokens)
                moved = with_tokens(moved, other, moved.gpu_tokens + free_tokens(moved))
                if moved.fits and not any(_is_same(moved, known) for known in fitting):
                    yield moved


def _is_same(one: Candidate, other: Candidate) -> bool:
    """Whether two candidates are one placement with one prefill chunk and one way to draft."""

    def what(candidate: Candidate) -> tuple[object, ...]:
        workload = candidate.problem.workload
        return workload.prefill_chunk, workload.drafting, candidate.linears, candidate.kv

    return what(one) == what(other)


def _tiers(problem: Problem) -> set[int]:
    """Row tiers of the reference passes."""
    return {weighted.call.tier for weighted in problem.calls}


class _Program(NamedTuple):
    """A program worth solving. least_s: seconds below which it cannot get; order: its place among all, which no two
    share; tokens: KV slots of GPU-owned KV heads, None where the program decides them. is_own: whether least_s is its
    own bound, else that of one with as much GPU memory or more, or by the prices of one like it. formulated: itself,
    where it had to be written down for that."""

    least_s: float
    order: int
    problem: Problem
    tokens: int | None
    is_own: bool = True
    formulated: Formulation | None = None


def _programs(problems: Sequence[Problem]) -> list[_Program]:
    """Every program worth solving, as a heap with the most promising one on top."""
    found: list[_Program] = []
    first: dict[int, float] = {}
    bounds: dict[Hashable, list[tuple[float | None, float]]] = {}
    for problem in problems:
        passes = _passes(problem)
        if passes:
            new = _drafted_programs(problem, bounds.setdefault(passes, []), first)
        else:
            new = _priced_programs(problem)
        found += [program._replace(order=len(found) + place) for place, program in enumerate(new)]
    heapify(found)
    return found


def _drafted_programs(
    problem: Problem, known: list[tuple[float | None, float]], first: dict[int, float]
) -> Iterator[_Program]:
    """The programs of a problem that may differ from others in a drafter alone: the one with most GPU memory bounds the
    others, which are looked at only when it is their turn. Who owns the cache hardly depends on the rows of passes:
    what is far behind with the first number of them is left out with the others.

    known: of problems that ask for the same passes, bounds and GPU memory by the place of a program; first: the first
    bounds of all problems likewise.
    """
    gpu = problem.budgets.gpu
    for place, (variant, tokens) in enumerate(_variants(problem)):
        formulated = None
        if place == len(known) and _is_far_behind(first, place):
            known.append((None, inf))
        is_own = place == len(known) or gpu > known[place][1]
        if is_own:
            formulated = formulation(variant, variant.calls, tokens)
            own = formulated.relaxed()
            known[place:] = [(None if own is None else own.cost, gpu)]
        least_s = known[place][0]
        first.setdefault(place, inf if least_s is None else least_s)
        if least_s is not None:
            yield _Program(least_s + variant.once_s, 0, variant, tokens, is_own, formulated)


def _priced_programs(problem: Problem) -> list[_Program]:
    """The programs of a problem, in the order of `_variants`: the last one bounds those before it by its prices, which
    mostly differ in how much of the cache is in GPU memory. That takes a tenth of the time of a bound of their own, and
    most of them never need one."""
    found: list[_Program] = []
    prices: dict[int, Sequence[float]] = {}
    for variant, tokens in reversed([*_variants(problem)]):
        formulated = formulation(variant, variant.calls, tokens)
        known = prices.get(formulated.num_rows)
        least_s = -inf if known is None else (1 - ROUNDING) * formulated.least_s(known)
        is_own = least_s <= 0
        if is_own:
            own = formulated.relaxed()
            if own is None:
                continue
            least_s = own.cost
            if own.prices:
                prices.setdefault(formulated.num_rows, own.prices)
        found.append(_Program(least_s + variant.once_s, 0, variant, tokens, is_own, formulated))
    return found[::-1]


def _is_far_behind(bounds: Mapping[int, float], place: int) -> bool:
    """Whether a program's bound is known and lies far above the least of these."""
    return place in bounds and inf > bounds[place] > FAR_BEHIND * min(bounds.values())


def _passes(problem: Problem) -> Hashable:
    """What a program is asked, whatever its budget of GPU memory and whatever a drafter takes beside it; None where
    nobody drafts, and where host memory has a budget: who leaves more of the one leaves less of the other."""
    budgets = problem.budgets
    if problem.workload.drafting is None or budgets.pinned is not None or budgets.host is not None:
        return None
    workload, calls = problem.workload, tuple(replace(weighted, beside_s=0.0) for weighted in problem.calls)
    return workload.linears, workload.prefill_chunk, calls


def _variants(problem: Problem) -> Iterator[tuple[Problem, int | None]]:
    """Who owns the cache and how much of it stays in GPU memory: everything by the GPU, with as many slots as are best;
    nothing; or the KV heads that are best for a few numbers of slots."""
    every, none = problem.with_owned_heads(True), problem.with_owned_heads(False)
    owns_all = all(
        bound.gpu_kv_heads == shard.kv_heads for shard, bound in zip(problem.workload.kv, every.bounds.kv, strict=True)
    )
    if owns_all:
        yield every, None
    if none != problem:
        yield none, problem.workload.min_gpu_tokens
    if not (owns_all and every == problem):
        for tokens in _token_choices(problem):
            yield problem, tokens
    else:
        for tokens in _token_choices(problem):
            if tokens < problem.whole_windows:
                yield problem, tokens


def least_bytes(problem: Problem, place: str, budgets: Budgets) -> float | None:
    """Fewest bytes at a place (gpu | pinned | host), beside everything of fixed size, that any placement needs.

    Fewer KV slots on the GPU take less of its memory, but what does not fit in them takes DRAM.
    """
    choices = [problem.workload.min_gpu_tokens] if place == "gpu" else _token_choices(problem)
    found = (formulation(problem, problem.calls, tokens, budgets=budgets).solve_for_least(place) for tokens in choices)
    return min((least for least in found if least is not None), default=None)


def _token_choices(problem: Problem) -> list[int]:
    """KV slots worth trying for GPU-owned KV heads: as few as work, the reference contexts, everything."""
    workload = problem.workload
    if all(b.gpu_kv_heads == 0 or b.gpu_tokens for b in problem.bounds.kv):
        return [workload.min_gpu_tokens]
    batch = reference_batch(workload, problem.objective)
    reference = round_up(reference_context(workload, batch) + 1, workload.page_size) * batch
    choices = {
        workload.min_gpu_tokens,
        workload.full_tokens,
        min(max(reference, workload.min_gpu_tokens), workload.full_tokens),
    }
    return sorted(choices, reverse=True)
