"""The search for the fastest placement: an exact program for every KV size worth trying, laid out in whole units.

Every candidate is judged by the cost model itself, so the prediction that a plan prints is the number that chose it.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from placement.cost.baselines import NO_STREAM, largest_layer_split, layer_split, stream_all
from placement.cost.objective import (
    judged_s,
    layers_objective_s,
    reference_batch,
    reference_calls,
    reference_context,
    tier_call,
)
from placement.cost.terms import WeightedCall, linear_cost, step_s
from placement.machine.hardware import HardwareProfile
from placement.plan.memory import PLACES, KvPlacement, LinearPlacement, is_all_on_gpu, staging_slot_bytes
from placement.plan.placed import PlacedLayer, placed_bytes, placed_layers, placed_slot_bytes
from placement.plan.workload import NUM_ROW_TIERS, ROW_TIER_NAMES, LinearShard, Workload, round_up
from placement.policy.bind import Bounds, LinearBounds
from placement.solve.classes import LayerClass, layer_classes, single_layers
from placement.solve.decisions import Budgets, Homes, Totals, gpu_tokens_of
from placement.solve.formulation import Formulation
from placement.solve.pairing import is_paired
from placement.solve.spread import Spread, lay_out, placements, streams
from placement.solve.unknowns import Unknowns

# Up to this many linears every layer is a class of its own.
MAX_SINGLE_LINEARS = 20
# Placements that are tried with every prefill chunk, the fastest first.
MOST_TRANSFERRED = 4
# A program that cannot get this much below the best placement found is not solved: its costs hold tie-breaks, and the
# solver stops at a gap.
PROGRAM_NOISE = 5e-4


@dataclass(frozen=True)
class Problem:
    """What is to be placed. staging_slots: 0 when nothing may stream."""

    workload: Workload
    hardware: HardwareProfile
    bounds: Bounds
    objective: str
    staging_slots: int
    budgets: Budgets

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
    def once_s(self) -> float:
        """Seconds of the reference requests that no placement changes and no program counts."""
        return sum(
            weighted.weight * step_s(self.workload, weighted.call, self.hardware, True, weighted.with_head)
            for weighted in self.calls
        )

    def formulation(
        self, calls: list[WeightedCall], tokens: int | None, homes: Homes | None = None, budgets: Budgets | None = None
    ) -> Formulation:
        """The program for some passes and a number of KV slots; budgets are the problem's own unless given."""
        staging_slots = self.staging_slots if homes is None or homes.staging_slot_bytes else 0
        return Formulation(
            Unknowns(
                self.workload, self.hardware, self.classes, calls, tokens, staging_slots, budgets or self.budgets, homes
            )
        )

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
        return layers_objective_s(problem.workload, self.layers, problem.hardware, problem.calls, self.on_gpu)

    @cached_property
    def judged_s(self) -> float:
        """The seconds by which it is compared with others."""
        return judged_s(self.seconds, is_all_on_gpu(self.problem.workload, self.linears, self.kv))

    @cached_property
    def used_bytes(self) -> dict[str, int]:
        """Bytes by place that it allocates, everything of fixed size left out; host includes pinned."""
        workload, layers = self.problem.workload, self.layers
        used = {place: placed_bytes(workload, layers, place) for place in PLACES}
        used["gpu"] += self.problem.staging_slots * placed_slot_bytes(workload, layers)
        used["host"] += used["pinned"]
        return used

    @property
    def fits(self) -> bool:
        """Whether it keeps every budget."""
        limits = {place: getattr(self.problem.budgets, place) for place in PLACES}
        return all(limit is None or self.used_bytes[place] <= limit for place, limit in limits.items())


