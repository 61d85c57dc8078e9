"""A policy bound to a workload: for every shard, which widths are fixed and which are free."""

import difflib
import functools
import re
from collections.abc import Callable, Sequence
from fnmatch import translate

from placement.plan.shards import KvShard, LinearShard
from placement.plan.workload import NUM_ROW_TIERS, ROW_TIER_NAMES, Workload
from placement.policy.bounds import FREE, FREE_KV, Bounds, KvBounds, LinearBounds
from placement.policy.fields import Share
from placement.policy.policy import Policy
from placement.policy.problems import PolicyError
from placement.policy.rules import Rule

_RANGE = re.compile(r"layers\.(\d+)-(\d+)\.(.+)")
_LAYER = re.compile(r"layers\.(\d+)\.(.+)")


Conflicts = dict[tuple[str, str], list[str]]  # shards by where a rule stands and what of it they cannot meet


class _Conflict(ValueError):
    def __init__(self, path: tuple[str | int, ...], message: str) -> None:
        super().__init__(message)
        self.path = path


def bind(policy: Policy, workload: Workload, device: str) -> Bounds:
    """Resolve the rules of a policy for a workload and device (cpu | cuda | emulated).

    Raises PolicyError with every rule that matches nothing, is never reached, or cannot be met by some shard.
    """
    problems = _unmatched(policy, workload)
    linears, kv, reached = [], [], set()
    conflicts: Conflicts = {}
    linear_bounds = _once_for_like(_linear_bounds)
    for shard in workload.linears:
        index = _first(policy.rules, shard.name, lambda rule: rule.sets_linears)
        reached.add(index)
        free = _cpu_only(shard) if device == "cpu" else FREE
        linears.append(_collect(conflicts, policy, index, free, linear_bounds, shard, device))
    for cache in workload.kv:
        index = _first(policy.rules, cache.name, lambda rule: rule.kv is not None)
        reached.add(index)
        open_bounds = KvBounds(0, 0) if device == "cpu" else FREE_KV
        kv.append(_collect(conflicts, policy, index, open_bounds, _kv_bounds, cache, device, workload))
    problems += [f"{where}: {_some(names)} {what}" for (where, what), names in conflicts.items()]
    reached |= {_dtype_rule(policy, shard.name) for shard in workload.linears}
    for index, rule in enumerate(policy.rules):
        if _matches_any(rule.match, workload) and index not in reached:
            problems.append(
                f"{policy.where(('rules', index, 'match'))}: {rule.match!r} decides nothing: "
                f"{_why_idle(policy, index, workload)}"
            )
    if policy.shape == "paired" and not any(shard.row_cut for shard in workload.linears):
        problems.append(f"{policy.where(('shape',))}: paired {_why_not_paired(workload, device)}; give column or auto")
    if policy.staging_slots == 0:
        problems += [
            f"{policy.where(('staging_slots',))}: 0 lets nothing stream, a rule streams {shard.name}; give 2 or more"
            for shard, limits in zip(workload.linears, linears, strict=True)
            if any(limits.stream[tier] for tier in range(NUM_ROW_TIERS))
        ][:1]
    if problems:
        raise PolicyError(list(dict.fromkeys(problems)))
    return Bounds(tuple(linears), tuple(kv), policy.inserts)


def _why_not_paired(workload: Workload, device: str) -> str:
    if device == "cpu":
        return "saves hand-overs between a GPU and the CPU, and device cpu has none"
    if workload.elastic:
        return "cuts by rows, and an elastic plan moves columns"
    return f"cuts o and down where heads and neurons end, which {workload.model} cannot: a run of them splits a group"


@functools.lru_cache(maxsize=8192)  # the rules of a policy, times the shards of a deep model
def matches(pattern: str, name: str) -> bool:
    """Whether a shard name matches a glob or a range of layers such as `layers.0-15.qkv`."""
    span, layer = _RANGE.fullmatch(pattern), _LAYER.fullmatch(name)
    if span and layer:
        return int(span[1]) <= int(layer[1]) <= int(span[2]) and matches(span[3], layer[2])
    return re.fullmatch(translate(pattern), name) is not None


def dtype_by_rules(policy: Policy, name: str) -> str | None:
    """The weight format that the rules ask for a linear; None where they leave it open."""
    index = _dtype_rule(policy, name)
    return None if index is None else policy.rules[index].dtype


