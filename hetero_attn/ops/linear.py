"""Run one linear layer over its lanes, each output column computed in exactly one place.

A weight's packed units lie in the order gpu | stream | cpu. The first run is in GPU memory; the rest is one tensor in
host memory, of which the first part is streamed through the staging ring and the second computed in place by CPU
cores. The boundary between those two is an integer per row tier; no weight moves when it does.

In an elastic plan host memory holds a copy of the gpu run too, so the first boundary moves as well: a run given up is
simply read from its copy from the next step on.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from hetero_attn.lanes.activation import Activation, behind
from hetero_attn.lanes.lanes import Lanes
from hetero_attn.lanes.staging import Piece
from hetero_attn.ops.expert_slots import ExpertSlots
from hetero_attn.ops.streamed_experts import Streamed, StreamedExperts
from hetero_attn.spec.weights import LinearSpec
from placement.plan.memory import LinearPlacement

NOTHING = Activation(None, None)


@dataclass(slots=True)
class LinearWeights:
    """The packed weight of one linear in its two homes; `placement` and `gpu` change between steps only.

    gpu: uint8 [gpu blocks, block_bytes] in GPU memory, of a mix of formats [units, unit_bytes]. dram: the same in host
    memory, those of the units from `first_dram_unit` on. Of a row cut, both hold every output feature and the input
    features of their units.
    bias: float32 [out_features] on both sides, None on both where the linear has none. order: int32 [in_features] on
    both sides, which input of the model each of the weight's is; None on both where they are the same.
    piece_blocks: the most blocks a staging slot takes.
    expert_slots: of experts, copies of some in GPU memory; None where the plan has none. streamed_experts: of experts
    whose lane changes no bit, those that a pass streams; None where all that may be is the first ones.
    """

    spec: LinearSpec
    placement: LinearPlacement
    gpu: torch.Tensor | None
    dram: torch.Tensor
    bias: Activation
    piece_blocks: int
    first_dram_unit: int
    order: Activation = NOTHING
    expert_slots: ExpertSlots | None = None
    streamed_experts: StreamedExperts | None = None

    @property
    def expert_slot_count(self) -> int:
        """How many expert slots there are."""
        return 0 if self.expert_slots is None else self.expert_slots.count

    def streamed(self, tier: int) -> Streamed | None:
        """The experts that are streamed in this row tier whatever their ids; None where it is a run of units."""
        return None if self.streamed_experts is None else self.streamed_experts.by_tier.get(tier)

    def device_units(self, tier: int) -> int:
        """Units computed on the GPU in this row tier, resident or a streamed run behind those."""
        return self.placement.gpu_units + (self.placement.stream_units[tier] if self.streamed(tier) is None else 0)

    def device_inputs(self, tier: int) -> int:
        """Input features of a row cut that the GPU multiplies in this row tier; the CPU lane takes those behind
        them."""
        return self.device_units(tier) * self.spec.row_unit

    def device_features(self, tier: int) -> int:
        """Packed output features computed on the GPU in this row tier; the CPU lane computes the rest."""
        return self.device_units(tier) * self.spec.unit_features

    def multiplies_at_once(self, tier: int, columns: int) -> bool:
        """Whether every product of the GPU in this row tier takes the first `columns` inputs, no more and no less, so
        that they may be rounded together."""
        if self.spec.is_reordered:
            return False
        if not self.spec.row_unit:
            return self.device_units(tier) > 0 and columns == self.spec.in_features
        return columns == self.device_inputs(tier) and not self.piece_count(tier)

    def has_host_features(self, tier: int) -> bool:
        """Whether the CPU lane computes any column in this row tier."""
        return self.device_units(tier) < self.spec.units

    def pieces(self, tier: int) -> Iterator[Piece]:
        """The streamed blocks of this tier, cut into pieces that fit a staging slot."""
        if (streamed := self.streamed(tier)) is not None:
            return iter(streamed.pieces)
        starts = self._piece_starts(tier)
        return ((self.dram[start : min(start + self.piece_blocks, starts.stop)],) for start in starts)

    def piece_count(self, tier: int) -> int:
        """How many pieces `pieces` gives."""
        streamed = self.streamed(tier)
        return len(self._piece_starts(tier)) if streamed is None else len(streamed.pieces)

    def _piece_starts(self, tier: int) -> range:
        if self.spec.row_unit:
            return range(0, self.dram.shape[0] if self.placement.stream_units[tier] else 0, self.piece_blocks)
        first, stop = self._dram_block(self.placement.gpu_units), self._dram_block(self.device_units(tier))
        return range(first, stop, self.piece_blocks)

    def host_weight(self, tier: int) -> torch.Tensor:
        """The blocks that the CPU lane computes in place."""
        if self.spec.row_unit:
            return self.dram
        first = self._dram_block(self.device_units(tier))
        return self.dram[first:] if first else self.dram

    def gpu_copy(self, gpu_units: int) -> torch.Tensor:
        """The copies in host memory of the first `gpu_units` units; an elastic plan only."""
        assert self.first_dram_unit == 0, f"{self.spec.name} keeps no copy of what is in GPU memory"
        return self.dram[: gpu_units * self.spec.unit_rows]

    def _dram_block(self, unit: int) -> int:
        return (unit - self.first_dram_unit) * self.spec.unit_rows


class SplitInput(NamedTuple):
    """The input of a linear where its columns were computed: [0, column) of x in GPU memory, or they will be, and the
    rest in host memory.

    rounded: what `rounded` gives for x, where that is there already, which `LinearWeights.multiplies_at_once` allows.
    reordered: room for x in the order of the weight's inputs, where that is another.
    """

    x: Activation
    column: int
    rounded: Any = None
    reordered: Activation = NOTHING


def reorder_on_device(lanes: Lanes, weights: LinearWeights, x: Activation, room: Activation) -> Activation:
    """What a weight multiplies on the GPU: x, or `room`, where x is brought into the order of the weight's inputs."""
    if weights.order.device is None:
        return x
    lanes.device.ops.gather_columns(x.device, weights.order.device, room.device)
    return room


