"""Attention over a sequence cut into segments: one partial where each segment lives, merged by online softmax.

Heads go by affinity. A KV head that the CPU owns is rotated, stored and attended on the host; one that the GPU
owns keeps its newest tokens in GPU memory and its older ones in DRAM. In decode the CPU attends those in place, so that
only q, the partial output and its lse cross the bus; for a prompt they come to the GPU, block by block. The partials of
one head combine as

    m = max(lse_i),  w_i = exp(lse_i - m),  out = sum(w_i out_i) / sum(w_i),  lse = m + log(sum(w_i))

which is associative and commutative: any number of segments, in any order, gives the same answer.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch

from hetero_attn.cache.pages import PagedStore
from hetero_attn.cache.pool import CachePool
from hetero_attn.devices.protocols import Ops
from hetero_attn.lanes.lanes import Activation, Lanes
from hetero_attn.ops.step import Part, PoolStep, Segment, Segments, Step, layer_blocks


@dataclass(frozen=True, slots=True)
class AttentionParameters:
    """What one layer's attention needs beside its linears, float32, where each lane needs it.

    scale: what scores are multiplied by. cos, sin: [max_context, rotary_dim / 2]. q_norm, k_norm: [head_dim], None on
    both sides where the family has none.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int
    scale: float
    norm_eps: float
    cos: Activation
    sin: Activation
    q_norm: Activation
    k_norm: Activation

    @property
    def queries_per_kv(self) -> int:
        """Query heads that share one KV head."""
        return self.num_heads // self.num_kv_heads


@dataclass(frozen=True, slots=True)
class AttentionBuffers:
    """Float32 workspaces of a step: query, out, partial [rows, num_heads * head_dim]; lse, partial_lse [rows,
    num_heads]."""

    query: Activation
    out: Activation
    partial: Activation
    lse: Activation
    partial_lse: Activation

    def rows(self, start: int, stop: int) -> "AttentionBuffers":
        """Rows [start, stop) of every buffer."""
        return AttentionBuffers(*(getattr(self, name).rows(start, stop) for name in AttentionBuffers.__slots__))


@dataclass(frozen=True, slots=True)
class _Side:
    """One side's view of a layer: its operations, its heads and its pages."""

    name: str
    ops: Ops
    store: PagedStore
    layer: int
    kv_heads: slice
    heads: slice

    def of(self, activation: Activation) -> torch.Tensor | None:
        return getattr(activation, self.name)

    def per_head(self, activation: Activation, head_dim: int) -> torch.Tensor:
        tensor = self.of(activation)
        return tensor.view(tensor.shape[0], -1, head_dim)[:, self.heads]


def attend(
    lanes: Lanes,
    step: Step,
    segments: PoolStep,
    pool: CachePool,
    layer: int,
    parameters: AttentionParameters,
    qkv: Activation,
    computed: int,
    buffers: AttentionBuffers,
) -> None:
    """Rotate, store and attend; fills `buffers.out`, each head on its owner's side.

    qkv: float32 [rows, num_kv_heads * unit_features], the units of the first `computed` KV heads on the GPU, the
    others on the host; those of other owners are moved. layer: which of the pool's layers this is. What the CPU
    lane is asked for never stands behind a wait of the GPU.
    """
    given, unit = lanes.given, qkv.main.shape[1] // parameters.num_kv_heads
    lanes.push(qkv, pool.gpu_kv_heads * unit, computed * unit)
    sides = {side.name: side for side in _writers(lanes, segments, pool, layer, parameters)}
    if "host" in sides:
        lanes.on_host(partial(_store_and_attend, sides["host"], step, segments, parameters, qkv, buffers))
    lanes.pull(qkv, computed * unit, pool.gpu_kv_heads * unit, given)
    if "device" in sides:
        side = sides["device"]
        _store(side, step, segments, parameters, qkv, buffers.query)
        for part, those in zip(step.parts, segments.parts, strict=True):
            _attend_on_device(lanes, part, those, pool, side, parameters, _rows_of(buffers, part, step))


def store(
    lanes: Lanes,
    step: Step,
    segments: PoolStep,
    pool: CachePool,
    layer: int,
    parameters: AttentionParameters,
    qkv: Activation,
    query: Activation,
) -> None:
    """Rotate and store the step's keys and values without attending; `query` receives the rotated queries."""
    for side in _writers(lanes, segments, pool, layer, parameters):
        _store(side, step, segments, parameters, qkv, query)


def _writers(
    lanes: Lanes, segments: PoolStep, pool: CachePool, layer: int, parameters: AttentionParameters
) -> Iterator[_Side]:
    """The sides that the step writes to: the CPU's kv_heads, then the GPU's, its pages in place."""
    if pool.moves is not None:
        pool.moves.wait(layer)
    owned = pool.gpu_kv_heads
    heads = owned * parameters.queries_per_kv
    if segments.slots.host is not None:
        yield _Side("host", lanes.host_ops, pool.host, layer, slice(owned, None), slice(heads, None))
    if segments.slots.device is not None:
        yield _Side("device", lanes.device.ops, pool.recent, layer, slice(owned), slice(heads))


