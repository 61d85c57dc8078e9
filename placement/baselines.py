"""Placements that other systems use, in our terms: plans and published numbers compared under one model."""

from collections.abc import Sequence
from dataclasses import replace

from placement.memory import KvPlacement, LinearPlacement
from placement.workload import NUM_ROW_TIERS, LinearShard, Workload

UNIT_FIELDS = ("unit_bytes", "unit_features", "flops_per_row_per_unit")
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


def paired(workload: Workload, linears: Sequence[LinearPlacement]) -> tuple[Workload, tuple[LinearPlacement, ...]]:
    """The same placement with o and down cut by rows beside the heads and neurons of qkv and gate_up.

    Each side keeps the fraction of the linear before; what a row cut has in DRAM streams together or not at all, so the
    greater part decides. Memory stays about what it was.
    """
    before: dict[int | None, tuple[LinearShard, LinearPlacement]] = {}
    shards, placements = [], []
    for shard, placement in zip(workload.linears, linears, strict=True):
        if shard.kind in ("qkv", "gate_up"):
            before[shard.layer] = shard, placement
        if shard.kind in ("o", "down") and not shard.row_cut:
            shard, placement = _beside(*before[shard.layer], shard, placement.name)
        shards.append(shard)
        placements.append(placement)
    return replace(workload, linears=tuple(shards)), tuple(placements)


def _beside(
    first: LinearShard, cut: LinearPlacement, shard: LinearShard, name: str
) -> tuple[LinearShard, LinearPlacement]:
    """A linear in as many units as the one before it, and cut where that is."""
    units = first.units
    sizes = {field: -(-getattr(shard, field) * shard.units // units) for field in UNIT_FIELDS}
    home, left = cut.gpu_units, cut.units - cut.gpu_units
    streams = tuple(left if 2 * stream > left else 0 for stream in cut.stream_units)
    return replace(shard, units=units, row_cut=True, **sizes), LinearPlacement(name, home, streams, units)
