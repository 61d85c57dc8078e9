"""From a program's solution, in fractions and totals, to placements in whole units: laid out over the layers, tidied
where a share is not worth its hand-over, and filled up with cache.
"""

from collections.abc import Iterator
from dataclasses import replace
from math import inf

from placement.cost.objective import tier_call
from placement.cost.terms import linear_cost
from placement.plan.memory import KvPlacement, LinearPlacement, staging_slot_bytes
from placement.plan.shards import KvShard, LinearShard
from placement.plan.warm import expert_slots_as
from placement.plan.workload import NUM_ROW_TIERS, ROW_TIER_NAMES
from placement.policy.bounds import KvBounds, LinearBounds
from placement.solve.decisions import Budgets, Homes, Totals, gpu_tokens_of
from placement.solve.formulation import formulation
from placement.solve.pairing import is_paired
from placement.solve.problem import Candidate, Problem
from placement.solve.spread import Spread, lay_out, placements, streams

WORTH_A_SHARE = 0.999  # of the seconds without it: a share of the CPU that takes less time than its hand-over


def laid_out(problem: Problem, solved: Totals) -> Iterator[Candidate]:
    """A solution in whole units, with the CPU's work in few whole layers, as is best for each row tier, and in all."""
    classes, tokens, seen = problem.classes, solved.gpu_tokens, []
    tiers = (*sorted({weighted.call.tier for weighted in problem.calls}), None)
    for tier, spread in [(each, spread) for each in tiers for spread in lay_out(classes, solved, each)]:
        linears, kv = placements(problem.workload, classes, spread, tokens)
        if (linears, kv) not in seen:
            seen.append((linears, kv))
            label = f"{_shape_words(tier)}; {tokens} KV tokens in GPU memory"
            yield _tidied(Candidate(problem, label, linears, kv, spread, tier is not None, tokens))


def _tidied(candidate: Candidate) -> Candidate:
    """The candidate without shares of the CPU that are not worth their hand-over; itself where the bus, which would
    carry them, is what a pass waits for."""
    linears = _worth_handing_over(candidate.problem, candidate.linears, candidate.kv)
    if linears == candidate.linears:
        return candidate
    tidy = with_linears(candidate, linears)
    return candidate if candidate.fits and candidate.seconds < WORTH_A_SHARE * tidy.seconds else tidy


def with_linears(candidate: Candidate, linears: tuple[LinearPlacement, ...]) -> Candidate:
    """The candidate with other widths, which are what its search has found from then on."""
    found = replace(candidate, linears=linears)
    return found if candidate.spread is None else replace(found, spread=_spread_of(found, candidate.spread))


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


def filled_up(candidate: Candidate) -> Candidate:
    """The candidate with the memory that it leaves given to the cache, as far as that makes nothing slower."""
    room = free_tokens(candidate)
    filled = with_tokens(candidate, candidate.problem, candidate.gpu_tokens + room) if room > 0 else candidate
    return filled if filled.seconds <= candidate.seconds else candidate


def free_tokens(candidate: Candidate) -> int:
    """Whole pages of KV slots for which the GPU budget has room, below 0 where it is exceeded; 0 where the rules say
    how many there are."""
    problem, workload = candidate.problem, candidate.problem.workload
    token_bytes = sum(
        placement.gpu_kv_heads * shard.bytes_per_token
        for shard, placement, bound in zip(workload.kv, candidate.kv, problem.bounds.kv, strict=True)
        if not bound.gpu_tokens
    )
    room = problem.budgets.gpu - candidate.used_bytes["gpu"]
    if not token_bytes or room == inf:
        return 0
    return int(room // token_bytes) // workload.page_size * workload.page_size


def with_tokens(candidate: Candidate, problem: Problem, tokens: int) -> Candidate:
    """The same linears under a problem that differs in chunk and budget at most, with another number of KV slots for
    GPU-owned KV heads, as far as there can be so many."""
    workload = problem.workload
    tokens = max(workload.min_gpu_tokens, min(workload.full_tokens, tokens))
    kept: dict[tuple[int, int | None], int] = {}  # by what a layer's slots depend on

    def placed(placement: KvPlacement, shard: KvShard, bound: KvBounds) -> KvPlacement:
        if not placement.gpu_kv_heads:
            return placement
        key = shard.window, bound.gpu_tokens
        if key not in kept:
            kept[key] = gpu_tokens_of(workload, shard, bound, tokens)
        return KvPlacement(placement.name, placement.gpu_kv_heads, kept[key], placement.kv_heads)

    kv = tuple(map(placed, candidate.kv, workload.kv, problem.bounds.kv))
    return replace(
        candidate,
        problem=problem,
        kv=kv,
        gpu_tokens=tokens,
        label=candidate.label.replace(f"{candidate.gpu_tokens} KV", f"{tokens} KV"),
    )


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
            solved = formulation(
                problem, [tier_call(problem.workload, tier)], candidate.gpu_tokens, homes, Budgets(inf)
            ).solve()
            assert solved is not None, f"no cut for tier {tier} with the homes of {candidate.label}"
            settled = streams(problem.classes, spread.homes, solved, candidate.concentrated) | settled
    linears, _ = placements(problem.workload, problem.classes, replace(spread, streams=settled), candidate.gpu_tokens)
    linears = _worth_handing_over(problem, linears, candidate.kv)
    linears = _with_streams_of(problem, spread, linears)
    return replace(candidate, linears=expert_slots_as(candidate.linears, linears))


def _with_streams_of(
    problem: Problem, spread: Spread, linears: tuple[LinearPlacement, ...]
) -> tuple[LinearPlacement, ...]:
    """The linears with what a spread streams in the row tiers that it has."""
    widths = [list(placement.stream_units) for placement in linears]
    for (c, i, tier), streamed in spread.streams.items():
        for index, units in zip(problem.classes[c].linears[i].indices, streamed, strict=True):
            widths[index][tier] = units
    return tuple(replace(p, stream_units=tuple(units)) for p, units in zip(linears, widths, strict=True))


def _spread_of(candidate: Candidate, spread: Spread) -> Spread:
    """How the linears of a candidate lie, in the row tiers that a spread has."""
    classes, placed = candidate.problem.classes, candidate.linears
    at = {(c, i): classes[c].linears[i].indices for c, i in spread.homes}
    homes = {key: tuple(placed[index].gpu_units for index in indices) for key, indices in at.items()}
    streamed = {
        (c, i, tier): tuple(placed[index].stream_units[tier] for index in at[c, i]) for c, i, tier in spread.streams
    }
    return replace(spread, homes=homes, streams=streamed)