def reorder_on_host(lanes: Lanes, weights: LinearWeights, x: Activation, room: Activation) -> Activation:
    """As `reorder_on_device`, of the CPU lane; a host job's body."""
    if weights.order.host is None:
        return x
    lanes.host_ops.gather_columns(x.host, weights.order.host, room.host)
    return room


def run_on_device(
    lanes: Lanes,
    weights: LinearWeights,
    tier: int,
    x: Activation,
    out: Activation,
    add: bool = False,
    inputs: Any = None,
) -> None:
    """Queue the GPU's resident and streamed columns of `x @ W.T + bias` into (or onto) the left columns of `out`.

    x float32 [rows, in_features], out float32 [rows, out_features]; written in place on the device side. inputs: what
    `rounded` gives for x, where that is there already.
    """
    start = 0
    if inputs is None:
        inputs = lanes.device.ops.rounded(x.device, weights.spec.format)
    for is_streamed, blocks in _device_weights(lanes, weights, tier):
        stop = start + blocks.shape[0] * weights.spec.row_features
        bias = None if weights.bias.device is None else weights.bias.device[start:stop]
        lanes.device.ops.linear(inputs, blocks, weights.spec.format, bias, out.device[:, start:stop], add)
        if is_streamed:
            lanes.ring.give_back()
        start = stop


def _device_weights(lanes: Lanes, weights: LinearWeights, tier: int) -> Iterator[tuple[bool, torch.Tensor]]:
    if weights.gpu is not None and weights.gpu.shape[0]:
        yield False, weights.gpu
    for _ in range(weights.piece_count(tier)):
        yield True, lanes.ring.take()


def run_on_host(
    lanes: Lanes, weights: LinearWeights, tier: int, x: Activation, out: Activation, add: bool = False
) -> None:
    """Compute the CPU lane's columns of `x @ W.T + bias` into (or onto) the right columns of `out`; a host job's body.

    x float32 [rows, in_features], out float32 [rows, out_features]; written in place on the host side.
    """
    start = weights.device_features(tier)
    bias = None if weights.bias.host is None else weights.bias.host[start:]
    lanes.host_ops.linear(x.host, weights.host_weight(tier), weights.spec.format, bias, behind(out.host, start), add)


