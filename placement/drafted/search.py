"""One search over the rows of passes, where the drafter lives and how the model is cut, with one objective.

The objective is the planner's own, seconds of the reference requests, with tokens generated as drafts have it. So every
choice of rows and drafter is a problem like any other: the program of the one that promises most is solved first, and
none whose bound lies above the best placement found.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from placement.cost.objective import reference_batch
from placement.drafted.drafters import Drafter
from placement.plan.drafting import Drafting, Guesses
from placement.plan.plan import Plan
from placement.plan.workload import ROW_TIER_LIMITS
from placement.solve.make_plan import fastest_plan, shapes
from placement.solve.request import PlanRequest


class DraftedPlan(NamedTuple):
    """A model's plan, in whose workload the rows of its passes are, and where its drafter lives; None where no model
    drafts."""

    plan: Plan
    drafter: Drafter | None


def plan_drafted(
    request: PlanRequest, places: Sequence[Drafter | None], guesses: Guesses, widths: Sequence[int]
) -> DraftedPlan | None:
    """The plan for a model with which its requests are served fastest, with passes of one of `widths` or of one row.

    request: of the shape that its policy names, column for auto.

    places: where its drafter may live, the fewest bytes of GPU memory first; [None] where no model drafts. None where
    the budget holds no plan beside any of them. Raises PolicyError for rules that cannot be met.
    """
    asked, (shape, *_) = {}, shapes(request)
    for rows in (1, *_few_enough(request, widths)):
        for place in places if rows > 1 else places[:1]:  # who never drafts needs no memory to be quick
            wish = _beside(shape, place, Drafting(rows, guesses, *(place[-2:] if place else ())))
            if wish is not None:
                asked[id(wish)] = wish, place
    found = fastest_plan([wish for wish, _ in asked.values()])
    return None if found is None else DraftedPlan(found[0], asked[id(found[1])][1])


def _few_enough(request: PlanRequest, widths: Sequence[int]) -> list[int]:
    """The widths of which a pass of all sequences has no more rows than count as few."""
    batch = reference_batch(request.workload, request.policy.objective)
    return [rows for rows in widths if batch * rows <= ROW_TIER_LIMITS[-1]]


def _beside(request: PlanRequest, place: Drafter | None, drafting: Drafting) -> PlanRequest | None:
    """The request in what a drafter leaves of the budget; None where it leaves nothing."""
    limits, taken = request.limits, 0 if place is None else place.gpu_bytes
    if limits["gpu"] is not None:
        if taken >= limits["gpu"]:
            return None
        limits = limits | {"gpu": limits["gpu"] - taken}
    return replace(request, workload=replace(request.workload, drafting=drafting), limits=limits)
