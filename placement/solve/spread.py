"""From class totals back to layers: whole units, within every fixed width, nothing beyond the solution's memory.

Layers with CPU work come last in their class, so that the leading ones, held by the GPU alone, hand nothing over.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from placement.plan.memory import KvPlacement, LinearPlacement
from placement.plan.workload import NUM_ROW_TIERS, Workload
from placement.solve.classes import MANY_UNITS, LayerClass, LinearClass
from placement.solve.decisions import Totals, gpu_tokens_of
from placement.solve.pairing import homes_beside, pairs, streams_beside

NEARLY_ZERO = 1e-5

Key = tuple[int, int]
Streams = dict[tuple[int, int, int], tuple[int, ...]]
Whole = Callable[[float], int]


@dataclass(frozen=True, slots=True)
class Spread:
    """Units of every layer of a class.

    homes: by (class, linear); streams: by (class, linear, tier); kv_heads: KV heads of the GPU by class.
    """

    homes: dict[Key, tuple[int, ...]]
    streams: dict[tuple[int, int, int], tuple[int, ...]]
    kv_heads: dict[int, tuple[int, ...]]


def lay_out(classes: Sequence[LayerClass], solved: Totals, tier: int | None) -> Iterator[Spread]:
    """Whole units for every layer of a solution: with KV heads where their q, k and v are computed, which saves
    hand-overs, and where the solution has them, which it may have for longer prompts.

    tier: row tier for whose CPU work the homes leave room in as few layers as the solution says; None cuts all layers
    alike.
    """
    homes = _homes(classes, solved, tier)
    kv_heads = _kv_heads(classes, solved, tier is not None)
    for streamed in _streams_in_turn(classes, homes, solved, tier is not None):
        beside = {c: _beside_qkv(c, classes[c], homes, streamed, parts) for c, parts in kv_heads.items()}
        yield Spread(homes, streamed, beside)
        if beside != kv_heads:
            yield Spread(homes, streamed, kv_heads)


def _streams_in_turn(
    classes: Sequence[LayerClass], homes: dict[Key, tuple[int, ...]], solved: Totals, concentrated: bool
) -> Iterator[Streams]:
    """The streams of a solution rounded; of experts also rounded down, and without any in a decode step: their units
    are megabytes each, so that one more in every layer is much, and what they leave of the bus is the expert slots'."""
    yield streams(classes, homes, solved, concentrated)
    experts = {(c, i) for c, cls in enumerate(classes) for i, linear in enumerate(cls.linears) if _may_stay(linear)}
    if not experts:
        return
    fewer = streams(classes, homes, solved, concentrated, _ceil)
    yield fewer
    lowest = min(tier for *key, tier in fewer if tuple(key) in experts)
    yield fewer | {key: (0,) * len(units) for key, units in fewer.items() if key[:2] in experts and key[2] == lowest}


def _may_stay(linear: LinearClass) -> bool:
    """Whether these are experts whose streams no rule gives."""
    return bool(linear.shard.picks) and not any(width is not None for width in linear.bounds.stream + linear.bounds.cpu)


def placements(
    workload: Workload, classes: Sequence[LayerClass], spread: Spread, gpu_tokens: int
) -> tuple[tuple[LinearPlacement, ...], tuple[KvPlacement, ...]]:
    """Placements in workload order. Tiers without an entry stream nothing."""
    linears: dict[int, LinearPlacement] = {}
    for (c, i), homes in spread.homes.items():
        nothing = (0,) * len(homes)
        by_tier = [spread.streams.get((c, i, tier), nothing) for tier in range(NUM_ROW_TIERS)]
        expert_slots = classes[c].linears[i].bounds.expert_slots or 0
        for index, home, stream in zip(classes[c].linears[i].indices, homes, zip(*by_tier, strict=True), strict=True):
            shard = workload.linears[index]
            linears[index] = LinearPlacement(shard.name, home, stream, shard.units, expert_slots)
    kv: dict[int, KvPlacement] = {}
    for c, kv_heads in spread.kv_heads.items():
        kept = gpu_tokens_of(workload, classes[c].kv.shard, classes[c].kv.bounds, gpu_tokens)
        for index, owned in zip(classes[c].kv.indices, kv_heads, strict=True):
            cache = workload.kv[index]
            kv[index] = KvPlacement(cache.name, owned, kept if owned else 0, cache.kv_heads)
    return tuple(linears[i] for i in sorted(linears)), tuple(kv[i] for i in sorted(kv))


def streams(
    classes: Sequence[LayerClass],
    homes: dict[Key, tuple[int, ...]],
    solved: Totals,
    concentrated: bool,
    whole: Whole = round,
) -> Streams:
    """Streamed units of every layer by (class, linear, tier): what neither the homes nor the CPU take.

    whole: how the CPU's units become whole ones in every layer.
    """
    result = {}
    for (c, i, tier), stream in solved.stream.items():
        linear, home = classes[c].linears[i], homes[c, i]
        cpu = _cpu_units(
            linear,
            home,
            solved.gpu[c, i],
            stream,
            tier,
            _ceil(solved.cpu_layers[c, i, tier]) if concentrated else len(home),
            whole,
        )
        result[c, i, tier] = tuple(linear.shard.units - g - u for g, u in zip(home, cpu, strict=True))
    return streams_beside(classes, homes, result)


