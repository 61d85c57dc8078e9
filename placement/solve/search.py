"""The search for the fastest placement: an exact program for every KV size worth trying, laid out in whole units.

Every candidate is judged by the cost model itself, so the prediction that a plan prints is the number that chose it.
"""

from dataclasses import dataclass, replace

from placement.cost.objective import objective_s, reference_batch, reference_calls, reference_context, tier_call
from placement.cost.terms import WeightedCall
from placement.machine.hardware import HardwareProfile
from placement.plan.memory import KvPlacement, LinearPlacement, memory_report, staging_slot_bytes
from placement.plan.workload import NUM_ROW_TIERS, ROW_TIER_NAMES, Workload, round_up
from placement.policy.bind import Bounds
from placement.solve.classes import LayerClass, layer_classes, single_layers
from placement.solve.decisions import Budgets, Homes
from placement.solve.formulation import Formulation
from placement.solve.spread import Layout, lay_out, placements, streams
from placement.solve.unknowns import Unknowns

# Up to this many linears every layer is a class of its own.
MAX_SINGLE_LINEARS = 20


@dataclass(frozen=True, slots=True)
class Problem:
    """What is to be placed. slots: staging slots, 0 when nothing may stream."""

    workload: Workload
    hardware: HardwareProfile
    bounds: Bounds
    objective: str
    slots: int
    budgets: Budgets

    @property
    def calls(self) -> list[WeightedCall]:
        """Passes of the reference request."""
        return reference_calls(self.workload, self.objective)

    @property
    def classes(self) -> list[LayerClass]:
        """Classes of layers with variables of their own."""
        small = len(self.workload.linears) <= MAX_SINGLE_LINEARS
        return (single_layers if small else layer_classes)(self.workload, self.bounds)

    def formulation(
        self, calls: list[WeightedCall], tokens: int, homes: Homes | None = None, budgets: Budgets | None = None
    ) -> Formulation:
        """The program for some passes and a number of KV slots; budgets are the problem's own unless given."""
        slots = self.slots if homes is None or homes.slot_bytes else 0
        return Formulation(
            Unknowns(self.workload, self.hardware, self.classes, calls, tokens, slots, budgets or self.budgets, homes)
        )


@dataclass(frozen=True, slots=True)
class Candidate:
    """A placement, what distinguishes it, and the predicted seconds of the reference request.

    layout, concentrated, gpu_tokens: how it was laid out, for `complete`; None when nothing was left to choose.
    """

    label: str
    linears: tuple[LinearPlacement, ...]
    kv: tuple[KvPlacement, ...]
    seconds: float
    layout: Layout | None = None
    concentrated: bool = False
    gpu_tokens: int = 0


def fixed_candidate(problem: Problem, on_gpu: bool) -> Candidate | None:
    """The only placement that the bounds allow, or None when something is left to choose."""
    bounds = problem.bounds
    if not all(b.fixed for b in bounds.linears) or any(b.gpu_groups is None or b.gpu_tokens is None for b in bounds.kv):
        return None
    linears = tuple(
        LinearPlacement(s.name, b.gpu, b.stream, s.units)
        for s, b in zip(problem.workload.linears, bounds.linears, strict=True)
    )
    kv = tuple(
        KvPlacement(s.name, b.gpu_groups, b.gpu_tokens, s.groups)
        for s, b in zip(problem.workload.kv, bounds.kv, strict=True)
    )
    seconds = objective_s(problem.workload, linears, kv, problem.hardware, problem.calls, on_gpu)
    return Candidate("as the rules say", linears, kv, seconds)


