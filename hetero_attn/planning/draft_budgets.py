"""Whether a budget holds a model and its drafter: with which prefill chunks, and if not, the smallest that does."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from hetero_attn.errors import MemoryBudgetError
from hetero_attn.planning.choices import MIN_PREFILL_CHUNK
from hetero_attn.planning.options import LoadOptions
from hetero_attn.planning.settle import Asked, ask
from placement.drafted.drafters import least_taken_bytes
from placement.plan.drafting import Drafting, Guesses
from placement.plan.plan import Plan
from placement.plan.units import format_bytes
from placement.policy.policy import Policy
from placement.solve.make_plan import plan_requested
from placement.solve.refusals import BudgetError, smallest


def in_smaller_chunks(wishes: LoadOptions, asked: Asked, drafts: bool = False) -> list[Asked]:
    """What was asked, then the same with smaller and smaller prefill chunks than a model alone has in the budget, where
    wishes leave the chunk open: two models whose chunks take a quarter of it each may have no room for the rest.

    drafts: as for `ask`.
    """
    policy = wishes.policy if isinstance(wishes.policy, Policy) else Policy.load(wishes.policy)
    choices, found = asked.workload.chunk_choices, [asked]
    rows = choices[0].rows // 2 if choices else 0
    while rows >= MIN_PREFILL_CHUNK:
        smaller = replace(wishes, policy=policy.model_copy(update={"prefill_chunk": rows}))
        found.append(ask(smaller, drafts, asked.model.headers))
        rows //= 2
    return found


def pairs_that_fit(larges: Sequence[Asked], smalls: Sequence[Asked]) -> Iterator[tuple[Asked, Asked]]:
    """A model and its drafter, of those asked for, wherever the GPU budget holds the least that both need; the first
    drafter with every model first."""
    limit = larges[0].request.limits["gpu"]
    needed = [0 if limit is None else _least_gpu_bytes(large) for large in larges]
    for small in smalls:
        taken = least_taken_bytes(small.request)["gpu"]
        yield from (
            (large, small) for large, least in zip(larges, needed, strict=True) if least + taken <= (limit or 0)
        )


def plan_in_the_rest(asked: Asked, own: Asked) -> Plan:
    """The plan of the model in what a drafter leaves of the budgets that takes the least GPU memory and is asked for
    nothing. Raises BudgetError."""
    taken = least_taken_bytes(own.request)
    drafting = Drafting(
        rows=1,
        guesses=Guesses(0.0),
        gpu_bytes=taken["gpu"],
        pinned_bytes=taken["pinned"],
        host_bytes=taken["host"],
    )
    return plan_requested(replace(asked.request, workload=replace(asked.request.workload, drafting=drafting)))


def too_small(asked: Asked, own: Asked) -> MemoryBudgetError:
    """What to say of budgets that do not hold a model and its drafter, both with the smallest prefill chunks."""
    names = f"{asked.workload.model} beside the draft model {own.workload.model}"
    try:
        plan_in_the_rest(asked, own)
        why = BudgetError("the memory budgets cannot be met together", 0, 0)
    except BudgetError as error:
        why = error
    if not why.needed_bytes:
        return MemoryBudgetError(f"no plan of {names}: {why}; raise them, or leave speculate off")
    taken, limit = least_taken_bytes(own.request)[why.place], asked.request.limits[why.place] or 0
    return MemoryBudgetError(
        f"{why.place}_memory: {format_bytes(limit)} hold no plan of {names} "
        f"({format_bytes(why.needed_bytes - taken)} + {format_bytes(taken)}); {smallest(why.needed_bytes, limit)}; "
        f"raise {why.place}_memory, or leave speculate off"
    )


def _least_gpu_bytes(asked: Asked) -> int:
    """The least GPU memory that holds a plan of a model."""
    try:
        plan_requested(replace(asked.request, limits=asked.request.limits | {"gpu": 1}))
    except BudgetError as error:
        return error.needed_bytes
    return 0
