"""The decoder families with what their blocks compute, and the two ends of every model: token embedding and head."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from cpu_kernels.formats import format_of
from hetero_attn.lanes.activation import Activation
from hetero_attn.lanes.lanes import Lanes
from hetero_attn.models.attention import Attention
from hetero_attn.models.beside import Beside
from hetero_attn.models.block import Block, BlockWeights, Norm, normed_linear
from hetero_attn.models.delta import DeltaNet
from hetero_attn.models.eagle import EagleAttention, Fusion
from hetero_attn.models.experts import Experts
from hetero_attn.models.mlp import Mlp
from hetero_attn.models.requantised import Requantised
from hetero_attn.models.workspace import Workspace
from hetero_attn.ops.linear import LinearWeights
from hetero_attn.spec.blocks import ModelSpec
from hetero_attn.spec.config import ModelConfig
from hetero_attn.spec.decoder.head import HeadDeclaration
from hetero_attn.spec.decoder.model import BlockKinds, model_spec
from hetero_attn.spec.weight_formats import WeightFormats
from placement.plan.workload import row_tier


class Head(HeadDeclaration, Block):
    """logits = head(norm(residual)), for the rows that they are wanted of."""

    def project(self, lanes: Lanes, weights: BlockWeights, work: Workspace, out: Activation) -> None:
        """Project the residual rows of `work` onto the vocabulary; once the lanes are finished `out.host`, float32
        [rows, packed vocabulary], is complete."""
        head, tier = weights.linears["head"], row_tier(out.main.shape[0])
        normed_linear(lanes, tier, Norm.of(self._config, weights), head, work, out)
        lanes.push(out, 0, head.device_features(tier))


KINDS = BlockKinds(Attention, Mlp, Experts, Head, DeltaNet, EagleAttention, Fusion, Beside)


def decoder(config: ModelConfig, formats: str | WeightFormats = "bf16") -> ModelSpec:
    """`model_spec` of blocks that compute what they declare."""
    return model_spec(config, formats, KINDS)


@dataclass(frozen=True)
class ModelWeights:
    """Every weight of a model in its home, block by block.

    embed: in host memory, [vocab_size, hidden_size] of numbers, or uint8 [blocks, block_bytes] of the coded
    embed_format. fusion: of the block of that name, None where the model has none. requantised: what holding the file's
    codes otherwise changed, None where none are.
    """

    spec: ModelSpec
    layers: tuple[tuple[BlockWeights, ...], ...]
    head: BlockWeights
    embed: torch.Tensor
    embed_format: str
    fusion: BlockWeights | None = None
    requantised: Requantised | None = None

    @property
    def blocks(self) -> Iterator[tuple[Any, BlockWeights]]:
        """Every block of the layers, in the order they run, with its weights."""
        for blocks, weights in zip(self.spec.layers, self.layers, strict=True):
            yield from zip(blocks, weights, strict=True)

    @cached_property
    def layer_linears(self) -> tuple[LinearWeights, ...]:
        """Every linear of the layers in the order a forward pass runs them."""
        return tuple(linear for layer in self.layers for block in layer for linear in block.linears.values())

    @cached_property
    def step_linears(self) -> tuple[LinearWeights, ...]:
        """Those, and the head's."""
        return (*self.layer_linears, *self.head.linears.values())

    @cached_property
    def linears(self) -> tuple[LinearWeights, ...]:
        """Every linear, in the order of `ModelSpec.linears`."""
        first = () if self.fusion is None else self.fusion.linears.values()
        return (*first, *self.step_linears)

    @cached_property
    def embedding_factor(self) -> torch.Tensor:
        """What embedded rows are multiplied by, float32 [1, 1] in host memory."""
        return torch.full((1, 1), self.spec.embedding_scale, dtype=torch.float32, device="cpu")

    def linear(self, name: str) -> LinearWeights:
        """A linear by its shard name."""
        return next(weights for weights in self.linears if weights.spec.name == name)


def capped(logits: torch.Tensor, cap: float) -> torch.Tensor:
    """Logits under a model's soft cap, in place; as they are where the cap is 0."""
    return logits.div_(cap).tanh_().mul_(cap) if cap else logits


def embed(lanes: Lanes, weights: ModelWeights, token_ids: torch.Tensor, residual: Activation) -> None:
    """Start the residual stream with the rows of `token_ids` int64 [rows]; on its way to a GPU it passes the host
    side. Without a GPU all of it is the CPU's operations, so that a recorded step begins with it."""
    residual, scale = residual.columns(0, weights.spec.hidden_size), weights.spec.embedding_scale
    if lanes.device is not None and format_of(weights.embed_format).is_row_major:
        residual.host.copy_(weights.embed[token_ids])  # the CPU's operations may be the host worker's now
    else:
        lanes.host_ops.unpack_rows(weights.embed, weights.embed_format, token_ids, residual.host)
    if scale != 1.0 and lanes.device is not None:
        residual.host.mul_(scale)
    elif scale != 1.0:
        lanes.host_ops.scale_rows(weights.embedding_factor.expand(len(token_ids), 1), residual.host)
    if lanes.device is not None:
        lanes.copy(residual.device, residual.host)