def _cpu_units(
    linear: LinearClass, home: tuple[int, ...], gpu: float, stream: float, tier: int, layers: int, whole: Whole
) -> list[int]:
    shard, bounds = linear.shard, linear.bounds
    room = [shard.units - units for units in home]
    if bounds.cpu[tier] is not None:
        return [bounds.cpu[tier]] * len(home)
    if bounds.stream[tier] is not None:
        return [units - bounds.stream[tier] for units in room]
    if stream < 0.5:
        return room
    left = len(home) * shard.units - gpu - stream
    return [0] * len(home) if left < 0.5 else _fill_from_back(left, room, layers, shard.units >= MANY_UNITS, whole)


def _fill_from_back(total: float, room: list[int], layers: int, equal: bool, whole: Whole) -> list[int]:
    """Spread a total evenly over the last `layers` places; what finds no room there goes to the others, last first."""
    layers = max(1, layers)
    amount = whole(total / layers) * layers if equal else whole(total)
    taken = [0] * (len(room) - layers) + _even(amount, layers)
    taken = [min(want, free) for want, free in zip(taken, room, strict=True)]
    missing = amount - sum(taken)
    for position in reversed(range(len(room))):
        more = min(missing, room[position] - taken[position])
        taken[position] += more
        missing -= more
    return taken


def _homes(classes: Sequence[LayerClass], solved: Totals, tier: int | None) -> dict[Key, tuple[int, ...]]:
    """Home units of every layer.

    Units are dealt in equal parts where they are many; what that leaves over goes to as few linears as possible, so
    that a plan reads as a few lines.
    """
    split, spare = {}, 0.0
    for key, value in solved.gpu.items():
        linear = classes[key[0]].linears[key[1]]
        split[key] = _front_and_back(classes[key[0]].count, linear, value, solved, key, tier)
        spare += (value - sum(sum(part) for part in split[key])) * linear.shard.unit_bytes
    for key, parts in split.items():
        linear = classes[key[0]].linears[key[1]]
        limit = _most_home(linear)
        paired = key[1] in {i for pair in pairs(classes[key[0]]) for i in pair}
        for part in reversed(parts) if linear.bounds.gpu is None and not paired else ():
            wanted = min(_floor(solved.gpu[key]) - sum(map(sum, parts)), int(spare / linear.shard.unit_bytes))
            for position, units in enumerate(part):
                more = min(wanted, limit - units, 1)
                part[position] += more
                wanted -= more
                spare -= more * linear.shard.unit_bytes
    return homes_beside(
        classes, {key: tuple(units for part in parts for units in part) for key, parts in split.items()}
    )


def _front_and_back(
    count: int, linear: LinearClass, value: float, solved: Totals, key: Key, tier: int | None
) -> tuple[list[int], list[int]]:
    if linear.bounds.gpu is not None:
        return [], [linear.bounds.gpu] * count
    back = _ceil(solved.cpu_layers.get((*key, tier), count))
    total, limit = _floor(value), _most_home(linear)
    front_total = min(total, (count - back) * limit)
    deal = _floor_even if linear.shard.units >= MANY_UNITS else _even
    return deal(front_total, count - back), deal(total - front_total, back)


def _most_home(linear: LinearClass) -> int:
    """Most home units that leave room for the widths that rules fix."""
    bounds = linear.bounds
    return linear.shard.units - max((s or 0) + (c or 0) for s, c in zip(bounds.stream, bounds.cpu, strict=True))


def _kv_heads(classes: Sequence[LayerClass], solved: Totals, concentrated: bool) -> dict[int, tuple[int, ...]]:
    result = {}
    for c, value in solved.kv_heads.items():
        count, shard, bounds = classes[c].count, classes[c].kv.shard, classes[c].kv.bounds
        if bounds.gpu_kv_heads is not None:
            result[c] = (bounds.gpu_kv_heads,) * count
            continue
        back = _ceil(solved.attending_layers[c]) if concentrated else count
        front = min(_floor(value), (count - back) * shard.kv_heads)
        result[c] = tuple(_even(front, count - back) + _even(_floor(value) - front, back))
    return result


def _beside_qkv(
    c: int,
    cls: LayerClass,
    homes: dict[Key, tuple[int, ...]],
    streamed: dict[tuple[int, int, int], tuple[int, ...]],
    kv_heads: tuple[int, ...],
) -> tuple[int, ...]:
    """The KV heads moved to where the GPU computes q, k and v in the lowest tier, if that takes no more memory."""
    for i, linear in enumerate(cls.linears):
        tiers = [tier for (other, index, tier) in streamed if (other, index) == (c, i)]
        if linear.shard.per_kv_head and cls.kv.bounds.gpu_kv_heads is None and tiers:
            computed = [g + s for g, s in zip(homes[c, i], streamed[c, i, min(tiers)], strict=True)]
            excess = sum(computed) - sum(kv_heads)
            if abs(excess) < len(kv_heads) and max(computed) <= cls.kv.shard.kv_heads:
                return tuple(_without(computed, max(0, excess)))
    return kv_heads


def _without(parts: list[int], excess: int) -> list[int]:
    """The parts less `excess` together, taken from the last ones."""
    for position in reversed(range(len(parts))):
        less = min(excess, parts[position])
        parts[position] -= less
        excess -= less
    return parts


def _even(total: int, count: int) -> list[int]:
    """`total` in `count` whole parts that differ by at most one, the larger first."""
    return [total // count + (i < total % count) for i in range(count)]


def _floor_even(total: int, count: int) -> list[int]:
    """Equal whole parts of at most `total` together."""
    return [total // max(1, count)] * count


def _floor(value: float) -> int:
    return int(value + NEARLY_ZERO)


def _ceil(value: float) -> int:
    return int(value - NEARLY_ZERO) + 1 if value > NEARLY_ZERO else 0
