"""Placements that other systems use, in our terms: plans and published numbers compared under one model."""

from placement.plan.memory import KvPlacement, LinearPlacement
from placement.plan.workload import NUM_ROW_TIERS, Workload

NO_STREAM = (0,) * NUM_ROW_TIERS


def layer_split(
    workload: Workload, gpu_layers: int, head_on_gpu: bool = False
) -> tuple[tuple[LinearPlacement, ...], tuple[KvPlacement, ...]]:
    """Whole layers: the first `gpu_layers` and their KV cache on the GPU, the others on the CPU, nothing streamed."""

    def on_gpu(layer: int | None) -> bool:
        return head_on_gpu if layer is None else layer < gpu_layers

    linears = tuple(
        LinearPlacement(s.name, s.units if on_gpu(s.layer) else 0, NO_STREAM, s.units) for s in workload.linears
    )
    kv = tuple(
        KvPlacement(s.name, s.groups, workload.layer_tokens(s), s.groups)
        if on_gpu(s.layer)
        else KvPlacement(s.name, 0, 0, s.groups)
        for s in workload.kv
    )
    return linears, kv


def largest_layer_split(workload: Workload, gpu_bytes: int) -> int:
    """Most leading layers whose weights and full KV cache fit in `gpu_bytes`."""
    weights = {kv.layer: kv.groups * kv.bytes_per_token * workload.layer_tokens(kv) for kv in workload.kv}
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


def stream_all(workload: Workload) -> tuple[tuple[LinearPlacement, ...], tuple[KvPlacement, ...]]:
    """Every weight copied to the GPU for every call, the KV cache on the GPU."""
    linears = tuple(LinearPlacement(s.name, 0, (s.units,) * NUM_ROW_TIERS, s.units) for s in workload.linears)
    return linears, tuple(KvPlacement(s.name, s.groups, workload.layer_tokens(s), s.groups) for s in workload.kv)
