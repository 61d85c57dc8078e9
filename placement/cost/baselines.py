"""Placements that other systems use, in our terms: plans and published numbers compared under one model."""

from placement.plan.memory import KvPlacement, LinearPlacement
from placement.plan.shards import LinearShard
from placement.plan.workload import NUM_ROW_TIERS, Workload, row_tier

NO_STREAM = (0,) * NUM_ROW_TIERS
MANY_ROWS_TIER = row_tier(17)


def layer_split(
    workload: Workload, gpu_layers: int, head_on_gpu: bool = False, streams_prompts: bool = False
) -> tuple[tuple[LinearPlacement, ...], tuple[KvPlacement, ...]]:
    """Whole layers: the first `gpu_layers` and their KV cache on the GPU, the others on the CPU, nothing streamed; with
    `streams_prompts` the weights of the others are copied to the GPU for calls of more than 16 rows."""

    def on_gpu(layer: int | None) -> bool:
        return head_on_gpu if layer is None else layer < gpu_layers

    def placed(shard: LinearShard) -> LinearPlacement:
        if on_gpu(shard.layer):
            return LinearPlacement(shard.name, shard.units, NO_STREAM, shard.units)
        if not streams_prompts or shard.layer is None:
            return LinearPlacement(shard.name, 0, NO_STREAM, shard.units)
        tiers = (0,) * MANY_ROWS_TIER + (shard.units,) * (NUM_ROW_TIERS - MANY_ROWS_TIER)
        return LinearPlacement(shard.name, 0, tiers, shard.units)

    linears = tuple(map(placed, workload.linears))
    kv = tuple(
        KvPlacement(s.name, s.kv_heads, workload.layer_tokens(s), s.kv_heads)
        if on_gpu(s.layer)
        else KvPlacement(s.name, 0, 0, s.kv_heads)
        for s in workload.kv
    )
    return linears, kv


def largest_layer_split(workload: Workload, gpu_bytes: float) -> int:
    """Most leading layers whose weights and full KV cache fit in `gpu_bytes`."""
    weights = _cache_bytes(workload)
    for shard in workload.linears:
        if shard.layer is not None:
            weights[shard.layer] = weights.get(shard.layer, 0) + shard.total_bytes
    fits = 0
    for layer in sorted(weights):
        gpu_bytes -= weights[layer]
        if gpu_bytes < 0:
            break
        fits += 1
    return fits


def everything_bytes(workload: Workload) -> int:
    """What all weights and the full KV cache take."""
    return sum(_cache_bytes(workload).values()) + sum(shard.total_bytes for shard in workload.linears)


def _cache_bytes(workload: Workload) -> dict[int, int]:
    """The full KV cache by layer."""
    return {kv.layer: kv.kv_heads * kv.bytes_per_token * workload.layer_tokens(kv) for kv in workload.kv}


def everything_at_home(workload: Workload) -> tuple[tuple[LinearPlacement, ...], tuple[KvPlacement, ...]]:
    """Every weight and the KV cache on the GPU."""
    linears = tuple(LinearPlacement(s.name, s.units, NO_STREAM, s.units) for s in workload.linears)
    return linears, _cache_on_gpu(workload)


def stream_all(workload: Workload) -> tuple[tuple[LinearPlacement, ...], tuple[KvPlacement, ...]]:
    """Every weight copied to the GPU for every call, the KV cache on the GPU."""
    linears = tuple(LinearPlacement(s.name, 0, (s.units,) * NUM_ROW_TIERS, s.units) for s in workload.linears)
    return linears, _cache_on_gpu(workload)


def _cache_on_gpu(workload: Workload) -> tuple[KvPlacement, ...]:
    return tuple(KvPlacement(s.name, s.kv_heads, workload.layer_tokens(s), s.kv_heads) for s in workload.kv)
