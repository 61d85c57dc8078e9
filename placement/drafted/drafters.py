"""Where a drafter may live, and what a step of it takes there.

All of it on the CPU, all of it on the GPU, and what the planner finds for parts of the memory between the two.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from placement.cost.baselines import layer_split
from placement.cost.model import predict
from placement.cost.objective import reference_context, reference_prompt
from placement.plan.memory import PLACES
from placement.plan.phase import PhaseCost
from placement.plan.plan import Plan
from placement.solve.make_plan import plan_of, problem_of
from placement.solve.problem import Candidate
from placement.solve.request import PlanRequest
from placement.solve.search import candidates
from placement.solve.whole_units import complete

SHARES = (0.25, 0.5, 0.75)  # of what lies between the least memory and that which all of it takes


class Drafter(NamedTuple):
    """A drafter as it may live: bytes that it takes by place (host includes pinned), seconds of a step of it and of a
    token of a prompt."""

    request: PlanRequest
    candidate: Candidate
    taken_bytes: dict[str, int]
    step_s: float
    prompt_row_s: float

    @property
    def gpu_bytes(self) -> int:
        """GPU memory that it takes."""
        return self.taken_bytes["gpu"]

    @property
    def plan(self) -> Plan:
        """Its plan, whose budgets are what it takes."""
        limits = {
            place: None if limit is None else self.taken_bytes[place] for place, limit in self.request.limits.items()
        }
        return plan_of(replace(self.request, limits=limits), complete(self.candidate))


def drafters(request: PlanRequest) -> list[Drafter]:
    """A drafter in every way worth trying, the fewest bytes of GPU memory first; empty where no budget holds it.

    request: of the drafter, with the whole budget that it shares.
    """
    request = _in_small_chunks(request)
    drafters = (_drafter(request, candidate) for candidate in _candidates(request))
    kept: list[Drafter] = []
    for each in sorted(drafters, key=lambda each: (each.gpu_bytes, each.step_s)):
        if all(each.step_s < other.step_s or each.prompt_row_s < other.prompt_row_s for other in kept):
            kept.append(each)
    return kept


def least_taken_bytes(request: PlanRequest) -> dict[str, int]:
    """What a drafter takes by place where it takes the least GPU memory, whatever the budgets are."""
    request = _in_small_chunks(request)
    return _taken_bytes(request, _whole_layers(request, "everything on the CPU", 0))


def _in_small_chunks(request: PlanRequest) -> PlanRequest:
    """The request with the smallest prefill chunk, where the planner may choose it."""
    choices = request.workload.chunk_choices
    return replace(request, workload=request.workload.with_chunk(choices[0])) if choices else request


def _candidates(request: PlanRequest) -> Iterator[Candidate]:
    """Of those that fit: nothing on the GPU, everything, and what the planner finds in parts of the memory."""
    on_cpu = _whole_layers(request, "everything on the CPU", 0)
    if request.device == "cpu":
        yield on_cpu
        return
    everything = _whole_layers(request, "everything in GPU memory", request.workload.num_layers)
    found = [candidate for candidate in (on_cpu, everything) if candidate.fits]
    yield from found
    problem, sizes = on_cpu.problem, [candidate.used_bytes["gpu"] for candidate in found]
    for share in SHARES if sizes else ():
        most = problem.budgets.gpu if len(sizes) == 1 else sizes[-1]
        part = replace(problem.budgets, gpu=sizes[0] + share * (most - sizes[0]))
        yield from candidates([replace(problem, budgets=part)])[:1]


def _whole_layers(request: PlanRequest, label: str, layers: int) -> Candidate:
    """The first layers on the GPU, the others on the CPU; the head on the GPU where any layer is."""
    placed = layer_split(request.workload, layers, head_on_gpu=layers > 0)
    return Candidate(problem_of(request), label, *placed, on_gpu=request.device != "cpu")


def _drafter(request: PlanRequest, candidate: Candidate) -> Drafter:
    workload, on_gpu = request.workload, request.device != "cpu"

    def cost(phase: str, rows: int, context: int) -> PhaseCost:
        placed = workload, candidate.linears, candidate.kv, request.hardware
        return predict(*placed, phase=phase, rows=rows, context=context, on_gpu=on_gpu)

    prompt = cost("prefill", reference_prompt(workload), 0)
    step_s = cost("decode", 1, reference_context(workload)).seconds
    return Drafter(request, candidate, _taken_bytes(request, candidate), step_s, prompt.seconds / prompt.rows)


def _taken_bytes(request: PlanRequest, candidate: Candidate) -> dict[str, int]:
    """All that a candidate allocates, by place; host includes pinned."""
    used, fixed = candidate.used_bytes, request.fixed_bytes
    taken = {place: used[place] + sum(fixed[place].values()) for place in PLACES}
    return taken if request.device != "cpu" else taken | {"gpu": 0}
