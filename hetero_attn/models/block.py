"""What a block of a model computes with: its weights, the step, its state, and the buffers of the step.

    residual += block(norm(residual)), or post_norm(block(norm(residual)))

The MLP of a parallel layer sees what its attention has normalised, in the buffer SHARED, not the residual anew.

No block knows where anything lives: a `LinearWeights` carries its cut, an `Activation` both its sides.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from hetero_attn.lanes.activation import Activation, before
from hetero_attn.lanes.lanes import Lanes
from hetero_attn.models.workspace import Workspace
from hetero_attn.ops.linear import NOTHING, LinearWeights, SplitInput, linear, linear_add
from hetero_attn.ops.run import KvView, Run
from hetero_attn.spec.blocks import Declaration
from hetero_attn.spec.config import ModelConfig
from hetero_attn.spec.decoder.norms import NORMED, REORDERED


class FixedView(NamedTuple):
    """One layer's states of fixed size, float32 [max_batch, *shape] where the residual stream lives, and
    sequence_ids, int64 [rows] at the same side, the index in it of each row's sequence.

    Rows of one sequence are in the order of its tokens; what the step leaves in its state, the next one finds.
    keep(sequence id, place): copy a sequence's state as queued work leaves it, see `Step.kept_states`; None where
    nothing may be. drafts: float32
    [rows, draft_features], what a step with drafts leaves of every row, of which later some are taken in; None of any
    other step. spare: what drafts write in place of values, like those.
    """

    values: torch.Tensor
    sequence_ids: torch.Tensor
    keep: Callable[[int, int], None] | None = None
    drafts: torch.Tensor | None = None
    spare: torch.Tensor | None = None


StateView = KvView | FixedView | None


@dataclass(frozen=True, slots=True)
class BlockWeights:
    """The weights of one block by the names that it declares; vectors, and cos and sin of its rope, float32 on both
    sides.

    made: what the block makes of its vectors once, by name.
    """

    linears: Mapping[str, LinearWeights]
    vectors: Mapping[str, Activation]
    rope: tuple[Activation, Activation] | None
    made: dict[str, Any] = field(init=False, default_factory=dict, repr=False, compare=False)

    def vector(self, name: str) -> Activation:
        """A vector, or nothing on both sides where the block has none of that name."""
        return self.vectors.get(name, NOTHING)


class Block(Declaration):
    """One block of a layer: what it declares, and what it adds to the residual stream."""

    def forward(self, run: Run, weights: BlockWeights, state: Any, work: Workspace) -> None:
        """Add the block's output to `work.residual`, float32 [rows, width], where that lives; queue it on the lanes.

        state: the `StateView` of the state that the block declares.
        """
        raise NotImplementedError(f"{type(self).__name__} computes nothing")

    def take_in(self, lanes: Lanes, weights: BlockWeights, state: FixedView, work: Workspace) -> None:
        """Move states on by rows that were drafts; `state.drafts` is what those have left."""
        raise NotImplementedError(f"{type(self).__name__} has no drafts")

    def store(self, run: Run, weights: BlockWeights, state: KvView, work: Workspace) -> None:
        """Write what the buffer `stored` holds to the cache as the step's keys and values, nothing attended."""
        raise NotImplementedError(f"{type(self).__name__} has no keys and values")


@dataclass(frozen=True, slots=True)
class Norm:
    """The norm in front of a block: an RMS norm, or a layer norm, which may have a bias; no weight where there is no
    norm."""

    weight: Activation
    eps: float
    bias: Activation = NOTHING
    is_layer_norm: bool = False

    @classmethod
    def of(cls, config: ModelConfig, weights: BlockWeights) -> "Norm":
        """That of a block which has declared `norm_vectors`."""
        if "norm" not in weights.made:
            weight, bias = weights.vector("norm"), weights.vector("norm_bias")
            weights.made["norm"] = cls(weight, config.rms_norm_eps, bias, config.layer_norm)
        return weights.made["norm"]

    @property
    def width(self) -> int:
        """Numbers of a row."""
        return self.weight.main.shape[0]

    def apply(self, ops: Any, x: torch.Tensor, out: torch.Tensor) -> None:
        """Normalise rows where the residual stream lives."""
        if self.is_layer_norm:
            ops.layer_norm(x, self.weight.main, self.bias.main, self.eps, out)
        else:
            ops.rms_norm(x, self.weight.main, self.eps, out)


