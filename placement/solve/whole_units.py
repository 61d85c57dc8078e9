"""From a program's solution, in fractions and totals, to placements in whole units: laid out over the layers, tidied
where a share is not worth its hand-over, and filled up with cache; and with expert slots.

The program knows experts as units of which each step reads a share; it finds how much memory is left for them behind
what every token reads. Expert slots in the same memory serve more picks where experts stay warm, and need all experts
in DRAM. Prompts read nearly all of them, and gain nothing: the cost model decides.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from math import inf

from placement.cost.objective import tier_call
from placement.cost.terms import linear_cost
from placement.plan.memory import KvPlacement, LinearPlacement, staging_slot_bytes
from placement.plan.shards import LinearShard
from placement.plan.warm import by_equal_gain, expert_slots_as, with_expert_slots
from placement.plan.workload import NUM_ROW_TIERS, ROW_TIER_NAMES
from placement.policy.bounds import FREE, LinearBounds
from placement.solve.decisions import Budgets, Homes, Totals, gpu_tokens_of
from placement.solve.formulation import formulation
from placement.solve.pairing import is_paired
from placement.solve.problem import Candidate, Problem, fastest_first
from placement.solve.spread import Spread, lay_out, placements, streams

EIGHTHS = 8  # of the layers with experts, tried first as the number that streams to prompts
LAYER_PARTS = 8  # of one of them that streams in part
FINEST = 64  # steps of the search for that number, over all layers
SHARES = (1.0, 0.5)  # of the memory of experts at home that expert slots are tried in
MOST_TRIED_INSERTS = 4
MOST_OF_OTHERS = 6  # candidates with the number of copies that suits the fastest one
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


def in_expert_slots(candidate: Candidate, share: float) -> Candidate | None:
    """The candidate with expert slots in so much of the memory of experts at home, where neither is given by a rule;
    None where that is nothing, or does not fit."""
    problem = candidate.problem
    bounds = zip(problem.workload.linears, problem.bounds.linears, strict=True)
    at = [
        i for i, (shard, bound) in enumerate(bounds) if shard.picks and (bound.gpu, bound.expert_slots) == (None, None)
    ]
    linears = _exchanged(candidate, at, share) if at and candidate.on_gpu else None
    if linears is None:
        return None
    found = replace(candidate, linears=linears, label=f"{candidate.label}; {share:.0%} of experts in slots")
    return found if found.fits else None


def in_best_number(slotted: Sequence[Candidate]) -> Iterator[Candidate]:
    """The fastest of candidates with expert slots with the number of copies that suits it, where that is another one,
    and what then is best of them: what streams beside slots was chosen for the number before."""
    ranked = fastest_first(slotted)
    best = with_best_inserts(ranked[0]) if ranked else None
    if best is not None and best is not ranked[0]:
        inserts = best.problem.workload.inserts
        others = [replace(each, problem=each.problem.with_inserts(inserts)) for each in ranked[1:MOST_OF_OTHERS]]
        yield from (best, with_streams_in_few_layers(fastest_first([best, *others])[0]))


def with_best_inserts(candidate: Candidate) -> Candidate:
    """The candidate with as many copies of a layer's experts behind a step at most as are best, by one more or less for
    as long as that gains; itself where the policy says how many.

    More serve more picks where the bus has time for them; where it has not, fewer are there sooner.
    """
    if candidate.problem.bounds.inserts is not None:
        return candidate
    best = candidate
    for step in (1, -1):
        while 0 <= (inserts := best.problem.workload.inserts + step) <= MOST_TRIED_INSERTS:
            other = replace(best, problem=best.problem.with_inserts(inserts))
            if other.judged_s >= best.judged_s:
                break
            best = other
        if best is not candidate:
            break
    return best


def with_streams_in_few_layers(candidate: Candidate) -> Candidate:
    """The candidate with the experts of another number of layers streamed to prompts, those of one of them in part, and
    the CPU computing all others, the fastest that is found; itself where rules or a bus that streams nothing leave no
    choice.

    The program weighed that with experts at home, which serve prompts too; in slots they do not.
    """
    problem, linears = candidate.problem, candidate.linears
    lowest = min(weighted.call.tier for weighted in problem.calls)
    tiers = {weighted.call.tier for weighted in problem.calls if weighted.call.q_len > 1} - {lowest}
    bounds = zip(problem.workload.linears, problem.bounds.linears, strict=True)
    at = [i for i, (shard, bound) in enumerate(bounds) if shard.picks and bound == FREE]
    if not (tiers and at and problem.staging_slots):
        return candidate
    # What expert slots serve need not be streamed: where they are fewest it gains most.
    at.sort(key=lambda i: (linears[i].expert_slots, -linears[i].stream_units[max(tiers)]))
    most, step, tried = len(at) * LAYER_PARTS, -(-len(at) // EIGHTHS) * LAYER_PARTS, {}
    wanted = [*range(0, most, step), most]
    while step >= max(1, most // FINEST):
        tried |= {parts: _streaming(candidate, at, parts, tiers) for parts in wanted}
        best = min(tried, key=lambda parts: tried[parts].judged_s if tried[parts].fits else inf)
        step //= 2
        wanted = [parts for parts in (best - step, best + step) if 0 <= parts <= most and parts not in tried]
    return fastest_first([candidate, *(each for each in tried.values() if each.fits)])[0]


def _streaming(candidate: Candidate, at: Sequence[int], parts: int, tiers: Collection[int]) -> Candidate:
    """The candidate with so many parts of layers of what some linears have in DRAM streamed in these row tiers, the
    first linears' whole, and nothing of the last ones."""
    placed = list(candidate.linears)
    for place, i in enumerate(at):
        share = min(LAYER_PARTS, max(0, parts - place * LAYER_PARTS))
        width = placed[i].dram_units * share // LAYER_PARTS
        widths = [width if tier in tiers else old for tier, old in enumerate(placed[i].stream_units)]
        placed[i] = replace(placed[i], stream_units=tuple(widths))
    return with_linears(candidate, tuple(placed))


def _spread_of(candidate: Candidate, spread: Spread) -> Spread:
    """How the linears of a candidate lie, in the row tiers that a spread has."""
    classes, placed = candidate.problem.classes, candidate.linears
    at = {(c, i): classes[c].linears[i].indices for c, i in spread.homes}
    homes = {key: tuple(placed[index].gpu_units for index in indices) for key, indices in at.items()}
    streamed = {
        (c, i, tier): tuple(placed[index].stream_units[tier] for index in at[c, i]) for c, i, tier in spread.streams
    }
    return replace(spread, homes=homes, streams=streamed)


def _exchanged(candidate: Candidate, at: Sequence[int], share: float) -> tuple[LinearPlacement, ...] | None:
    """Its linears with expert slots in so much of the memory of those experts at home, and in what is left over."""
    workload, linears, budget = candidate.problem.workload, candidate.linears, candidate.problem.budgets.gpu
    homes = {i: int(linears[i].gpu_units * (1 - share)) for i in at}
    given = sum((linears[i].gpu_units - homes[i]) * workload.linears[i].unit_bytes for i in at)
    left = budget - candidate.used_bytes["gpu"]
    tables = sum(8 * linears[i].units for i in at)
    size_bytes = given + (0 if left == inf else int(left)) - tables
    placed = list(linears)
    for i in at:
        placed[i] = with_expert_slots(linears[i], homes[i], 0)
    counts = by_equal_gain(workload, placed, at, max(0, size_bytes))
    if not any(counts.values()):
        return None
    for i, count in counts.items():
        placed[i] = replace(placed[i], expert_slots=count)
    return tuple(placed)