def _rows_of(buffers: AttentionBuffers, part: Part, step: Step) -> AttentionBuffers:
    return buffers if part.rows == step.rows else buffers.rows(part.first, part.first + part.rows)


def _store(
    side: _Side, step: Step, segments: PoolStep, parameters: AttentionParameters, qkv: Activation, query: Activation
) -> None:
    side.ops.rope_append(
        side.of(qkv).view(step.rows, parameters.num_kv_heads, -1)[:, side.kv_heads],
        side.of(step.positions),
        side.of(parameters.cos),
        side.of(parameters.sin),
        side.of(parameters.q_norm),
        side.of(parameters.k_norm),
        parameters.norm_eps,
        side.per_head(query, parameters.head_dim),
        side.store.k[side.layer],
        side.store.v[side.layer],
        side.of(segments.slots),
    )


def _store_and_attend(
    side: _Side,
    step: Step,
    segments: PoolStep,
    parameters: AttentionParameters,
    qkv: Activation,
    buffers: AttentionBuffers,
) -> None:
    _store(side, step, segments, parameters, qkv, buffers.query)
    for part, those in zip(step.parts, segments.parts, strict=True):
        own = _rows_of(buffers, part, step)
        _partial(side, part, those.host, parameters, own.query, own.out, own.lse)


def _partial(
    side: _Side,
    part: Part,
    segment: Segment,
    parameters: AttentionParameters,
    query: Activation,
    out: Activation,
    lse: Activation,
) -> None:
    arguments = (
        side.per_head(query, parameters.head_dim),
        side.store.k[side.layer],
        side.store.v[side.layer],
        segment.table,
        segment.start,
        segment.stop,
    )
    results = (parameters.scale, side.per_head(out, parameters.head_dim), side.of(lse)[:, side.heads])
    if part.is_chunk:
        side.ops.prefill_attention(*arguments, part.q_start, parameters.window, *results)
    else:
        side.ops.decode_attention(*arguments, *results)


def _attend_on_device(
    lanes: Lanes,
    part: Part,
    segments: Segments,
    pool: CachePool,
    side: _Side,
    parameters: AttentionParameters,
    buffers: AttentionBuffers,
) -> None:
    """The GPU's KV heads of one part, stored already: over their recent tokens on the GPU, over older ones meanwhile on
    the CPU, or then on the GPU."""
    attend_recent = partial(_partial, side, part, segments.recent, parameters, buffers.query, buffers.out, buffers.lse)
    if segments.spilled is None:
        attend_recent()
        return
    older = _Side("host", lanes.host_ops, pool.spilled, side.layer, side.kv_heads, side.heads)
    if part.streams_older:
        attend_recent()
        _stream_older(lanes, older, part, segments.spilled, parameters, buffers)
        return
    width = side.heads.stop * parameters.head_dim
    lanes.push(buffers.query, 0, width)
    lanes.on_host(
        lambda: _partial(older, part, segments.spilled, parameters, buffers.query, buffers.partial, buffers.partial_lse)
    )
    attend_recent()
    lanes.pull(buffers.partial, 0, width)
    lanes.pull(buffers.partial_lse, 0, side.heads.stop)
    _merge_older(lanes, older, parameters, buffers)


def _stream_older(
    lanes: Lanes, side: _Side, part: Part, segment: Segment, parameters: AttentionParameters, buffers: AttentionBuffers
) -> None:
    """Attend the GPU's KV heads over their tokens in DRAM, on the GPU, block by block as they arrive there.

    Positions count from the first token of a block, which is what a buffer's table knows.
    """
    on_device = _Side("device", lanes.device.ops, side.store, side.layer, side.kv_heads, side.heads)
    query, out = (on_device.per_head(each, parameters.head_dim) for each in (buffers.query, buffers.partial))
    table, page_size = lanes.pages.table(side.kv_heads.stop), side.store.page_size
    for block in layer_blocks(side.store, segment, side.layer, lanes.pages.block_pages):
        base = block.first * page_size
        start, stop = max(segment.start - base, 0), min(segment.stop - base, len(block.pages) * page_size)
        k, v = lanes.pages.take()
        on_device.ops.prefill_attention(
            query, k, v, table, start, stop, part.q_start - base, parameters.window, parameters.scale, out,
            buffers.partial_lse.device[:, side.heads],
        )  # fmt: skip
        lanes.pages.give_back()
        _merge_older(lanes, side, parameters, buffers)


def _merge_older(lanes: Lanes, side: _Side, parameters: AttentionParameters, buffers: AttentionBuffers) -> None:
    """Merge a partial over older tokens, which is on the GPU, into the one that is there already."""
    on_device = _Side("device", lanes.device.ops, side.store, side.layer, side.kv_heads, side.heads)
    outs = [on_device.per_head(activation, parameters.head_dim) for activation in (buffers.out, buffers.partial)]
    lses = [activation.device[:, side.heads] for activation in (buffers.lse, buffers.partial_lse)]
    lanes.device.ops.merge(outs, lses, outs[0], lses[0])