def fixed_candidate(problem: Problem, on_gpu: bool) -> Candidate | None:
    """The only placement that the bounds allow, or None when something is left to choose."""
    bounds = problem.bounds
    if not all(b.fixed for b in bounds.linears) or any(
        b.gpu_kv_heads is None or b.gpu_tokens is None for b in bounds.kv
    ):
        return None
    linears = tuple(
        LinearPlacement(s.name, b.gpu, b.stream, s.units)
        for s, b in zip(problem.workload.linears, bounds.linears, strict=True)
    )
    kv = tuple(
        KvPlacement(s.name, b.gpu_kv_heads, b.gpu_tokens, s.kv_heads)
        for s, b in zip(problem.workload.kv, bounds.kv, strict=True)
    )
    return Candidate(problem, "as the rules say", linears, kv, on_gpu=on_gpu)


def candidates(problems: Sequence[Problem]) -> list[Candidate]:
    """Placements within the budgets, fastest first; empty when there is none. Only reference tiers are settled.

    problems: the same model cut or called otherwise; the fastest placement of any of them wins. Should rounding have
    pushed every one over a budget, they are returned all the same, for their bytes to be reported.
    """
    fitting = [known for problem in problems for known in known_placements(problem) if known.fits]
    too_large: list[Candidate] = []
    best_s = min((candidate.judged_s for candidate in fitting), default=float("inf"))
    for least_s, _, problem, tokens in _programs(problems):
        # Everything in GPU memory is among those known already; whatever else a program finds is judged as such.
        if judged_s(least_s, False) * (1 - PROGRAM_NOISE) >= best_s:
            break
        solved = problem.formulation(problem.calls, tokens).solve()
        for candidate in _laid_out(problem, solved) if solved else ():
            if candidate.fits:
                fitting.append(_filled(candidate))
                best_s = min(best_s, fitting[-1].judged_s)
            else:
                too_large.append(candidate)
    fitting += _with_other_chunks(problems, fitting)
    return fastest_first(fitting or too_large)


def _with_other_chunks(problems: Sequence[Problem], fitting: Sequence[Candidate]) -> Iterator[Candidate]:
    """The fastest placements that were searched for, called with every other prefill chunk.

    Whole units lose less of one program's solution than of another's: what was found for one chunk may be better than
    what was found for the chunk that suits it.
    """
    searched = [candidate for candidate in fastest_first(fitting) if candidate.spread is not None]
    for candidate in searched[:MOST_TRANSFERRED]:
        found_for = candidate.problem
        for problem in problems:
            is_other = problem.workload.prefill_chunk != found_for.workload.prefill_chunk
            if (
                is_other
                and problem.workload.linears == found_for.workload.linears
                and _tiers(problem) == _tiers(found_for)
            ):
                other = replace(found_for, workload=problem.workload, budgets=problem.budgets)
                moved = _with_tokens(candidate, other, candidate.gpu_tokens)
                moved = _with_tokens(moved, other, moved.gpu_tokens + _free_slots(moved))
                if moved.fits and not any(_is_same(moved, known) for known in fitting):
                    yield moved


def _is_same(one: Candidate, other: Candidate) -> bool:
    """Whether two candidates are one placement with one prefill chunk."""
    chunks = (candidate.problem.workload.prefill_chunk for candidate in (one, other))
    return (one.linears, one.kv, next(chunks)) == (other.linears, other.kv, next(chunks))


def _tiers(problem: Problem) -> set[int]:
    """Row tiers of the reference passes."""
    return {weighted.call.tier for weighted in problem.calls}


def fastest_first(found: Iterable[Candidate]) -> list[Candidate]:
    """Candidates by judged seconds; among equals those of a column shape, then of a small chunk."""

    def key(candidate: Candidate) -> tuple[float, bool, int]:
        workload = candidate.problem.workload
        return candidate.judged_s, is_paired(workload), workload.prefill_chunk

    return sorted(found, key=key)


def _programs(problems: Sequence[Problem]) -> list[tuple[float, int, Problem, int | None]]:
    """Every program worth solving: the seconds below which it cannot get, its place in the list, the problem, and the
    KV slots of GPU-owned KV heads, None where the program decides them. The most promising first."""
    found = []
    for problem in problems:
        for variant, tokens in _variants(problem):
            least_s = variant.formulation(variant.calls, tokens).least_s()
            if least_s is not None:
                found.append((least_s + variant.once_s, len(found), variant, tokens))
    return sorted(found, key=lambda entry: entry[:2])


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


