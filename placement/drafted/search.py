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

    request: of the shape that its policy names, column for auto; its policy also says who drafts.
    places: where its drafter may live, the fewest bytes of GPU memory first; [None] where no model drafts. None where
    the budget holds no plan beside any of them. Raises PolicyError for rules that cannot be met.
    """
    asked, (shape, *_) = {}, shapes(request)
    # Who never drafts needs no GPU memory to be quick; what it takes instead is host memory, which may be scarce too.
    slowest = places[:1] if request.limits["host"] is None and request.limits["pinned"] is None else places
    for rows in (1, *_few_enough(request, widths)):
        for place in places if rows > 1 else slowest:
            wish = _beside(shape, place, Drafting(rows, guesses, speculate=request.policy.speculate))
            if wish is not None:
                asked[id(wish)] = wish, place
    found = fastest_plan([wish for wish, _ in asked.values()])
    return None if found is None else DraftedPlan(found[0], asked[id(found[1])][1])


def _few_enough(request: PlanRequest, widths: Sequence[int]) -> list[int]:
    """The widths of which a pass of all sequences has no more rows than count as few."""
    batch = reference_batch(request.workload, request.policy.objective)
    return [rows for rows in widths if batch * rows <= ROW_TIER_LIMITS[-1]]


def _beside(request: PlanRequest, place: Drafter | None, drafting: Drafting) -> PlanRequest | None:
    """The request with what a drafter takes of its budgets; None where that is more than one of them."""
    if place is not None:
        taken = place.taken_bytes
        drafting = replace(
            drafting,
            step_s=place.step_s,
            prompt_row_s=place.prompt_row_s,
            gpu_bytes=taken["gpu"],
            pinned_bytes=taken["pinned"],
            host_bytes=taken["host"],
        )
        if any(limit is not None and limit < taken[where] for where, limit in request.limits.items()):
            return None
    return replace(request, workload=request.workload.resized(drafting=drafting))
