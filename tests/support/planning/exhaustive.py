"""Every placement of a small workload, one by one: what searches are compared with."""

import itertools

from placement import KvPlacement, LinearPlacement
from placement.plan.memory import memory_report
from placement.plan.workload import NUM_ROW_TIERS, row_tier


def every_placement(workload, calls, slots):
    """(linears, kv, bytes of GPU memory) of every way to place a workload, with every cut in the row tiers of `calls`.

    slots: of the staging ring, where anything streams.
    """
    layer_tiers = sorted({weighted.call.tier for weighted in calls})
    head_tiers = sorted({row_tier(weighted.call.logits_rows) for weighted in calls if weighted.with_head})
    options = []
    for shard in workload.linears:
        tiers = head_tiers if shard.is_head else layer_tiers
        options.append(
            [
                _cut(shard, gpu, dict(zip(tiers, streams, strict=True)))
                for gpu in range(shard.units + 1)
                for streams in itertools.product(range(shard.units - gpu + 1), repeat=len(tiers))
            ]
        )
    for kv in itertools.product(*(kv_choices(workload, shard) for shard in workload.kv)):
        for linears in itertools.product(*options):
            ring = slots if any(placement.streams for placement in linears) else 0
            report = memory_report(workload, linears, kv, device="emulated", staging_slots=ring)
            yield linears, kv, report.gpu_bytes


def _cut(shard, gpu, streams):
    return LinearPlacement(shard.name, gpu, tuple(streams.get(tier, 0) for tier in range(NUM_ROW_TIERS)), shard.units)


def kv_choices(workload, shard):
    """Who owns the KV heads of a cache, and how many slots they keep."""
    page = workload.page_size
    tokens = range(workload.min_gpu_tokens, workload.full_tokens + page, page)
    yield KvPlacement(shard.name, 0, 0, shard.kv_heads)
    for groups, kept in itertools.product(range(1, shard.kv_heads + 1), tokens):
        yield KvPlacement(shard.name, groups, kept, shard.kv_heads)