def candidates(problem: Problem) -> list[Candidate]:
    """Placements within the budgets, fastest first; empty when there is none. Only reference tiers are settled.

    Should rounding have pushed every one over a budget, they are returned all the same, for their bytes to be reported.
    """
    found: list[Candidate] = []
    classes, calls = problem.classes, problem.calls
    tiers = sorted({weighted.call.tier for weighted in calls})
    for tokens in _token_choices(problem):
        solved = problem.formulation(calls, tokens).solve()
        for tier in (*tiers, None) if solved else ():
            layout = lay_out(classes, solved, tier)
            linears, kv = placements(problem.workload, classes, layout, tokens)
            if all(known.linears != linears or known.kv != kv for known in found):
                shape = _shape_words(tier)
                seconds = objective_s(problem.workload, linears, kv, problem.hardware, calls, True)
                found.append(
                    Candidate(
                        f"{shape}; {tokens} KV tokens in GPU memory",
                        linears,
                        kv,
                        seconds,
                        layout,
                        tier is not None,
                        tokens,
                    )
                )
        if any(
            all(p.dram_units == 0 for p in c.linears) and all(k.gpu_groups == k.groups for k in c.kv) for c in found
        ):
            break
    fitting = [candidate for candidate in found if _fits(problem, candidate)]
    return sorted(fitting or found, key=lambda candidate: candidate.seconds)


def _shape_words(tier: int | None) -> str:
    if tier is None:
        return "CPU work spread over all layers"
    rows = ROW_TIER_NAMES[tier]
    return f"CPU work in few whole layers, as is best for {rows} row{'' if rows == '1' else 's'}"


def _fits(problem: Problem, candidate: Candidate) -> bool:
    """Whether the allocated bytes, everything of fixed size left out, are within the budgets."""
    slots = problem.slots if any(placement.streams for placement in candidate.linears) else 0
    memory = memory_report(
        problem.workload, candidate.linears, candidate.kv, device="emulated", staging_slots=slots
    ).to_dict()
    used = {place: sum(memory[place].get(kind, 0) for kind in ("weights", "kv", "staging")) for place in memory}
    used["host"] += used["pinned"]
    limits = {place: getattr(problem.budgets, place) for place in used}
    return all(limits[place] is None or used[place] <= limits[place] for place in used)


def complete(problem: Problem, candidate: Candidate) -> Candidate:
    """Settle the row tiers that no reference call uses; homes and staging slots stay, and so do the seconds."""
    layout = candidate.layout
    if layout is None:
        return candidate
    homes = Homes(
        {key: sum(units) for key, units in layout.homes.items()},
        {c: sum(groups) for c, groups in layout.groups.items()},
        frozenset((c, i) for (c, i, _), units in layout.streams.items() if any(units)),
        staging_slot_bytes(problem.workload, candidate.linears),
    )
    settled = layout.streams
    for tier in range(NUM_ROW_TIERS):
        if any((*key, tier) not in settled for key in layout.homes):
            solved = problem.formulation(
                [tier_call(problem.workload, tier)], candidate.gpu_tokens, homes, Budgets(float("inf"))
            ).solve()
            assert solved is not None, f"no cut for tier {tier} with the homes of {candidate.label}"
            settled = streams(problem.classes, layout.homes, solved, candidate.concentrated) | settled
    linears, _ = placements(problem.workload, problem.classes, replace(layout, streams=settled), candidate.gpu_tokens)
    return replace(candidate, linears=linears)


def least_bytes(problem: Problem, place: str, budgets: Budgets) -> float | None:
    """Fewest bytes at a place (gpu | pinned | host), beside everything of fixed size, that any placement needs.

    Fewer KV slots on the GPU take less of its memory, but what does not fit in them takes DRAM.
    """
    choices = [problem.workload.min_gpu_tokens] if place == "gpu" else _token_choices(problem)
    found = (problem.formulation(problem.calls, tokens, budgets=budgets).solve_for_least(place) for tokens in choices)
    return min((least for least in found if least is not None), default=None)


def _token_choices(problem: Problem) -> list[int]:
    """KV slots worth trying for GPU-owned groups: as few as work, the reference contexts, everything."""
    workload = problem.workload
    if all(b.gpu_groups == 0 or b.gpu_tokens for b in problem.bounds.kv):
        return [workload.min_gpu_tokens]
    batch = reference_batch(workload, problem.objective)
    reference = round_up(reference_context(workload, batch) + 1, workload.page_size) * batch
    choices = {
        workload.min_gpu_tokens,
        workload.full_tokens,
        min(max(reference, workload.min_gpu_tokens), workload.full_tokens),
    }
    return sorted(choices, reverse=True)
