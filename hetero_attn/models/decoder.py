"""The decoder as plain functions over weights, cache and lanes, all passed in.

    residual += o(attention(qkv(norm(residual))))
    residual += down(silu(gate) * up)             with gate, up = gate_up(norm(residual))

No function here knows where anything lives: a `LinearWeights` carries its cut, an `Activation` both its sides.
"""

from dataclasses import dataclass

import torch

from cpu_kernels.formats import format_of
from hetero_attn.cache.pool import LayerGroup
from hetero_attn.lanes.lanes import Activation, Lanes
from hetero_attn.ops.attend import AttentionBuffers, AttentionParameters, attend
from hetero_attn.ops.linear import LinearWeights, linear, linear_add
from hetero_attn.ops.step import GroupStep, Step
from placement.plan.workload import row_tier


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer; norms are float32 [hidden_size] where the residual stream lives."""

    qkv: LinearWeights
    o: LinearWeights
    gate_up: LinearWeights
    down: LinearWeights
    input_norm: torch.Tensor
    post_attention_norm: torch.Tensor
    attention: AttentionParameters

    @property
    def linears(self) -> tuple[LinearWeights, ...]:
        """The four linears in the order they run."""
        return (self.qkv, self.o, self.gate_up, self.down)


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """Every weight of a model in its home.

    embed: in host memory, [vocab_size, hidden_size] of numbers, or uint8 [blocks, block_bytes] of the coded
    embed_format.
    """

    layers: tuple[LayerWeights, ...]
    head: LinearWeights
    embed: torch.Tensor
    embed_format: str
    final_norm: torch.Tensor
    norm_eps: float

    @property
    def linears(self) -> tuple[LinearWeights, ...]:
        """Every linear in the order a forward pass runs them."""
        return tuple(weights for layer in self.layers for weights in layer.linears) + (self.head,)


@dataclass(frozen=True, slots=True)
class Workspace:
    """The activation buffers of one step, float32 [rows, width]; see `ActivationWidths` for their widths."""

    residual: Activation
    scratch: Activation
    normed: Activation
    qkv: Activation
    gate_up: Activation
    activated: Activation
    attention: AttentionBuffers

    def rows(self, count: int) -> "Workspace":
        """The first `count` rows of every buffer."""
        buffers = (getattr(self, name).rows(0, count) for name in Workspace.__slots__ if name != "attention")
        return Workspace(*buffers, self.attention.rows(0, count))


def embed(lanes: Lanes, weights: ModelWeights, token_ids: torch.Tensor, residual: Activation) -> None:
    """Start the residual stream with the rows of `token_ids` int64 [rows]; on its way to a GPU it passes the host
    side."""
    residual = residual.columns(0, weights.final_norm.shape[0])
    if format_of(weights.embed_format).is_row_major:
        residual.host.copy_(weights.embed[token_ids])
    else:
        lanes.host_ops.unpack_rows(weights.embed, weights.embed_format, token_ids, residual.host)
    if lanes.device is not None:
        lanes.copy(residual.device, residual.host)


def normalize(
    lanes: Lanes, weight: torch.Tensor, norm_eps: float, residual: Activation, normed: Activation, to_host: bool
) -> None:
    """RMS-normalise the residual into `normed`, and bring it to the host if the CPU lane will need it."""
    hidden_size = weight.shape[0]
    lanes.main_ops.rms_norm(residual.main[:, :hidden_size], weight, norm_eps, normed.main)
    if to_host:
        lanes.push(normed, 0, hidden_size)


def attention_block(
    lanes: Lanes,
    step: Step,
    layer: LayerWeights,
    group: LayerGroup,
    segments: GroupStep,
    index: int,
    norm_eps: float,
    work: Workspace,
) -> None:
    """Add one layer's attention to the residual; `index` is the layer's place in its group of the cache."""
    tier, qkv, out = step.tier, layer.qkv, work.attention.out
    normalize(lanes, layer.input_norm, norm_eps, work.residual, work.normed, qkv.has_host_features(tier))
    linear(lanes, qkv, tier, work.normed, work.qkv)
    attend(lanes, step, segments, group, index, layer.attention, work.qkv, qkv.device_units(tier), work.attention)
    column = group.gpu_groups * layer.attention.heads_per_group * layer.attention.head_dim
    linear_add(lanes, layer.o, tier, out, column, work.residual, work.scratch)


def mlp_block(lanes: Lanes, step: Step, layer: LayerWeights, norm_eps: float, work: Workspace) -> None:
    """Add one layer's gated MLP to the residual; each lane activates the columns it computed."""
    tier, gate_up, down = step.tier, layer.gate_up, layer.down
    normalize(lanes, layer.post_attention_norm, norm_eps, work.residual, work.normed, gate_up.has_host_features(tier))
    linear(lanes, gate_up, tier, work.normed, work.gate_up)
    column = gate_up.device_features(tier)
    if gate_up.has_host_features(tier):
        lanes.on_host(
            lambda: lanes.host_ops.silu_mul(work.gate_up.host[:, column:], work.activated.host[:, column // 2 :])
        )
    if column:
        lanes.device.ops.silu_mul(work.gate_up.device[:, :column], work.activated.device[:, : column // 2])
    activated = work.activated.columns(0, down.spec.in_features)
    linear_add(lanes, down, tier, activated, min(column // 2, down.spec.in_features), work.residual, work.scratch)


def logits(lanes: Lanes, weights: ModelWeights, residual: Activation, normed: Activation, out: Activation) -> None:
    """Project residual rows onto the vocabulary; once the lanes are finished `out.host`, float32 [rows, packed
    vocabulary], is complete.
    """
    head, tier = weights.head, row_tier(out.main.shape[0])
    normalize(lanes, weights.final_norm, weights.norm_eps, residual, normed, head.has_host_features(tier))
    linear(lanes, head, tier, normed, out)
    lanes.push(out, 0, head.device_features(tier))
