"""Attention over a sequence cut into segments: one partial where each segment lives, merged by online softmax.

Heads go by affinity. A KV head that the CPU owns is rotated, stored and attended on the host; one that the GPU
owns keeps its newest tokens in GPU memory and its older ones in DRAM. In decode the CPU attends those in place, so that
only q, the partial output and its lse cross the bus; for a prompt they come to the GPU, block by block. The partials of
one head combine as

    m = max(lse_i),  w_i = exp(lse_i - m),  out = sum(w_i out_i) / sum(w_i),  lse = m + log(sum(w_i))

which is associative and commutative: any number of segments, in any order, gives the same answer. A sink, a score in
the denominator of a head that has no value, is one more segment (0, lse = its score), counted when all others are.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch

from cpu_kernels.contract import ChunkKeys, Ops, Pages, Partial, Rotation
from hetero_attn.cache.pages import PagedStore
from hetero_attn.lanes.activation import Activation
from hetero_attn.lanes.lanes import Lanes
from hetero_attn.ops.older_pages import layer_blocks
from hetero_attn.ops.run import KvView, Run
from hetero_attn.ops.step import Part, Segment, Segments, Step


@dataclass(frozen=True, slots=True)
class AttentionParameters:
    """What one layer's attention needs beside its linears, float32, where each lane needs it.

    scale: what scores are multiplied by. cap: the soft cap on them, 0 for none. cos, sin: [max_context, rotary_dim /
    2]. q_norm, k_norm, v_norm: [head_dim]; sinks: [num_heads], of each the score that has no value; None on both sides
    where the family has none. is_gated: whether behind each KV head's q, k and v stand gates of what its query heads
    attend to.
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
    v_norm: Activation = Activation(None, None)
    cap: float = 0.0
    sinks: Activation = Activation(None, None)
    is_gated: bool = False

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
    """One side's view of a layer: its operations, its heads and its pages, and what the layer computes with."""

    name: str
    ops: Ops
    store: PagedStore
    layer: int
    kv_heads: slice
    heads: slice
    parameters: AttentionParameters

    @property
    def pages(self) -> Pages:
        """Those of the layer."""
        return Pages(self.store.k[self.layer], self.store.v[self.layer])

    def of(self, activation: Activation) -> torch.Tensor | None:
        """An activation on this side."""
        return getattr(activation, self.name)

    def per_head(self, activation: Activation) -> torch.Tensor:
        """Its query heads of an activation, [rows, heads, head_dim]."""
        tensor = self.of(activation)
        return _of_heads(tensor.view(tensor.shape[0], -1, self.parameters.head_dim), self.heads)

    def partial(self, out: Activation, lse: Activation) -> Partial:
        """Its query heads of results."""
        return Partial(self.per_head(out), _of_heads(self.of(lse), self.heads))

    def finish(self, qkv: Activation, out: Activation, lse: Activation) -> None:
        """Count its heads' sinks in what is attended over all their keys, and multiply that by their gates."""
        own = self.parameters
        if (sinks := self.of(self.parameters.sinks)) is not None:
            self.ops.add_sinks(sinks[self.heads], self.partial(out, lse))
        if own.is_gated:
            width = own.queries_per_kv * own.head_dim
            units = self.of(qkv).unflatten(1, (own.num_kv_heads, -1))[:, self.kv_heads]
            result = self.of(out).unflatten(1, (own.num_kv_heads, width))[:, self.kv_heads]
            self.ops.sigmoid_mul(units[..., width + 2 * own.head_dim :][..., :width], result)

    def norm_values(self, units: torch.Tensor) -> None:
        """Normalise v in place where the family does: of every row together, or of every head, what is fewer calls.

        units: float32 [rows, its KV heads, unit_features].
        """
        own, weight = self.parameters, self.of(self.parameters.v_norm)
        if weight is None:
            return
        start = (own.queries_per_kv + 1) * own.head_dim
        values = units[..., start : start + own.head_dim]
        for piece in values.unbind(0 if values.shape[0] <= values.shape[1] else 1):
            self.ops.rms_norm(piece, weight, own.norm_eps, piece)

    def rotation(self) -> Rotation:
        """What it rotates with."""
        own = self.parameters
        return Rotation(self.of(own.cos), self.of(own.sin), self.of(own.q_norm), self.of(own.k_norm), own.norm_eps)


def attend(
    run: Run,
    view: KvView,
    parameters: AttentionParameters,
    qkv: Activation,
    computed: int,
    buffers: AttentionBuffers,
) -> None:
    """Rotate, store and attend; fills `buffers.out`, each head on its owner's side.

    qkv: float32 [rows, num_kv_heads * unit_features], the units of the first `computed` KV heads on the GPU, the
    others on the host; those of other owners are moved. What the CPU lane is asked for never stands behind a wait of
    the GPU.
    """
    lanes, owned = run.lanes, view.pool.gpu_kv_heads
    given, unit = lanes.given, qkv.main.shape[1] // parameters.num_kv_heads
    lanes.push(qkv, owned * unit, computed * unit)
    sides = {side.name: side for side in _writers(run, view, parameters)}
    if "host" in sides:
        lanes.on_host(partial(_store_and_attend, sides["host"], run.step, view, qkv, buffers))
    lanes.pull(qkv, computed * unit, owned * unit, given)
    if "device" in sides:
        side = sides["device"]
        _store(side, run.step, view, qkv, buffers.query)
        for part, those in zip(run.step.parts, view.segments.parts, strict=True):
            _attend_on_device(run, part, those, view, side, _rows_of(buffers, part, run.step))
        side.finish(qkv, buffers.out, buffers.lse)


