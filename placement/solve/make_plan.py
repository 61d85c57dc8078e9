"""From workload, hardware and policy to a plan: pure and deterministic. Same input, same plan."""

from collections.abc import Sequence
from dataclasses import replace
from math import inf
from typing import NamedTuple

from placement.cost.model import predict
from placement.cost.objective import (
    layers_objective_s,
    reference_batch,
    reference_calls,
    reference_context,
    reference_prompt,
)
from placement.machine.hardware import HardwareProfile
from placement.plan.phase import PhaseCost, Prediction
from placement.plan.placed import placed_layers
from placement.plan.plan import CURVE_CONTEXTS, Means, Plan, build_plan
from placement.plan.workload import Workload
from placement.policy.bind import bind
from placement.policy.bounds import Bounds
from placement.policy.policy import Policy
from placement.policy.problems import PolicyError
from placement.solve.decisions import Budgets
from placement.solve.improve.expert_slots import most_in_expert_slots, with_expert_slots_in
from placement.solve.pairing import block_apart, is_paired, paired_workload
from placement.solve.problem import Candidate, Problem, fastest_first, fixed_candidate, only_placements
from placement.solve.refusals import BudgetError, budget_error, refusal
from placement.solve.request import PlanRequest, requested
from placement.solve.search import candidates, least_bytes
from placement.solve.whole_units import complete, with_tokens

NOT_FAR = 1.05  # times the fastest, which what is found for a smaller chunk may get below
KnownBounds = dict[tuple[object, ...], Bounds]  # by the linears and the tokens kept of their caches


def make_plan(
    workload: Workload, hardware: HardwareProfile, policy: Policy, *, device: str, gpu_memory_bytes: int | None = None
) -> Plan:
    """Choose what lives and runs where, in the sizes of the workload.

    policy: with no other sizes than those (`Policy.without_sizes`): what follows from sizes, such as resident bytes,
    only who makes the workload can say. device: cpu | cuda | emulated. gpu_memory_bytes: the GPU budget; None takes the
    policy's, then the profile's.
    Raises PolicyError when a rule cannot be met, BudgetError, with the smallest size that works, for a budget too
    small, and ValueError for a policy with other sizes.
    """
    return plan_requested(requested(workload, hardware, policy, device=device, gpu_memory_bytes=gpu_memory_bytes))


def plan_requested(asked: PlanRequest) -> Plan:
    """The plan for a request in which nothing is open; PolicyError and BudgetError as `make_plan`."""
    return plan_with_alternatives(asked).plan


def plan_for_figures(asked: PlanRequest) -> Plan:
    """`plan_requested` for who wants its memory and what is predicted of the reference request alone: row tiers that no
    such request has, of which neither depends, stream nothing. Each would be a program to solve."""
    requests, found = _searched(asked)
    return _plan_of_fastest(requests, found, for_figures=True)


class Searched(NamedTuple):
    """The plan for a request, and every candidate that the search compared, fastest first, what does not fit last; the
    first is the plan's."""

    plan: Plan
    candidates: list[Candidate]


def plan_with_alternatives(asked: PlanRequest) -> Searched:
    """The plan for a request beside what it was compared with; PolicyError and BudgetError as `make_plan`."""
    requests, found = _searched(asked)
    return Searched(_plan_of_fastest(requests, found), found)


def _searched(asked: PlanRequest) -> tuple[list[PlanRequest], list[Candidate]]:
    """The request in every shape and chunk that was tried, and the candidates of all, as `Searched` has them.

    Smaller prefill chunks than the budget of GPU memory suggests are tried one after the other while nothing fits, and
    while the smallest yet is the best: weights and cache gain what its activations leave of any memory. Where host
    memory has a budget, also those that leave it room for more expert slots.
    """
    requests: list[PlanRequest] = []
    found: list[Candidate] = []
    known: KnownBounds = {}
    every_shape = shapes(asked, known)
    for workloads in zip(*(shape.workload.in_smaller_chunks() for shape in every_shape), strict=True):
        in_chunks = [replace(shape, workload=workload) for shape, workload in zip(every_shape, workloads, strict=True)]
        tried = [request for shape in in_chunks for request in _with_chunks(shape)]
        problems = [problem_of(request, known) for request in tried]
        fitting = [each for each in found if each.fits]
        below_s = _to_beat(fitting, problems, min((each.workload.prefill_chunk for each in requests), default=0))
        if below_s is None:
            break
        requests += tried
        found = _ranked([*fitting, *_candidates(problems, asked.device != "cpu", below_s)])
    if not found:
        raise _explain_failure(tried)
    return requests, found