def _laid_out(problem: Problem, solved: Totals) -> Iterator[Candidate]:
    """A solution in whole units, with the CPU's work in few whole layers, as is best for each row tier, and in all."""
    classes, tokens, seen = problem.classes, solved.gpu_tokens, []
    for tier in (*sorted({weighted.call.tier for weighted in problem.calls}), None):
        spread = lay_out(classes, solved, tier)
        linears, kv = placements(problem.workload, classes, spread, tokens)
        linears = _worth_handing_over(problem, linears, kv)
        if (linears, kv) not in seen:
            seen.append((linears, kv))
            label = f"{_shape_words(tier)}; {tokens} KV tokens in GPU memory"
            yield Candidate(problem, label, linears, kv, spread, tier is not None, tokens)


def _worth_handing_over(
    problem: Problem, linears: tuple[LinearPlacement, ...], kv: tuple[KvPlacement, ...]
) -> tuple[LinearPlacement, ...]:
    """The linears with every share of the CPU streamed that takes less time than its hand-over, where the linear
    streams in some row tier and no rule says otherwise. Whole numbers leave such shares, and each stalls both lanes.

    A paired block has one hand-over for two linears, and qkv may be cut beside the owners of the cache: both stay.
    """
    workload, hardware = problem.workload, problem.hardware
    attends = {
        shard.layer: placement.gpu_kv_heads < placement.kv_heads
        for shard, placement in zip(workload.kv, kv, strict=True)
    }
    paired, handover_units = is_paired(workload), {}

    def smallest(shard: LinearShard, tier: int) -> float:
        if (shard.shape, tier) not in handover_units:
            call = tier_call(workload, tier).call
            rows = call.sequences if shard.is_head else call.rows
            cost = linear_cost(shard, rows, workload.format_of(shard), hardware, True)
            handover_units[shard.shape, tier] = cost.handover_s / cost.cpu_s_per_unit
        return handover_units[shard.shape, tier]

    def tidy(shard: LinearShard, placement: LinearPlacement, bound: LinearBounds) -> LinearPlacement:
        stays = shard.per_kv_head and attends.get(shard.layer, False) or paired and not shard.is_head
        if stays or not placement.streams:
            return placement
        streamed = tuple(
            placement.dram_units
            if (bound.stream[tier], bound.cpu[tier]) == (None, None) and placement.cut(tier)[2] < smallest(shard, tier)
            else units
            for tier, units in enumerate(placement.stream_units)
        )
        return placement if streamed == placement.stream_units else replace(placement, stream_units=streamed)

    return tuple(map(tidy, workload.linears, linears, problem.bounds.linears))


def _filled(candidate: Candidate) -> Candidate:
    """The candidate with the memory that it leaves given to the cache, as far as that makes nothing slower."""
    room = _free_slots(candidate)
    filled = _with_tokens(candidate, candidate.problem, candidate.gpu_tokens + room) if room > 0 else candidate
    return filled if filled.seconds <= candidate.seconds else candidate


