"""What a search for a placement is asked, and what it finds: a problem, and candidates judged by the cost model itself.

So the prediction that a plan prints is the number that chose it.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

from placement.cost.baselines import everything_at_home, largest_layer_split, layer_split, stream_all
from placement.cost.objective import judged_s, layers_objective_s, reference_calls
from placement.cost.tally import KnownCosts
from placement.cost.terms import WeightedCall, step_s
from placement.machine.hardware import HardwareProfile
from placement.plan.memory import PLACES, KvPlacement, LinearPlacement, is_all_on_gpu
from placement.plan.placed import PlacedLayer, placed_layers
from placement.plan.workload import Workload
from placement.policy.bounds import Bounds
from placement.solve.classes import LayerClass, layer_classes, single_layers
from placement.solve.decisions import Budgets
from placement.solve.pairing import is_paired
from placement.solve.spread import Spread

# Up to this many linears every layer is a class of its own.
MAX_SINGLE_LINEARS = 12


@dataclass(frozen=True)
class Problem:
    """What is to be placed. staging_slots: 0 when nothing may stream. costs: of placements that were judged, for all
    problems that were made of this one."""

    workload: Workload
    hardware: HardwareProfile
    bounds: Bounds
    objective: str
    staging_slots: int
    budgets: Budgets
    costs: KnownCosts = field(default_factory=KnownCosts, compare=False, repr=False)

    @cached_property
    def calls(self) -> list[WeightedCall]:
        """Passes of the reference requests."""
        return reference_calls(self.workload, self.objective)

    @cached_property
    def classes(self) -> list[LayerClass]:
        """Classes of layers with variables of their own."""
        small = len(self.workload.linears) <= MAX_SINGLE_LINEARS
        return (single_layers if small else layer_classes)(self.workload, self.bounds)

    @cached_property
    def whole_windows(self) -> int:
        """KV slots with which the layers of a sliding window are whole, as a program that decides their number keeps
        them; 0 where no layer may keep less."""
        layers = zip(self.workload.kv, self.bounds.kv, strict=True)
        windows = [
            shard for shard, bound in layers if shard.window and bound.gpu_kv_heads != 0 and not bound.gpu_tokens
        ]
        return min(self.workload.full_tokens, max(map(self.workload.layer_tokens, windows), default=0))

    @cached_property
    def once_s(self) -> float:
        """Seconds of the reference requests that no placement changes and no program counts."""
        return sum(
            weighted.weight
            * (step_s(self.workload, weighted.call, self.hardware, True, weighted.with_head) + weighted.beside_s)
            for weighted in self.calls
        )

    def with_inserts(self, inserts: int) -> "Problem":
        """The problem with so many copies of a layer's experts behind a step at most."""
        return replace(self, workload=self.costs.with_inserts(self.workload, inserts))

    def with_owned_heads(self, every: bool) -> "Problem":
        """The problem in which the GPU owns all KV heads that are free to choose, or none."""
        kv = tuple(
            replace(bound, gpu_kv_heads=shard.kv_heads if every else 0) if bound.gpu_kv_heads is None else bound
            for shard, bound in zip(self.workload.kv, self.bounds.kv, strict=True)
        )
        return replace(self, bounds=replace(self.bounds, kv=kv))