def linear(
    lanes: Lanes,
    weights: LinearWeights,
    tier: int,
    x: Activation,
    out: Activation,
    inputs: Any = None,
    reordered: Activation = NOTHING,
) -> None:
    """Compute `x @ W.T + bias`, leaving each lane's columns of `out` where they were computed.

    x must be complete in GPU memory if the GPU computes a column, and in host memory if the CPU lane does.
    inputs: x as `rounded` gives it for the GPU, where that is there already. reordered: as in `SplitInput`; then there
    are no such inputs.
    """
    if weights.has_host_features(tier):
        lanes.on_host(lambda: run_on_host(lanes, weights, tier, reorder_on_host(lanes, weights, x, reordered), out))
    if weights.device_units(tier):
        run_on_device(lanes, weights, tier, reorder_on_device(lanes, weights, x, reordered), out, False, inputs)


def linear_add(
    lanes: Lanes,
    weights: LinearWeights,
    tier: int,
    split: SplitInput,
    residual: Activation,
    scratch: Activation,
    add: bool = True,
) -> None:
    """Add `x @ W.T + bias` to the residual where it lives; `scratch` carries what the CPU lane computed to a GPU.

    add: False writes it there instead, whatever was there before. split: x, completed here on every side that
    multiplies it. The CPU lane is asked right behind the copy that completes its side, and works while the GPU waits
    for its own.
    """
    x, column, inputs, reordered = split
    if lanes.device is None:
        run_on_host(lanes, weights, tier, reorder_on_host(lanes, weights, x, reordered), residual, add)
        return
    on_host = run_row_cut_on_host if weights.spec.row_unit else run_on_host
    on_device = run_row_cut_on_device if weights.spec.row_unit else run_on_device
    given, wanted = lanes.given, _wanted_input(weights, tier)
    lanes.push(x, wanted.start, column)
    if weights.has_host_features(tier):
        lanes.on_host(lambda: on_host(lanes, weights, tier, reorder_on_host(lanes, weights, x, reordered), scratch))
    lanes.pull(x, column, wanted.stop, given)
    if weights.device_units(tier):
        on_device(lanes, weights, tier, reorder_on_device(lanes, weights, x, reordered), residual, add, inputs)
    if weights.has_host_features(tier):
        start = 0 if weights.spec.row_unit else weights.device_features(tier)
        if add or (weights.spec.row_unit and weights.device_units(tier)):
            lanes.pull_onto(residual.device, scratch, start)
        else:
            lanes.pull(Activation(residual.device, scratch.host), start, residual.device.shape[1])


def _wanted_input(weights: LinearWeights, tier: int) -> slice:
    """The host multiplies the input features from `start` on, the GPU those before `stop`.

    A column cut needs all of them on every side that computes a column; a row cut has one boundary between the sides.
    """
    if weights.spec.row_unit:
        boundary = weights.device_inputs(tier)
        return slice(boundary, boundary)
    width = weights.spec.in_features
    return slice(0 if weights.has_host_features(tier) else width, width if weights.device_units(tier) else 0)


def run_row_cut_on_device(
    lanes: Lanes,
    weights: LinearWeights,
    tier: int,
    x: Activation,
    out: Activation,
    add: bool = True,
    inputs: Any = None,
) -> None:
    """Queue the GPU's part of every output feature of a row cut, the bias included, into (or onto) `out`."""
    home = weights.placement.gpu_units * weights.spec.row_unit
    bias, ops = weights.bias.device, lanes.device.ops
    if home:
        ops.linear(
            x.device[:, :home] if inputs is None else inputs, weights.gpu, weights.spec.format, bias, out.device, add
        )
        bias, add, inputs = None, True, None
    start = 0
    for _ in range(weights.piece_count(tier)):
        if inputs is None:
            inputs = ops.rounded(x.device[:, home:], weights.spec.format)
        blocks = lanes.ring.take()
        stop = start + blocks.shape[0] * weights.spec.row_features
        part = None if bias is None else bias[start:stop]
        ops.linear(inputs, blocks, weights.spec.format, part, out.device[:, start:stop], add)
        lanes.ring.give_back()
        start = stop


def run_row_cut_on_host(lanes: Lanes, weights: LinearWeights, tier: int, x: Activation, out: Activation) -> None:
    """Compute the CPU lane's part of every output feature of a row cut into `out`, the bias if the GPU has no part."""
    first = weights.device_inputs(tier)
    bias = weights.bias.host if first == 0 else None
    lanes.host_ops.linear(x.host[:, first:], weights.dram, weights.spec.format, bias, out.host, False)
