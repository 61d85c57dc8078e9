"""The search for the fastest placement: a few exact programs, one for every shape and KV size, compared by the cost model.

Small models are solved layer by layer. Larger ones are solved by classes of equal layers, once spread over all of them and
once for each likely number of leading layers held whole (placement.layer_classes); the remaining row tiers follow with the
homes fixed. Every answer is rounded to whole units, never beyond a budget.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from placement.constraints import Bounds
from placement.formulation import Budgets, Formulation, Homes, Totals, WeightedCall, gpu_tokens_of
from placement.hardware import HardwareProfile
from placement.layer_classes import LayerClass, layer_classes, layer_families, single_layers, spread_total
from placement.memory import KvPlacement, LinearPlacement, staging_piece_units, staging_slot_bytes
from placement.objective import objective_s, reference_batch, reference_calls, reference_context, tier_call
from placement.workload import NUM_ROW_TIERS, Workload, round_up

# Up to this many linears every layer is a class of its own.
MAX_SINGLE_LINEARS = 16
# From this many units on, one unit a layer is small enough to give equal layers equal cuts.
MANY_UNITS = 64
NEARLY_ZERO = 1e-5


@dataclass(frozen=True, slots=True)
class Problem:
    """What is to be placed. slots: staging slots, 0 when nothing may stream; budgets: after everything of fixed size."""

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


@dataclass(frozen=True, slots=True)
class Candidate:
    """A complete placement, what distinguishes it, and the predicted seconds of the reference request."""

    label: str
    linears: tuple[LinearPlacement, ...]
    kv: tuple[KvPlacement, ...]
    seconds: float
    open_tiers: "_OpenTiers | None" = None


@dataclass(frozen=True, slots=True)
class _OpenTiers:
    """What `complete` needs to settle the remaining row tiers."""

    classes: tuple[LayerClass, ...]
    homes: Homes
    reach: dict[tuple[int, int, int], int]
    tokens: int


def fixed_candidate(problem: Problem, on_gpu: bool) -> Candidate | None:
    """The only placement that the bounds allow, or None when something is left to choose."""
    bounds = problem.bounds
    if not all(b.fixed for b in bounds.linears) or any(b.gpu_groups is None or b.gpu_tokens is None for b in bounds.kv):
        return None
    linears = tuple(LinearPlacement(s.name, b.gpu, b.stream, s.units)
                    for s, b in zip(problem.workload.linears, bounds.linears, strict=True))
    kv = tuple(KvPlacement(s.name, b.gpu_groups, b.gpu_tokens, s.groups)
               for s, b in zip(problem.workload.kv, bounds.kv, strict=True))
    seconds = objective_s(problem.workload, linears, kv, problem.hardware, problem.calls, on_gpu)
    return Candidate("as the rules say", linears, kv, seconds)


def candidates(problem: Problem) -> list[Candidate]:
    """Placements within the budgets, fastest first; empty when there is none."""
    found: list[Candidate] = []
    if len(problem.workload.linears) <= MAX_SINGLE_LINEARS:
        for tokens in _token_choices(problem):
            _try(found, problem, single_layers(problem.workload, problem.bounds), tokens, "layer by layer")
    else:
        spread = layer_classes(problem.workload, problem.bounds, 0.0)
        for tokens in _token_choices(problem):
            _try(found, problem, spread, tokens, "spread over all layers")
        if found:
            best = min(found, key=lambda c: c.seconds)
            tokens = max((k.gpu_tokens for k in best.kv), default=0) or problem.workload.min_gpu_tokens
            for share in _leading_shares(problem, best):
                classes = layer_classes(problem.workload, problem.bounds, share)
                _try(found, problem, classes, tokens, f"first {share:.0%} of the layers apart")
    return sorted(found, key=lambda c: c.seconds)


def least_bytes(problem: Problem, place: str, budgets: Budgets) -> float | None:
    """Fewest bytes at a place (gpu | pinned | host), beside everything of fixed size, that any placement needs."""
    classes = layer_classes(problem.workload, problem.bounds, 0.0)
    formulation = Formulation(problem.workload, problem.hardware, classes, problem.calls, problem.workload.min_gpu_tokens,
                              problem.slots, budgets)
    return formulation.solve_for_least(place)


def _token_choices(problem: Problem) -> list[int]:
    """KV slots worth trying for GPU-owned groups: as few as work, the reference contexts, everything."""
    workload = problem.workload
    if all(b.gpu_groups == 0 or b.gpu_tokens for b in problem.bounds.kv):
        return [workload.min_gpu_tokens]
    batch = reference_batch(workload, problem.objective)
    reference = round_up(reference_context(workload) + 1, workload.page_size) * batch
    choices = {workload.min_gpu_tokens, workload.full_tokens, min(max(reference, workload.min_gpu_tokens), workload.full_tokens)}
    return sorted(choices, reverse=True)


def _leading_shares(problem: Problem, spread: Candidate) -> list[float]:
    """Shares of leading layers for which all CPU work, or everything outside GPU memory, fits in the other layers."""
    layers = max((len(family) for family in layer_families(problem.workload, problem.bounds)), default=1)
    in_layers = [(s, p) for s, p in zip(problem.workload.linears, spread.linears, strict=True) if s.layer is not None]
    total = sum(s.total_bytes for s, _ in in_layers)
    on_cpu = sum(p.cut(0)[2] * s.unit_bytes for s, p in in_layers)
    in_dram = sum(p.dram_units * s.unit_bytes for s, p in in_layers)
    counts = {layers - int(-(-layers * part // total)) for part in (on_cpu, in_dram)}
    counts |= {count - 1 for count in counts} | {layers // 2}
    return [count / layers for count in sorted(counts) if 0 < count < layers]


def _try(found: list[Candidate], problem: Problem, classes: Sequence[LayerClass], tokens: int, label: str) -> None:
    solved = Formulation(problem.workload, problem.hardware, classes, problem.calls, tokens, problem.slots,
                         problem.budgets).solve()
    if solved is None:
        return
    gpu = _whole_homes(classes, solved)
    groups = {c: _floor(value) for c, value in solved.groups.items()}
    reach = _whole_reach(classes, gpu, solved, None)
    linears, kv = _linears(problem, classes, gpu, reach), _kv(problem, classes, groups, tokens)
    if any(known.linears == linears and known.kv == kv for known in found):
        return
    seconds = objective_s(problem.workload, linears, kv, problem.hardware, problem.calls, True)
    open_tiers = _OpenTiers(tuple(classes), Homes(gpu, groups, staging_slot_bytes(problem.workload.linears, linears)),
                            reach, tokens)
    found.append(Candidate(label, linears, kv, seconds, open_tiers))


def complete(problem: Problem, candidate: Candidate) -> Candidate:
    """Settle the row tiers that no reference call uses, homes and staging slots unchanged: the same seconds."""
    still = candidate.open_tiers
    if still is None:
        return candidate
    reach, slots = still.reach, problem.slots if still.homes.slot_bytes else 0
    for tier in range(NUM_ROW_TIERS):
        if any((*key, tier) not in reach for key in still.homes.gpu_units):
            solved = Formulation(problem.workload, problem.hardware, still.classes, [tier_call(problem.workload, tier)],
                                 still.tokens, slots, Budgets(float("inf")), still.homes).solve()
            assert solved is not None, f"no cut for tier {tier} with the homes of {candidate.label}"
            reach = _whole_reach(still.classes, still.homes.gpu_units, solved, still.homes.slot_bytes) | reach
    return replace(candidate, linears=_linears(problem, still.classes, still.homes.gpu_units, reach), open_tiers=None)


def _floor(value: float) -> int:
    return int(value + NEARLY_ZERO)


def _whole_homes(classes: Sequence[LayerClass], solved: Totals) -> dict[tuple[int, int], int]:
    """GPU units by (class, linear), whole. Equal layers get equal homes where units are small; what that leaves over goes
    to as few linears as possible, so that a plan reads as a few lines."""
    homes, spare, granted = {}, 0.0, []
    for (c, i), value in solved.gpu.items():
        count, linear = classes[c].count, classes[c].linears[i]
        step = count if linear.shard.units >= MANY_UNITS and linear.bounds.gpu is None else 1
        homes[c, i] = _floor(value / step) * step
        spare += (value - homes[c, i]) * linear.shard.unit_bytes
        if value - homes[c, i] > NEARLY_ZERO:
            granted.append((c, i))
    for c, i in granted:
        count, linear = classes[c].count, classes[c].linears[i]
        more = min(int(spare / linear.shard.unit_bytes), count * linear.shard.units - homes[c, i])
        homes[c, i] += more
        spare -= more * linear.shard.unit_bytes
    return homes


def _whole_reach(classes: Sequence[LayerClass], gpu: dict[tuple[int, int], int], solved: Totals,
                 slot_bytes: int | None) -> dict[tuple[int, int, int], int]:
    """Units that the GPU computes (home and streamed) by (class, linear, tier), whole, keeping widths that rules fix.

    slot_bytes: size of the staging slot that no streamed piece may exceed; None when it follows from the result.
    """
    reach = {}
    for (c, i, tier), stream in solved.stream.items():
        count, linear = classes[c].count, classes[c].linears[i]
        shard, home, bounds = linear.shard, gpu[c, i], linear.bounds
        total = count * shard.units
        left = total - solved.gpu[c, i] - stream
        step = count if shard.units >= MANY_UNITS else 1
        if bounds.cpu[tier] is not None:
            whole = total - count * bounds.cpu[tier]
        elif bounds.stream[tier] is not None or stream < 0.5:
            whole = home + count * (bounds.stream[tier] or 0)
        else:
            whole = total if left < 0.5 else total - round(left / step) * step
        if slot_bytes is not None and min(shard.units, staging_piece_units(shard)) * shard.unit_bytes > slot_bytes:
            whole = min(whole, home + count * (slot_bytes // shard.unit_bytes))
        reach[c, i, tier] = max(home, min(total, whole))
    return reach


def _linears(problem: Problem, classes: Sequence[LayerClass], gpu: dict[tuple[int, int], int],
             reach: dict[tuple[int, int, int], int]) -> tuple[LinearPlacement, ...]:
    """Spread class totals over layers. Tiers without a reach stream nothing."""
    placed: dict[int, LinearPlacement] = {}
    for (c, i), home in gpu.items():
        count, linear = classes[c].count, classes[c].linears[i]
        homes = spread_total(home, count)
        reaches = [spread_total(reach.get((c, i, tier), home), count) for tier in range(NUM_ROW_TIERS)]
        for position, index in enumerate(linear.indices):
            shard = problem.workload.linears[index]
            stream = tuple(tier[position] - homes[position] for tier in reaches)
            placed[index] = LinearPlacement(shard.name, homes[position], stream, shard.units)
    return tuple(placed[index] for index in range(len(problem.workload.linears)))


def _kv(problem: Problem, classes: Sequence[LayerClass], groups: dict[int, int], tokens: int) -> tuple[KvPlacement, ...]:
    placed: dict[int, KvPlacement] = {}
    for c, total in groups.items():
        kv = classes[c].kv
        kept = gpu_tokens_of(problem.workload, kv.shard, kv.bounds, tokens)
        for index, owned in zip(kv.indices, spread_total(total, classes[c].count), strict=True):
            shard = problem.workload.kv[index]
            placed[index] = KvPlacement(shard.name, owned, kept if owned else 0, shard.groups)
    return tuple(placed[index] for index in range(len(problem.workload.kv)))