def _to_beat(found: Sequence[Candidate], problems: Sequence[Problem], smallest: int) -> float | None:
    """The judged seconds that programs of a smaller prefill chunk have to get below; None where they are not worth
    their time. found: what fits, fastest first; smallest: the smallest chunk yet.

    Expert slots bring any program's placements as much as those that were found, and are left aside: but not where
    host memory leaves them little, of which a smaller chunk may leave more, as what was found, called so, tells.
    """
    at_home = next((each for each in found if not any(placed.expert_slots for placed in each.linears)), None)
    is_smallest = all(each.problem.workload.prefill_chunk == smallest for each in found[:1])
    if at_home is None:
        return inf if is_smallest else None
    if most_in_expert_slots(at_home) < 1:
        alike = [each for each in problems if each.workload.linears == at_home.problem.workload.linears]
        for called in (with_tokens(at_home, each, at_home.gpu_tokens) for each in alike):
            slotted = with_expert_slots_in(called, most_in_expert_slots(called))
            if slotted is not None and slotted.judged_s < NOT_FAR * found[0].judged_s:
                return NOT_FAR * max(at_home.judged_s, found[0].judged_s * called.judged_s / slotted.judged_s)
    return at_home.judged_s if is_smallest else None


def fastest_plan(requests: Sequence[PlanRequest]) -> tuple[Plan, PlanRequest] | None:
    """The plan for whichever of several requests of a model is served fastest, and that request; None where none of
    their budgets holds a plan. Shapes and chunks are as the requests have them; no two share a workload."""
    problems = [problem_of(request) for request in requests]
    found = _candidates(problems, on_gpu=bool(requests) and requests[0].device != "cpu")
    if not found or not found[0].fits:
        return None
    # The cut as a policy would say it, for every request: what its own program missed, and what is read back again.
    cut = replace(complete(found[0]), spread=None)
    inserts = cut.problem.workload.inserts
    alike = (problem.with_inserts(inserts) if inserts != problem.workload.inserts else problem for problem in problems)
    best = fastest_first(each for problem in alike if (each := replace(cut, problem=problem)).fits) or [cut]
    return _plan_of_fastest(requests, best), _request_of(requests, best[0])


def _plan_of_fastest(requests: Sequence[PlanRequest], found: Sequence[Candidate], for_figures: bool = False) -> Plan:
    best = found[0]
    request = replace(_request_of(requests, best), workload=best.problem.workload)
    plan = plan_of(request, best if for_figures else complete(best), by_context=not for_figures)
    _check_budgets(request, plan)
    return plan


def _request_of(requests: Sequence[PlanRequest], found: Candidate) -> PlanRequest:
    """The request that a candidate answers, whose copies into expert slots it may have chosen."""
    return next(each for each in requests if each.workload.is_called_alike(found.problem.workload))


def shapes(request: PlanRequest, known: KnownBounds | None = None) -> list[PlanRequest]:
    """The request for every shape that its policy and its rules allow. known: as for `problem_of`."""
    if not request.may_pair or request.policy.shape == "column":
        return [request]
    paired = replace(request, workload=paired_workload(request.workload))
    if request.policy.shape == "paired":
        return [paired]
    try:
        problem_of(paired, known)
    except PolicyError:
        return [request]
    return [request, paired]


def _with_chunks(request: PlanRequest) -> list[PlanRequest]:
    """The request for every prefill chunk that may be chosen, the smallest first."""
    if not request.workload.chunk_choices:
        return [request]
    return [replace(request, workload=request.workload.with_chunk(choice)) for choice in request.workload.chunk_choices]


def _candidates(problems: Sequence[Problem], on_gpu: bool, below_s: float = inf) -> list[Candidate]:
    """The placements that rules leave no choice in, and those that the search finds, ranked. below_s: as for
    `candidates`."""
    fixed, open_ = [], []
    for problem in problems:
        only = fixed_candidate(problem, on_gpu)
        if only is None:
            open_.append(problem)
        else:
            fixed.append(only)
    return _ranked([*fixed, *candidates(open_, below_s)])


def _ranked(found: Sequence[Candidate]) -> list[Candidate]:
    """Those that fit, fastest first, then those that do not, the smallest chunk first, which takes the least."""
    return sorted(fastest_first(found), key=lambda each: 0 if each.fits else each.problem.workload.prefill_chunk)


