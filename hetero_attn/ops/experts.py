"""Run a layer's experts over the lanes: each on the lane where it lives, their outputs added in the order of their ids.

Experts lie in the order gpu | stream | cpu, as the columns of a linear do (`ops.linear`), and every lane computes the
picks of its own. Copies stand in front of them all: in expert slots (`ops.expert_slots`), or streamed for a pass
whatever their ids (`ops.streamed_experts`). The GPU computes what is there, and those experts have no picks where they
lie otherwise. What a lane writes are rows by *place*: all picks of a step sorted by copy and expert, then by row, so
that a lane's picks are neighbours. The sum over a row's experts is made in one place, in ascending id, so that it does
not depend on where an expert was computed. Routes are contents of memory, which recorded steps read.
"""

from dataclasses import dataclass
from typing import Any

import torch

from cpu_kernels.contract import Ops, Picks, Routes
from hetero_attn.lanes.activation import Activation
from hetero_attn.lanes.lanes import Lanes
from hetero_attn.ops.linear import LinearWeights
from hetero_attn.spec.experts import ExpertsSpec


def routes_in(memory: torch.Tensor, weights: torch.Tensor, spec: ExpertsSpec, table: torch.Tensor | None) -> Routes:
    """Views of float32 memory [1, spec.routes_size(rows, copies)] as the int32 that it holds.

    weights: [rows, per_row + 1]. table: int32 [experts], which the router reads, of the copies in GPU memory.
    """
    rows = weights.shape[0]
    picks = rows * spec.per_row
    ids, places, sources, starts = memory[0].view(torch.int32).tensor_split([picks, 2 * picks, 3 * picks])
    return Routes(ids.view(rows, -1), places.view(rows, -1), sources, starts, weights, table)


@dataclass(frozen=True, slots=True)
class CopiedExperts:
    """Experts with a copy in GPU memory in a row tier: in expert slots, or streamed whatever their ids.

    table: of the router, which names them. held: which expert each of them is. As in `Routes` and `Picks`. streamed:
    whether those behind the slots are streamed.
    """

    count: int = 0
    table: torch.Tensor | None = None
    held: torch.Tensor | None = None
    streamed: bool = False


def copied_experts(experts: LinearWeights, tier: int) -> CopiedExperts:
    """Those of a layer."""
    slots, streamed = experts.expert_slots, experts.streamed(tier)
    if streamed is not None:
        count = experts.expert_slot_count + len(streamed.ids)
        return CopiedExperts(count, experts.streamed_experts.table, experts.streamed_experts.held[:count], True)
    return CopiedExperts() if slots is None else CopiedExperts(experts.expert_slot_count, slots.table, slots.held)


@dataclass(frozen=True, slots=True)
class ExpertBuffers:
    """Float32 workspaces of a step of some rows, by place but for the first three.

    x: [rows, hidden]. routes: memory of `Routes`. weights: [rows, per_row + 1]. gate_up, activated: [picks, features].
    parts: [picks, hidden, padded], of the CPU's experts, on both sides; near: the same of the GPU's.
    """

    x: Activation
    routes: Activation
    weights: Activation
    gate_up: Activation
    activated: Activation
    parts: Activation
    near: Activation


def compute_experts(lanes: Lanes, experts: LinearWeights, tier: int, buffers: ExpertBuffers) -> None:
    """Give the CPU lane its experts, then queue the GPU's; x is complete on every side that has any, routes where the
    residual lives.

    The CPU's outputs come back with `add_experts`; work queued between the two runs beside them.
    """
    copied, slots = copied_experts(experts, tier), experts.expert_slots
    at_home = experts.device_units(tier)
    if experts.has_host_features(tier):
        lanes.push(buffers.routes, 0, buffers.routes.main.shape[1])
        host, weight = _Side("host", buffers), experts.host_weight(tier)
        behind = copied.count + at_home
        lanes.on_host(lambda: _run(lanes.host_ops, experts, behind, weight, at_home, host, buffers.parts))
    side = _Side("device", buffers)
    if slots is not None:
        _run(lanes.device.ops, experts, 0, slots.memory, slots.held, side, buffers.near)
    if experts.placement.gpu_units:
        _run(lanes.device.ops, experts, copied.count, experts.gpu, 0, side, buffers.near)
    _stream(lanes, experts, tier, copied, side, buffers.near)