def normalize(lanes: Lanes, norm: Norm, residual: Activation, normed: Activation, to_host: bool) -> None:
    """Normalise the residual into `normed`, and bring it to the host if the CPU lane will need it."""
    norm.apply(lanes.main_ops, before(residual.main, norm.width), normed.main)
    if to_host:
        lanes.push(normed, 0, norm.width)


def normed_linear(
    lanes: Lanes, tier: int, norm: Norm, weights: LinearWeights, work: Workspace, out: Activation, name: str = NORMED
) -> None:
    """A linear of the normalised residual into `out`, or where there is no norm of the residual as it is; on a GPU one
    launch makes an RMS norm, and rounds it for all pieces of the weight. name: of the buffer of normalised rows."""
    room = room_to_reorder(weights, work)
    if norm.weight.main is None:
        x = _as_it_is(lanes, weights.spec.in_features, work, weights, tier)
        linear(lanes, weights, tier, x, out, reordered=room)
        return
    normed = work.of(name, weights.spec.in_features)
    is_apart = norm.is_layer_norm or weights.spec.is_reordered
    if lanes.device is None or not weights.device_units(tier) or is_apart:
        normalize(lanes, norm, work.residual, normed, weights.has_host_features(tier))
        linear(lanes, weights, tier, normed, out, reordered=room)
        return
    hidden_size = norm.width
    residual = work.residual.device[:, :hidden_size]
    inputs = lanes.device.ops.rounded_norm(residual, norm.weight.device, norm.eps, normed.device, weights.spec.format)
    if weights.has_host_features(tier):
        lanes.push(normed, 0, hidden_size)
    linear(lanes, weights, tier, normed, out, inputs)


def room_to_reorder(weights: LinearWeights, work: Workspace) -> Activation:
    """Where what a weight multiplies is brought into the order of its inputs; nowhere where that is the model's."""
    return work.of(REORDERED, weights.spec.in_features) if weights.spec.is_reordered else NOTHING


def _as_it_is(lanes: Lanes, width: int, work: Workspace, weights: LinearWeights, tier: int) -> Activation:
    """The residual stream, on the host too if the CPU lane computes a part of what multiplies it."""
    if lanes.device is None:
        return work.residual.columns(0, width)
    # The next step's rows are embedded in the residual's host memory while this step may still compute.
    x = Activation(work.residual.device[:, :width], work.of("normed", width).host)
    if weights.has_host_features(tier):
        lanes.push(x, 0, width)
    return x


def add_output(
    run: Run, last: LinearWeights, split: SplitInput, work: Workspace, post_norm: Activation, norm_eps: float
) -> None:
    """Add what the last linear of a block gives to the residual, RMS-normalised by `post_norm` where that is there."""
    lanes, tier = run.lanes, run.step.tier
    if last.spec.is_reordered:
        split = split._replace(reordered=room_to_reorder(last, work))
    if post_norm.main is None:
        linear_add(lanes, last, tier, split, work.residual, work.scratch)
        return
    hidden_size, projected = post_norm.main.shape[0], work.of("projected", last.spec.out_features)
    linear_add(lanes, last, tier, split, projected, work.scratch, add=False)
    residual = work.residual.main[:, :hidden_size]
    lanes.main_ops.rms_norm(projected.main[:, :hidden_size], post_norm.main, norm_eps, residual, True)


def scale_residual(lanes: Lanes, weights: BlockWeights, work: Workspace, hidden_size: int) -> None:
    """Multiply the residual by the number of the layer, of a model whose layers have one."""
    scalar = weights.vector("layer_scalar").main
    if scalar is not None:
        rows = work.residual.main[:, :hidden_size]
        lanes.main_ops.scale_rows(scalar.expand(rows.shape[0], 1), rows)