def problem_of(request: PlanRequest, known: KnownBounds | None = None) -> Problem:
    """What the search is asked; raises PolicyError for rules that cannot be met. known: bounds of this request with
    other prefill chunks, to which its own are added; whoever gives it keeps the requests."""
    limits, fixed = request.limits, request.fixed_bytes
    budgets = Budgets(
        *(
            None if limits[place] is None else limits[place] - sum(fixed[place].values())
            for place in ("gpu", "pinned", "host")
        )
    )
    bounds = _bounds_of(request, {} if known is None else known)
    return Problem(request.workload, request.hardware, bounds, request.policy.objective, request.staging_slots, budgets)


def _bounds_of(request: PlanRequest, known: KnownBounds) -> Bounds:
    """What the rules leave open, by the linears and the tokens that the cache holds. Raises PolicyError."""
    policy, workload = request.policy, request.workload
    counts_tokens = any(rule.kv is not None and isinstance(rule.kv.gpu_tokens, int) for rule in policy.rules)
    tokens = *map(workload.layer_tokens, workload.kv), workload.min_gpu_tokens if counts_tokens else None
    key = id(workload.linears), tokens
    if key not in known:
        bounds = bind(policy, workload, request.device)
        only = only_placements(workload, bounds)
        apart = block_apart(workload, only[0]) if only else None
        if apart:
            raise PolicyError([_apart(policy, apart)])
        known[key] = bounds
    return known[key]


def _apart(policy: Policy, what: str) -> str:
    return (
        f"{policy.where(('shape',))}: paired cuts both linears of a block at the same fractions and streams what is in "
        f"DRAM whole or not at all; the rules cut {what} otherwise: change them, or give column or auto"
    )


def plan_of(request: PlanRequest, candidate: Candidate, by_context: bool = True) -> Plan:
    """A candidate's placement as a plan, with what is predicted of it. by_context: as for `predict_plan`."""
    plan = build_plan(
        request.workload,
        candidate.linears,
        candidate.kv,
        Means(
            device=request.device,
            **{f"{place}_memory_bytes": limit for place, limit in request.limits.items()},
            staging_slots=request.staging_slots,
            num_threads=request.hardware.cores,
            context_bytes=request.context_bytes,
        ),
        objective=request.policy.objective,
    )
    return replace(plan, predicted=predict_plan(plan, request.hardware, by_context))


def predict_plan(plan: Plan, hardware: HardwareProfile, by_context: bool = True) -> Prediction:
    """Predicted cost of both phases at the reference request and, unless nobody asks, of decoding along the context."""
    workload, on_gpu = plan.workload, plan.device != "cpu"
    batch, layers = reference_batch(workload, plan.objective), placed_layers(workload, plan.linears, plan.kv)

    def cost(phase: str, rows: int, context: int) -> PhaseCost:
        sizes = {"rows": rows, "context": context}
        return predict(workload, plan.linears, plan.kv, hardware, phase=phase, on_gpu=on_gpu, layers=layers, **sizes)

    seconds = layers_objective_s(workload, layers, hardware, reference_calls(workload, plan.objective), on_gpu)
    contexts = sorted({context for context in CURVE_CONTEXTS if context < plan.max_context} | {plan.max_context})
    return Prediction(
        hardware.name,
        plan.objective,
        seconds,
        cost("decode", batch, reference_context(workload, batch)),
        cost("prefill", reference_prompt(workload), 0),
        tuple(cost("decode", batch, context) for context in contexts if by_context),
    )


def _check_budgets(request: PlanRequest, plan: Plan) -> None:
    """Compare every budget with the bytes that the runtime will allocate, whatever the solver believed."""
    used = {
        "gpu": plan.memory.gpu,
        "pinned": plan.memory.pinned,
        "host": {**plan.memory.host, "pinned": plan.memory.pinned_bytes},
    }
    for place, limit in request.limits.items():
        if limit is not None and sum(used[place].values()) > limit:
            raise budget_error(place, used[place], limit)


def _explain_failure(requests: Sequence[PlanRequest]) -> BudgetError | PolicyError:
    """Which budget is too small and the smallest that works, or which rules cannot be met.

    requests: those that were tried last, column before paired, the smallest chunk's first.
    """
    request = requests[-1] if requests[0].policy.shape == "paired" else requests[0]
    problem = problem_of(request)
    if is_paired(request.workload) and least_bytes(problem, "gpu", Budgets(inf)) is None:
        return PolicyError([_apart(request.policy, "the linears of a block")])
    return refusal(request, problem, [problem_of(each) for each in requests])
