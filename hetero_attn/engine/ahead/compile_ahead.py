"""Compile the GPU kernels of a model in a thread of its own while its weights are read.

The operations are called on tensors without memory, which compiles what a launch with such dtypes, shapes and strides
would use. What is left for the first steps are variants of rare strides: they compile whatever they meet.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain

import torch

import gpu_kernels
from cpu_kernels.contract import ChunkKeys, Pages, Partial, Picks, Rotation, RowKeys
from cpu_kernels.formats import BLOCK_FEATURES, unit_bytes
from cpu_kernels.formats.pages import row_items
from gpu_kernels.device_ops import DeviceOps
from hetero_attn.cache.pages import TORCH_DTYPES
from hetero_attn.engine.ahead.warm_up import PROMPT_ROWS
from hetero_attn.ops.experts import activate
from hetero_attn.planning.settle import PlannedModel
from hetero_attn.spec.config import ModelConfig
from hetero_attn.spec.decoder.mlp import activation_op
from hetero_attn.spec.experts import ExpertsSpec
from hetero_attn.spec.weights import LinearSpec

MOST_BLOCKS = 1024  # of a linear: beyond, launches have the same shape
ADDED = ("o", "down")  # kinds of linears that add to the residual

Call = Callable[[], None]


@contextmanager
def compiling_beside(
    calls: Iterator[tuple[str, Call]], index: int, on_prepare: Callable[[str], None]
) -> Iterator[threading.Thread]:
    """Make the calls in a thread until all are made or the enclosed work fails; leaves when the thread has ended.

    on_prepare(name) is called in it before the calls of each name. A call that fails ends the thread: the model's first
    steps meet the same error where somebody can be told.
    """
    stopped = threading.Event()

    def compile_all() -> None:
        said = None
        try:
            with torch.cuda.device(index):
                for name, call in calls:
                    if stopped.is_set():
                        return
                    if name != said:
                        on_prepare(f"{name}, while weights are read")
                        said = name
                    call()
        except Exception:
            return

    thread = threading.Thread(target=compile_all, name="compile-gpu-kernels", daemon=True)
    thread.start()
    try:
        yield thread
    except BaseException:
        stopped.set()
        raise
    finally:
        thread.join()


def kernel_calls(planned: PlannedModel) -> Iterator[tuple[str, Call]]:
    """Calls of the operations of a planned model by what they are for, rows of decode first."""
    plan, limits = planned.plan, planned.hardware.int8_rows
    ops = DeviceOps("meta", limits)
    wanted = {1, *PROMPT_ROWS, *(rows + 1 for rows in limits.values())}
    for rows in sorted(count for count in wanted if count <= max(1, plan.prefill_chunk)):
        name = f"GPU kernels for {rows} row{'s' if rows > 1 else ''}"
        calls = _linears(planned, ops, rows), _experts(planned, rows), _small(planned, ops, rows)
        for call in (*chain.from_iterable(calls), *_attention(planned, rows)):
            yield name, call


def _linears(planned: PlannedModel, ops: DeviceOps, rows: int) -> Iterator[Call]:
    seen: set[tuple] = set()
    placements = {placement.name: placement for placement in planned.plan.linears}
    for spec in planned.model.linears:
        placement = placements[spec.name]
        if isinstance(spec, ExpertsSpec):
            continue
        for units in {placement.gpu_units, max(placement.stream_units)} - {0}:
            blocks = min(MOST_BLOCKS, units * spec.unit_rows) if spec.row_unit == 0 else MOST_BLOCKS
            key = (spec.format, spec.in_features, blocks, spec.has_bias, spec.kind in ADDED)
            if key not in seen:
                seen.add(key)
                yield _linear(ops, spec, blocks, rows)


def _linear(ops: DeviceOps, spec: LinearSpec, blocks: int, rows: int) -> Call:
    weight = _meta(blocks, unit_bytes(spec.format, spec.in_features), dtype=torch.uint8)
    out = _meta(rows, blocks * spec.row_features)
    bias = _meta(out.shape[1]) if spec.has_bias else None
    return partial(ops.linear, _meta(rows, spec.in_features), weight, spec.format, bias, out, spec.kind in ADDED)


def _experts(planned: PlannedModel, rows: int) -> Iterator[Call]:
    """Both products of the experts that the GPU computes, of as many as it keeps or streams, once for each shape."""
    placements = {placement.name: placement for placement in planned.plan.linears}
    seen: set[tuple] = set()
    for spec in planned.model.linears:
        if not isinstance(spec, ExpertsSpec):
            continue
        placement = placements[spec.name]
        for units in {placement.gpu_units, max(placement.stream_units), placement.expert_slots} - {0}:
            known = spec.experts + placement.expert_slots
            key = (*(linear.format for linear in spec.first), spec.in_features, spec.width, units, known)
            if key not in seen:
                seen.add(key)
                yield from _of_experts(spec, units, known, rows)


def _of_experts(spec: ExpertsSpec, units: int, known: int, rows: int) -> Iterator[Call]:
    """known: experts and expert slots that the routes tell apart."""
    picks, memory = rows * spec.per_row, _meta(units, spec.unit_bytes, dtype=torch.uint8)
    starts, sources = _meta(known + 1, dtype=torch.int32), _meta(picks, dtype=torch.int32)
    gate_up, down = spec.first
    parts = memory[:, : spec.gate_up_bytes], memory[:, spec.gate_up_bytes :]
    both, last = (
        part.unflatten(1, (linear.units * linear.unit_rows, -1)) for part, linear in zip(parts, spec.first, strict=True)
    )
    activated, wide = _meta(picks, gate_up.out_features // 2), _meta(picks, gate_up.out_features)
    x, out = _meta(rows, spec.in_features), _meta(picks, down.out_features)
    yield partial(gpu_kernels.expert_linear, x, Picks(sources, starts, 0), both, gate_up.format, wide)
    yield partial(activate, gpu_kernels, spec, wide, activated)
    inputs = activated[:, : spec.width]
    yield partial(gpu_kernels.expert_linear, inputs, Picks(None, starts, 0), last, down.format, out)


def _small(planned: PlannedModel, ops: DeviceOps, rows: int) -> Iterator[Call]:
    config = planned.config
    hidden, features = config.hidden_size, -(-config.intermediate_size // BLOCK_FEATURES) * BLOCK_FEATURES
    x, both, activated = _meta(rows, hidden), _meta(rows, 2 * features), _meta(rows, features)
    if config.layer_norm:
        yield partial(ops.layer_norm, x, x[0], x[0] if config.norm_bias else None, config.rms_norm_eps, x)
    if not config.gated:
        yield partial(getattr(ops, activation_op(config)), activated, activated)
    for name in dict.fromkeys(spec.format for spec in planned.model.linears):
        if not config.layer_norm:
            yield partial(ops.rounded_norm, x, x[0], config.rms_norm_eps, x, name)
        if config.gated:
            yield partial(ops.rounded_gated, both, activated, activation_op(config), name)
    if rows == 1:
        for op in (gpu_kernels.add_rows, gpu_kernels.copy_rows):
            yield partial(op, x, x)


def _attention(planned: PlannedModel, rows: int) -> Iterator[Call]:
    """Rotation, and attention of one row or of a chunk; no kernel of either depends on how many more rows there are."""
    config, plan = planned.config, planned.plan
    if rows not in (1, 2):
        return
    owned = {(placement.gpu_kv_heads, shard.layer) for placement, shard in zip(plan.kv, plan.workload.kv, strict=True)}
    kinds = {(count, *config.heads_of(layer)) for count, layer in owned if count}
    slots, cap = -(-plan.max_context // plan.page_size), config.attention_cap
    for count, kv_heads, head_dim in sorted(kinds):
        heads = config.num_heads // kv_heads
        shape = (64, plan.page_size, row_items(plan.workload.kv_dtype, head_dim))
        pages = _meta(*shape, dtype=TORCH_DTYPES[plan.workload.kv_dtype])
        q, lse = _meta(rows, count * heads, head_dim), _meta(rows, count * heads)
        yield _rope(config, rows, count, q, pages, heads)
        if rows == 1:
            table, bound = _meta(1, count, slots, dtype=torch.int32), _meta(1, dtype=torch.int32)
            keys = RowKeys(table, bound, bound)
            yield partial(gpu_kernels.decode_attention, q, Pages(pages, pages), keys, 1.0, Partial(q, lse), cap)
        else:
            chunk = ChunkKeys(_meta(count, slots, dtype=torch.int32), 0, rows, 0)
            yield partial(gpu_kernels.prefill_attention, q, Pages(pages, pages), chunk, 1.0, Partial(q, lse), cap)


def _rope(config: ModelConfig, rows: int, owned: int, q: torch.Tensor, pages: torch.Tensor, heads: int) -> Call:
    head_dim = q.shape[2]
    qkv, norm = _meta(rows, owned, (heads + 2) * head_dim), _meta(head_dim) if config.qk_norm else None
    positions, slots = _meta(rows, dtype=torch.int64), _meta(rows, owned, dtype=torch.int64)
    turned = config.rope.rotary_dim if head_dim == config.head_dim else head_dim
    angles = _meta(64, (turned or head_dim) // 2)
    return lambda: gpu_kernels.rope_append(
        qkv, positions, Rotation(angles, angles, norm, norm, config.rms_norm_eps), q, Pages(pages, pages), slots
    )


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