@dataclass(frozen=True)
class Candidate:
    """A placement, the problem that it answers, and what distinguishes it.

    spread, concentrated, gpu_tokens: how it was laid out, for `complete`; None when nothing was left to choose. on_gpu:
    whether there is a GPU at all.
    """

    problem: Problem
    label: str
    linears: tuple[LinearPlacement, ...]
    kv: tuple[KvPlacement, ...]
    spread: Spread | None = None
    concentrated: bool = False
    gpu_tokens: int = 0
    on_gpu: bool = True

    @cached_property
    def layers(self) -> tuple[PlacedLayer, ...]:
        """Its different layers."""
        return placed_layers(self.problem.workload, self.linears, self.kv)

    @cached_property
    def seconds(self) -> float:
        """Predicted seconds of the reference requests."""
        problem = self.problem
        return layers_objective_s(
            problem.workload, self.layers, problem.hardware, problem.calls, self.on_gpu, problem.costs
        )

    @cached_property
    def judged_s(self) -> float:
        """The seconds by which it is compared with others."""
        return judged_s(self.seconds, is_all_on_gpu(self.problem.workload, self.linears, self.kv))

    @cached_property
    def used_bytes(self) -> dict[str, int]:
        """Bytes by place that it allocates, everything of fixed size left out; host includes pinned."""
        problem = self.problem
        layers = [(each.times, problem.costs.bytes_of(problem.workload, each)) for each in self.layers]
        gpu, pinned, host = (sum(times * size[at] for times, size in layers) for at in range(len(PLACES)))
        staging_slot = max((size.staging_slot for _, size in layers), default=0)
        return {"gpu": gpu + problem.staging_slots * staging_slot, "pinned": pinned, "host": host + pinned}

    @property
    def fits(self) -> bool:
        """Whether it keeps every budget."""
        limits = {place: getattr(self.problem.budgets, place) for place in PLACES}
        return all(limit is None or self.used_bytes[place] <= limit for place, limit in limits.items())


Placements = tuple[tuple[LinearPlacement, ...], tuple[KvPlacement, ...]]


def only_placements(workload: Workload, bounds: Bounds) -> Placements | None:
    """The only ones that the bounds allow, or None when something is left to choose."""
    if not all(b.fixed for b in bounds.linears) or any(
        b.gpu_kv_heads is None or b.gpu_tokens is None for b in bounds.kv
    ):
        return None
    linears = tuple(
        LinearPlacement(s.name, b.gpu, b.stream, s.units, b.expert_slots or 0)
        for s, b in zip(workload.linears, bounds.linears, strict=True)
    )
    kv = tuple(
        KvPlacement(s.name, b.gpu_kv_heads, b.gpu_tokens, s.kv_heads)
        for s, b in zip(workload.kv, bounds.kv, strict=True)
    )
    return linears, kv


def fixed_candidate(problem: Problem, on_gpu: bool) -> Candidate | None:
    """The only placement that the bounds allow, or None when something is left to choose."""
    only = only_placements(problem.workload, problem.bounds)
    return None if only is None else Candidate(problem, "as the rules say", *only, on_gpu=on_gpu)


class KnownPlacements:
    """Placements that need no search, made once for all problems whose linears and caches are the same."""

    def __init__(self) -> None:
        self._made: dict[tuple[object, ...], tuple[Workload, Placements]] = {}

    def of(self, problem: Problem, only_whole: bool = False) -> Iterator[Candidate]:
        """Those that the bounds and the machine allow: what other systems do, and the simplest of all. only_whole:
        everything in GPU memory alone."""
        placed: list[tuple[str, Callable[[Workload], Placements]]] = [("everything in GPU memory", everything_at_home)]
        if not only_whole:
            layers = largest_layer_split(problem.workload, problem.budgets.gpu)
            placed += [
                ("every weight streamed", stream_all),
                (f"{layers} whole layers on the GPU", partial(layer_split, gpu_layers=layers)),
                ("everything on the CPU", partial(layer_split, gpu_layers=0)),
            ]
        for label, place in placed:
            linears, kv = self._once(problem.workload, label, place)
            streams, in_decode = any(p.streams for p in linears), any(p.stream_units[0] for p in linears)
            may_stream = problem.staging_slots and (problem.hardware.streams_in_decode or not in_decode)
            if problem.bounds.allow(linears, kv) and (may_stream or not streams):
                yield Candidate(problem, label, linears, kv)

    def _once(self, workload: Workload, label: str, place: Callable[[Workload], Placements]) -> Placements:
        key = label, id(workload.linears), *map(workload.layer_tokens, workload.kv)
        if key not in self._made:
            self._made[key] = workload, place(workload)
        return self._made[key][1]


def fastest_first(found: Iterable[Candidate]) -> list[Candidate]:
    """Candidates by judged seconds; among equals those of a column shape, then of a small chunk."""
    return sorted(found, key=judged_key)


def judged_key(candidate: Candidate) -> tuple[float, bool, int]:
    """By what candidates are put in order."""
    workload = candidate.problem.workload
    return candidate.judged_s, is_paired(workload), workload.prefill_chunk