def store(run: Run, view: KvView, parameters: AttentionParameters, qkv: Activation, query: Activation) -> None:
    """Rotate and store the step's keys and values without attending; `query` receives the rotated queries."""
    for side in _writers(run, view, parameters):
        _store(side, run.step, view, qkv, query)


def _writers(run: Run, view: KvView, parameters: AttentionParameters) -> Iterator[_Side]:
    """The sides that the step writes to: the CPU's kv_heads, then the GPU's, its pages in place."""
    lanes, (pool, layer, segments) = run.lanes, view
    owned, heads = pool.gpu_kv_heads, pool.gpu_kv_heads * parameters.queries_per_kv
    if pool.moves is not None:
        pool.moves.wait(layer)
    if segments.slots.host is not None:
        yield _Side("host", lanes.host_ops, pool.host, layer, slice(owned, None), slice(heads, None), parameters)
    if segments.slots.device is not None:
        yield _Side("device", lanes.device.ops, pool.recent, layer, slice(owned), slice(heads), parameters)


def _of_heads(values: torch.Tensor, heads: slice) -> torch.Tensor:
    """Some heads of [rows, heads, ...]; all of them without another view."""
    return values[:, heads] if heads.start or heads.stop is not None else values


def _rows_of(buffers: AttentionBuffers, part: Part, step: Step) -> AttentionBuffers:
    return buffers if part.rows == step.rows else buffers.rows(part.first, part.first + part.rows)


def _store(side: _Side, step: Step, view: KvView, qkv: Activation, query: Activation) -> None:
    units = _of_heads(side.of(qkv).view(step.rows, side.parameters.num_kv_heads, -1), side.kv_heads)
    side.norm_values(units)
    side.ops.rope_append(
        units,
        side.of(step.positions),
        side.rotation(),
        side.per_head(query),
        side.pages,
        side.of(view.segments.slots),
    )


def _store_and_attend(side: _Side, step: Step, view: KvView, qkv: Activation, buffers: AttentionBuffers) -> None:
    _store(side, step, view, qkv, buffers.query)
    for part, those in zip(step.parts, view.segments.parts, strict=True):
        own = _rows_of(buffers, part, step)
        _attend(side, those.host, own.query, own.out, own.lse)
    side.finish(qkv, buffers.out, buffers.lse)


def _attend(side: _Side, keys: Segment, query: Activation, out: Activation, lse: Activation) -> None:
    q, own, into = side.per_head(query), side.parameters, side.partial(out, lse)
    if isinstance(keys, ChunkKeys):
        in_window = keys._replace(window=own.window)
        side.ops.prefill_attention(q, side.pages, in_window, own.scale, into, own.cap)
    else:
        side.ops.decode_attention(q, side.pages, keys, own.scale, into, own.cap)


def _attend_on_device(
    run: Run, part: Part, segments: Segments, view: KvView, side: _Side, buffers: AttentionBuffers
) -> None:
    """The GPU's KV heads of one part, stored already: over their recent tokens on the GPU, over older ones meanwhile on
    the CPU, or then on the GPU."""
    lanes = run.lanes
    attend_recent = partial(_attend, side, segments.recent, buffers.query, buffers.out, buffers.lse)
    if segments.spilled is None:
        attend_recent()
        return
    older = replace(side, name="host", ops=lanes.host_ops, store=view.pool.spilled)
    if part.streams_older and isinstance(segments.spilled, ChunkKeys):
        attend_recent()
        _stream_older(lanes, older, segments.spilled, side, buffers)
        return
    heads = side.heads.stop
    width = heads * side.parameters.head_dim
    lanes.push(buffers.query, 0, width)
    lanes.on_host(lambda: _attend(older, segments.spilled, buffers.query, buffers.partial, buffers.partial_lse))
    attend_recent()
    lanes.pull(buffers.partial, 0, width)
    lanes.pull(buffers.partial_lse, 0, heads)
    _merge_older(side, buffers)


def _stream_older(lanes: Lanes, older: _Side, keys: ChunkKeys, side: _Side, buffers: AttentionBuffers) -> None:
    """Attend the GPU's KV heads over their tokens in DRAM, on the GPU, block by block as they arrive there.

    Positions count from the first token of a block, which is what a buffer's table knows.
    """
    query, into = side.per_head(buffers.query), side.partial(buffers.partial, buffers.partial_lse)
    table, page_size, own = lanes.pages.table(side.kv_heads.stop), older.store.page_size, side.parameters
    for block in layer_blocks(older.store, keys, older.layer, lanes.pages.block_pages):
        base = block.first * page_size
        start, stop = max(keys.start - base, 0), min(keys.stop - base, len(block.pages) * page_size)
        of_block = ChunkKeys(table, start, stop, keys.q_start - base, own.window)
        side.ops.prefill_attention(query, Pages(*lanes.pages.take()), of_block, own.scale, into, own.cap)
        lanes.pages.give_back()
        _merge_older(side, buffers)


def _merge_older(side: _Side, buffers: AttentionBuffers) -> None:
    """Merge a partial over older tokens, which is on the GPU, into the one that is there already."""
    recent = side.partial(buffers.out, buffers.lse)
    side.ops.merge([recent, side.partial(buffers.partial, buffers.partial_lse)], recent)