def _free_slots(candidate: Candidate) -> int:
    """Whole pages of KV slots for which the GPU budget has room, below 0 where it is exceeded; 0 where the rules say
    how many there are."""
    problem, workload = candidate.problem, candidate.problem.workload
    token_bytes = sum(
        placement.gpu_kv_heads * shard.bytes_per_token
        for shard, placement, bound in zip(workload.kv, candidate.kv, problem.bounds.kv, strict=True)
        if not bound.gpu_tokens
    )
    room = problem.budgets.gpu - candidate.used_bytes["gpu"]
    if not token_bytes or room == float("inf"):
        return 0
    return int(room // token_bytes) // workload.page_size * workload.page_size


def _with_tokens(candidate: Candidate, problem: Problem, tokens: int) -> Candidate:
    """The same linears under a problem that differs in chunk and budget at most, with another number of KV slots for
    GPU-owned KV heads, as far as there can be so many."""
    workload = problem.workload
    tokens = max(workload.min_gpu_tokens, min(workload.full_tokens, tokens))
    kv = tuple(
        replace(placement, gpu_tokens=gpu_tokens_of(workload, shard, bound, tokens))
        if placement.gpu_kv_heads
        else placement
        for shard, placement, bound in zip(workload.kv, candidate.kv, problem.bounds.kv, strict=True)
    )
    return replace(
        candidate,
        problem=problem,
        kv=kv,
        gpu_tokens=tokens,
        label=candidate.label.replace(f"{candidate.gpu_tokens} KV", f"{tokens} KV"),
    )


def known_placements(problem: Problem) -> Iterator[Candidate]:
    """Placements that need no search, where the bounds and the machine allow them: what other systems do, and the
    simplest of all."""
    workload = problem.workload
    everything = (
        tuple(LinearPlacement(s.name, s.units, NO_STREAM, s.units) for s in workload.linears),
        tuple(KvPlacement(s.name, s.kv_heads, workload.layer_tokens(s), s.kv_heads) for s in workload.kv),
    )
    layers = largest_layer_split(workload, problem.budgets.gpu)
    for label, (linears, kv) in (
        ("everything in GPU memory", everything),
        ("every weight streamed", stream_all(workload)),
        (f"{layers} whole layers on the GPU", layer_split(workload, layers)),
        ("everything on the CPU", layer_split(workload, 0)),
    ):
        streams, in_decode = any(p.streams for p in linears), any(p.stream_units[0] for p in linears)
        may_stream = problem.staging_slots and (problem.hardware.streams_in_decode or not in_decode)
        if problem.bounds.allow(linears, kv) and (may_stream or not streams):
            yield Candidate(problem, label, linears, kv)


def _shape_words(tier: int | None) -> str:
    if tier is None:
        return "CPU work spread over all layers"
    rows = ROW_TIER_NAMES[tier]
    return f"CPU work in few whole layers, as is best for {rows} row{'' if rows == '1' else 's'}"


def complete(candidate: Candidate) -> Candidate:
    """Settle the row tiers that no reference call uses; homes and staging slots stay, and so do the seconds."""
    problem, spread = candidate.problem, candidate.spread
    if spread is None:
        return candidate
    homes = Homes(
        {key: sum(units) for key, units in spread.homes.items()},
        {c: sum(kv_heads) for c, kv_heads in spread.kv_heads.items()},
        frozenset((c, i) for (c, i, _), units in spread.streams.items() if any(units)),
        staging_slot_bytes(problem.workload, candidate.linears),
    )
    settled = spread.streams
    for tier in range(NUM_ROW_TIERS):
        if any((*key, tier) not in settled for key in spread.homes):
            solved = problem.formulation(
                [tier_call(problem.workload, tier)], candidate.gpu_tokens, homes, Budgets(float("inf"))
            ).solve()
            assert solved is not None, f"no cut for tier {tier} with the homes of {candidate.label}"
            settled = streams(problem.classes, spread.homes, solved, candidate.concentrated) | settled
    linears, _ = placements(problem.workload, problem.classes, replace(spread, streams=settled), candidate.gpu_tokens)
    return replace(candidate, linears=_worth_handing_over(problem, linears, candidate.kv))


def least_bytes(problem: Problem, place: str, budgets: Budgets) -> float | None:
    """Fewest bytes at a place (gpu | pinned | host), beside everything of fixed size, that any placement needs.

    Fewer KV slots on the GPU take less of its memory, but what does not fit in them takes DRAM.
    """
    choices = [problem.workload.min_gpu_tokens] if place == "gpu" else _token_choices(problem)
    found = (problem.formulation(problem.calls, tokens, budgets=budgets).solve_for_least(place) for tokens in choices)
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