def _dtype_rule(policy: Policy, name: str) -> int | None:
    return _first(policy.rules, name, lambda rule: rule.dtype is not None)


def _first(rules: tuple[Rule, ...], name: str, concerns) -> int | None:
    if not rules:
        return None
    return next((i for i, rule in enumerate(rules) if concerns(rule) and matches(rule.match, name)), None)


def _matches_any(pattern: str, workload: Workload) -> bool:
    return any(matches(pattern, name) for name in workload.shard_names())


def _unmatched(policy: Policy, workload: Workload) -> list[str]:
    names = list(workload.shard_names())
    problems = []
    for index, rule in enumerate(policy.rules):
        span = _RANGE.fullmatch(rule.match)
        backwards = span is not None and int(span[1]) > int(span[2])
        beyond = span is not None and int(span[2]) >= workload.num_layers
        if not backwards and not beyond and _matches_any(rule.match, workload):
            continue
        where = policy.where(("rules", index, "match"))
        near = difflib.get_close_matches(rule.match, names, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near and not span else ""
        problems.append(
            f"{where}: {rule.match!r} matches no shard of {workload.model}{hint} (shards are embed, head and "
            f"layers.0-{workload.num_layers - 1}.{{{','.join((*workload.linear_kinds, *['kv'] * bool(workload.kv)))}}})"
        )
    return problems


def _why_idle(policy: Policy, index: int, workload: Workload) -> str:
    rule = policy.rules[index]
    if rule.match == "embed":
        return "the embedding is always in host memory, one row of it is read per token"
    for earlier, other in enumerate(policy.rules[:index]):
        if any(matches(rule.match, name) and matches(other.match, name) for name in workload.shard_names()):
            return f"rules[{earlier}] ({other.match!r}) comes first; put the narrower rule above it"
    return "it sets kv for linears or shares for a KV cache"


def _some(names: Sequence[str]) -> str:
    """The first of shards that a rule fails alike, and how many more there are."""
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _collect(conflicts: Conflicts, policy: Policy, index: int | None, free, resolve, *args):
    if index is None:
        return free
    try:
        return resolve(policy.rules[index], *args)
    except _Conflict as conflict:
        rule = policy.rules[index]
        where = policy.where(("rules", index, *conflict.path))
        conflicts.setdefault((where, f"(rule {rule.match!r}): {conflict}"), []).append(args[0].name)
        return free


def _once_for_like(
    resolve: Callable[[Rule, LinearShard, str], LinearBounds],
) -> Callable[[Rule, LinearShard, str], LinearBounds]:
    """`resolve`, asked once for all linears of a shape: a rule bounds those of many layers alike. What cannot be met is
    asked for every one, so that all are named."""
    known: dict[tuple[object, ...], LinearBounds] = {}

    def resolved(rule: Rule, shard: LinearShard, device: str) -> LinearBounds:
        key = id(rule), shard.shape
        if key not in known:
            known[key] = resolve(rule, shard, device)
        return known[key]

    return resolved


def _units(share: Share | None, shard: LinearShard, path: tuple[str | int, ...]) -> int | None:
    if share is None:
        return None
    if share.kind == "fraction":
        return round(share.value * shard.units)
    count = int(share.value)
    if share.kind == "features":
        if count % shard.unit_features:
            lower = count // shard.unit_features * shard.unit_features
            raise _Conflict(
                path,
                f"{count} features do not fall on a unit of {shard.unit_features}; the nearest are "
                f"{lower} and {lower + shard.unit_features}",
            )
        count //= shard.unit_features
    if count > shard.units:
        raise _Conflict(path, f"{share} is more than the {shard.units} units it has")
    return count


def _cpu_only(shard: LinearShard) -> LinearBounds:
    return LinearBounds(0, (0,) * NUM_ROW_TIERS, (shard.units,) * NUM_ROW_TIERS)


def _linear_bounds(rule: Rule, shard: LinearShard, device: str) -> LinearBounds:
    gpu, expert_slots = _units(rule.gpu, shard, ("gpu",)), _expert_slots(rule, shard, device)
    if expert_slots and gpu is None:
        gpu = 0
    for _ in range(2):
        # A tier may settle the home boundary, which then settles the tiers before it.
        streams, cpus = [], []
        for name in ROW_TIER_NAMES:
            gpu, stream, cpu = _tier_units(rule, name, shard, gpu)
            streams.append(stream)
            cpus.append(cpu)
    if expert_slots and expert_slots > shard.units - gpu:
        if rule.expert_slots != "all":
            message = f"{expert_slots} is more than the {shard.units - gpu} experts in DRAM; give that or fewer, or all"
            raise _Conflict(("expert_slots",), message)
        expert_slots = shard.units - gpu
    if device == "cpu":
        if gpu or any(streams):
            raise _Conflict((), "the rule asks for the gpu or stream lane, and device cpu has only the cpu lane")
        return _cpu_only(shard)
    return LinearBounds(gpu, tuple(streams), tuple(cpus), expert_slots)


def _expert_slots(rule: Rule, shard: LinearShard, device: str) -> int | None:
    """Expert slots that a rule asks for, at most as many as experts in DRAM; only experts have any."""
    path, wanted = ("expert_slots",), rule.expert_slots
    if not wanted:
        return wanted
    if not shard.picks:
        raise _Conflict(path, f"{wanted} expert slots of a linear that has no experts")
    if device == "cpu":
        raise _Conflict(path, "expert slots are in GPU memory, and device cpu has none")
    return shard.units if wanted == "all" else wanted


def _tier_units(
    rule: Rule, tier: str, shard: LinearShard, gpu: int | None
) -> tuple[int | None, int | None, int | None]:
    path: tuple[str | int, ...] = ("tiers", tier) if tier in rule.tiers else ()
    gpu_share, stream_share, cpu_share = rule.tier(tier)
    stream, cpu = _units(stream_share, shard, (*path, "stream")), _units(cpu_share, shard, (*path, "cpu"))
    fractions = all(s is not None and s.kind == "fraction" for s in (gpu_share, stream_share))
    if fractions and gpu is not None:
        # Boundaries are rounded, not widths, so that three rounded widths still add up.
        stream = round((gpu_share.value + stream_share.value) * shard.units) - gpu
        cpu = shard.units - gpu - stream if cpu_share is not None else cpu
    if gpu is None and stream is not None and cpu is not None:
        gpu = shard.units - stream - cpu
    if gpu is None and shard.units in (stream, cpu):
        gpu = 0
    if gpu is not None and stream is not None and cpu is None:
        cpu = shard.units - gpu - stream
    elif gpu is not None and cpu is not None and stream is None:
        stream = shard.units - gpu - cpu
    if gpu == shard.units:
        stream, cpu = (0 if stream is None else stream), (0 if cpu is None else cpu)
    total = (gpu or 0) + (stream or 0) + (cpu or 0)
    if (
        min(stream or 0, cpu or 0, gpu or 0) < 0
        or total > shard.units
        or (None not in (gpu, stream, cpu) and total != shard.units)
    ):
        raise _Conflict(
            path or ("match",),
            f"gpu {gpu}, stream {stream} and cpu {cpu} units do not make up its {shard.units} units in tier {tier}",
        )
    return gpu, stream, cpu


def _kv_bounds(rule: Rule, shard: KvShard, device: str, workload: Workload) -> KvBounds:
    kv_heads = shard.kv_heads if rule.kv.gpu_heads == "all" else rule.kv.gpu_heads
    every, fewest = workload.layer_tokens(shard), min(workload.min_gpu_tokens, workload.layer_tokens(shard))
    tokens = every if rule.kv.gpu_tokens == "all" else rule.kv.gpu_tokens
    if kv_heads is not None and kv_heads > shard.kv_heads:
        raise _Conflict(("kv", "gpu_heads"), f"{kv_heads} is more than its {shard.kv_heads} KV heads")
    if device == "cpu" and (kv_heads or tokens):
        raise _Conflict(("kv",), "the rule asks for KV cache in GPU memory, and device cpu has none")
    if kv_heads == 0 or tokens == 0 or device == "cpu":
        if kv_heads or tokens:
            raise _Conflict(
                ("kv",), f"gpu_heads {kv_heads} and gpu_tokens {tokens} contradict each other: both are 0 or none is"
            )
        return KvBounds(0, 0)
    if tokens is not None:
        if tokens < fewest:
            raise _Conflict(
                ("kv", "gpu_tokens"),
                f"{tokens} is below {fewest}, one prefill chunk and a page "
                "for every sequence; give at least that, or 0",
            )
        tokens = min(every, -(-tokens // workload.page_size) * workload.page_size)
    return KvBounds(kv_heads, tokens)