def _stream(
    lanes: Lanes, experts: LinearWeights, tier: int, copied: CopiedExperts, side: "_Side", parts: Activation
) -> None:
    """Queue the picks of what is streamed: of copies whatever their ids, or of the experts behind those at home."""
    held = copied.held if copied.streamed else None
    at = copied.count + experts.placement.gpu_units if held is None else experts.expert_slot_count
    for _ in range(experts.piece_count(tier)):
        weight = lanes.ring.take()
        stop = at + weight.shape[0]
        _run(lanes.device.ops, experts, at, weight, at - copied.count if held is None else held[at:stop], side, parts)
        lanes.ring.give_back()
        at = stop


def add_experts(
    lanes: Lanes, experts: LinearWeights, tier: int, buffers: ExpertBuffers, given: int, out: Activation
) -> None:
    """Add the weighted outputs of `compute_experts`, after which `given` host jobs were given, to `out`."""
    spec, features = _spec(experts), experts.spec.in_features
    side = _Side("host" if lanes.device is None else "device", buffers)
    if experts.has_host_features(tier):
        lanes.pull(buffers.parts, 0, features, given)
    routes, border = side.routes(spec), copied_experts(experts, tier).count + experts.device_units(tier)
    far, near = (side.of(activation)[:, :features] for activation in (buffers.parts, buffers.near))
    lanes.main_ops.combine(
        near,
        far,
        routes.starts[border : border + 1],
        routes.places,
        routes.weights[:, : spec.per_row],
        out.main[:, :features],
    )


def _spec(experts: LinearWeights) -> ExpertsSpec:
    assert isinstance(experts.spec, ExpertsSpec), f"{experts.spec.name} has no experts"
    return experts.spec


class _Side:
    """The buffers of one side."""

    def __init__(self, name: str, buffers: ExpertBuffers) -> None:
        self._name, self._buffers = name, buffers

    def of(self, activation: Activation) -> torch.Tensor:
        return getattr(activation, self._name)

    def routes(self, spec: ExpertsSpec) -> Routes:
        return routes_in(self.of(self._buffers.routes), self.of(self._buffers.weights), spec, None)

    @property
    def x(self) -> torch.Tensor:
        return self.of(self._buffers.x)

    @property
    def gate_up(self) -> torch.Tensor:
        return self.of(self._buffers.gate_up)

    @property
    def activated(self) -> torch.Tensor:
        return self.of(self._buffers.activated)


def activate(ops: Any, spec: ExpertsSpec, gate_up: torch.Tensor, out: torch.Tensor) -> None:
    """The activation between the products of an expert."""
    if spec.clamp is None:
        getattr(ops, spec.activation)(gate_up, out)
    else:
        ops.clamped_silu_mul(gate_up, *spec.clamp, out)


def _run(
    ops: Ops,
    experts: LinearWeights,
    first: int,
    weight: torch.Tensor,
    ids: int | torch.Tensor,
    side: _Side,
    parts: Activation,
) -> None:
    """The picks from `first` on, counted over all copies and all experts, of those whose packed bytes `weight` has,
    uint8 [experts, unit_bytes]. ids: of the first one where they follow each other, else int32 [experts], of each."""
    spec, bias = _spec(experts), side.of(experts.bias)
    gate_up, down = spec.first
    routes, border = side.routes(spec), spec.gate_up_bytes
    both, down_blocks = (
        part.unflatten(1, (linear.units * linear.unit_rows, -1))
        for part, linear in zip((weight[:, :border], weight[:, border:]), spec.first, strict=True)
    )
    picks = Picks(routes.sources, routes.starts, first, None if isinstance(ids, int) else ids)
    ops.expert_linear(side.x, picks, both, gate_up.format, side.gate_up)
    if bias is not None:
        bias = bias[ids : ids + weight.shape[0]] if isinstance(ids, int) else bias
        ops.add_expert_bias(bias[:, : gate_up.out_features], picks, side.gate_up)
    activate(ops, spec, side.gate_up, side.activated)
    x, out = side.activated[:, : spec.width], side.of(parts)
    ops.expert_linear(x, picks._replace(sources=None), down_blocks, down.format, out)
    if bias is not None:
        ops.add_expert_bias(bias[:, gate_up.out_features :], picks, out)
