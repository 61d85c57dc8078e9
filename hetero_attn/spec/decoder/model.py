"""The decoder families as lists of blocks, of any classes that declare what those of this folder do."""

from collections.abc import Callable
from typing import Any, NamedTuple

from hetero_attn.spec.blocks import ModelSpec, Vector
from hetero_attn.spec.config import ModelConfig
from hetero_attn.spec.decoder.attention import AttentionDeclaration
from hetero_attn.spec.decoder.beside import BesideDeclaration
from hetero_attn.spec.decoder.delta import DeltaDeclaration
from hetero_attn.spec.decoder.eagle import EagleAttentionDeclaration, FusionDeclaration
from hetero_attn.spec.decoder.experts import ExpertsDeclaration
from hetero_attn.spec.decoder.head import HeadDeclaration
from hetero_attn.spec.decoder.mlp import MlpDeclaration
from hetero_attn.spec.delta_config import DeltaConfig
from hetero_attn.spec.experts_config import ExpertsConfig
from hetero_attn.spec.tensor_names import tensor_name
from hetero_attn.spec.weight_formats import WeightFormats, weight_formats


class BlockKinds(NamedTuple):
    """The classes of a model's blocks: those of this folder, or theirs that also compute."""

    attention: Callable[[ModelConfig, int, WeightFormats], Any]
    mlp: Callable[[ModelConfig, int, WeightFormats], Any]
    experts: Callable[[ModelConfig, ExpertsConfig, int, WeightFormats], Any]
    head: Callable[[ModelConfig, WeightFormats], Any]
    delta: Callable[[ModelConfig, DeltaConfig, int, WeightFormats], Any]
    eagle_attention: Callable[[ModelConfig, int, WeightFormats], Any]
    fusion: Callable[[ModelConfig, WeightFormats], Any]
    beside: Callable[[ModelConfig, ExpertsConfig, int, WeightFormats], Any]


DECLARED = BlockKinds(
    AttentionDeclaration,
    MlpDeclaration,
    ExpertsDeclaration,
    HeadDeclaration,
    DeltaDeclaration,
    EagleAttentionDeclaration,
    FusionDeclaration,
    BesideDeclaration,
)
OF_HEADS = ("d2t", "t2d")  # tables of a head that drafts, which are no weights


def model_spec(config: ModelConfig, formats: str | WeightFormats = "bf16", kinds: BlockKinds = DECLARED) -> ModelSpec:
    """The blocks of a model with this configuration. formats: of the weights, or the one of all of them; widths do not
    depend on it. kinds: what the blocks are made of."""
    formats = weight_formats(formats)

    def feed_forward(layer: int) -> Any:
        if config.experts is not None and config.experts.layers[layer]:
            kind = kinds.beside if config.experts.beside_mlp else kinds.experts
            return kind(config, config.experts, layer, formats)
        return kinds.mlp(config, layer, formats)

    def mixer(layer: int) -> Any:
        if config.delta is not None and config.delta.layers[layer]:
            return kinds.delta(config, config.delta, layer, formats)
        kind = kinds.attention if config.eagle is None else kinds.eagle_attention
        return kind(config, layer, formats)

    return ModelSpec(
        embedding=Vector("embed", tensor_name("embed"), config.hidden_size),
        vocab_size=config.vocab_size,
        embedding_scale=config.embedding_scale,
        layers=tuple((mixer(layer), feed_forward(layer)) for layer in range(config.num_layers)),
        head=kinds.head(config, formats),
        spare_layers=config.spare_layers,
        fusion=None if config.eagle is None else kinds.fusion(config, formats),
        owns_embedding=config.eagle is None or config.eagle.owns_embedding,
        spare_tensors=() if config.eagle is None else OF_HEADS,
    )
