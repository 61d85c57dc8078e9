"""Memory budgets that no plan can meet: which one is too small, and the smallest that works beside the others."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from math import inf

from placement.plan.units import format_bytes
from placement.solve.decisions import Budgets
from placement.solve.problem import Candidate, Problem
from placement.solve.request import PlanRequest
from placement.solve.search import candidates_of_gpu_alone, least_bytes

MOST_IN_KIB = 2**26  # a budget from here on is rounded up to MiB, which is less than 2 % of it
LEAST_MEANT = 2**16  # a smaller budget is a number that lacks its unit
BARE_NUMBER = "; a number without a unit is bytes, write 8GiB for gibibytes"  # said of budgets that nobody can mean
# Of a budget of GPU memory, what is found without budgets of host memory.
Found = Callable[[float], list[Candidate]]


class BudgetError(ValueError):
    """A memory budget that no plan can meet.

    needed_bytes: the smallest budget that works, 0 where none is known; budget_bytes: what was given; place: of which
    memory, gpu | pinned | host.
    """

    def __init__(self, message: str, needed_bytes: int, budget_bytes: int, place: str = "gpu") -> None:
        super().__init__(message)
        self.place = place
        self.needed_bytes = needed_bytes
        self.budget_bytes = budget_bytes


def refusal(request: PlanRequest, problem: Problem, problems: Sequence[Problem]) -> BudgetError:
    """Why a request finds no plan. problem: its own; problems: all that were tried in its place."""

    @cache
    def found(gpu_bytes: float) -> list[Candidate]:
        return candidates_of_gpu_alone(problems, gpu_bytes)

    gpu = problem.budgets.gpu
    trials = (("gpu", Budgets(inf)), ("host", Budgets(gpu)), ("pinned", Budgets(gpu, pinned=inf)))
    for place, budgets in trials:
        limit, fixed = request.limits[place], request.fixed_bytes[place]
        alone = None if limit is None else _least(problem, found, place, budgets)
        if alone is not None and alone + sum(fixed.values()) > limit:
            least = _least(problem, found, place, _lifted(problem.budgets, place))
            beside = "" if least is not None else _beside(request, problem, found, place, alone)
            kinds = fixed | {"weights, kv and staging": alone if least is None else least}
            return budget_error(place, kinds, limit, beside)
    return _not_together(request, problem, found)


def _lifted(budgets: Budgets, place: str) -> Budgets:
    """The budgets without that of a place."""
    return replace(budgets, **{place: inf})


def _least(problem: Problem, found: Found, place: str, budgets: Budgets) -> int | None:
    """Fewest bytes at a place, beside everything of fixed size, that work under other budgets: those that a program
    promises, or what is found without budgets of host memory takes. None where none do."""
    least = least_bytes(problem, place, budgets)
    if least is None or place == "gpu":
        return None if least is None else round(least)
    others = replace(budgets, **{place: None})
    kept = [each for each in found(budgets.gpu) if replace(each, problem=replace(each.problem, budgets=others)).fits]
    return min([round(least), *(each.used_bytes[place] for each in kept)])


def _too_small(
    request: PlanRequest, problem: Problem, found: Found, budgets: Budgets, places: Sequence[str]
) -> list[tuple[str, int, int]]:
    """Of these places with a budget, what each would need if the others were as given here, and what it has: where that
    is less."""
    small = []
    for place in places:
        limit = request.limits[place]
        least = None if limit is None else _least(problem, found, place, _lifted(budgets, place))
        if limit is not None and least is not None:
            needed = least + sum(request.fixed_bytes[place].values())
            small += [(place, needed, limit)] if needed > limit else []
    return small


def _beside(request: PlanRequest, problem: Problem, found: Found, place: str, alone: int) -> str:
    """What has to change beside a budget whose smallest size works only then, as the end of a sentence."""
    others = [each for each in request.limits if each != place]
    budgets = replace(problem.budgets, **{place: float(alone)})
    small = _too_small(request, problem, found, budgets, others)
    return "".join(f"; and beside it of {other}_memory {smallest(needed, has)}" for other, needed, has in small[-1:])


def _not_together(request: PlanRequest, problem: Problem, found: Found) -> BudgetError:
    """Budgets of which each can be met without the others, with what one of them would have to be beside the others."""
    given = [f"{place}_memory" for place, limit in request.limits.items() if limit is not None]
    message = f"the budgets {' and '.join(given)} cannot be met together"
    ways = _too_small(request, problem, found, problem.budgets, list(request.limits))
    if not ways:
        return BudgetError(f"{message}; raise one of them", 0, request.gpu_memory_bytes or 0)
    known = [f"of {place}_memory {smallest(needed, limit)}" for place, needed, limit in ways]
    place, needed, limit = ways[0]
    return BudgetError(f"{message}; with the others as they are, {', or '.join(known)}", needed, limit, place)


def budget_error(place: str, kinds: dict[str, int], limit: int, beside: str = "") -> BudgetError:
    """The refusal of a budget that is less than its kinds of bytes together. beside: what else has to change."""
    needed = sum(kinds.values())
    parts = " + ".join(f"{kind} {format_bytes(size)}" for kind, size in kinds.items() if size)
    return BudgetError(
        f"{place}_memory: needs at least {format_bytes(needed)} ({parts}), the budget is {format_bytes(limit)}; "
        + smallest(needed, limit)
        + beside,
        needed,
        limit,
        place,
    )


def smallest(needed_bytes: int, budget_bytes: int) -> str:
    """Which budget works instead of the one that was given, as part of a sentence."""
    hint = BARE_NUMBER if budget_bytes < LEAST_MEANT else ""
    unit, size = ("KiB", 2**10) if needed_bytes < MOST_IN_KIB else ("MiB", 2**20)
    return f"the smallest that works is {needed_bytes} bytes, or {-(-needed_bytes // size)}{unit}{hint}"
