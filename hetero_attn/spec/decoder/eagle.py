"""What the blocks of an EAGLE-3 head declare beside those of a layer of Llama: what it makes of the hidden states that
it is handed, and an attention that sees the embedding of the next token beside that."""

from dataclasses import replace

from hetero_attn.spec.blocks import BufferSet, Declaration, Vector
from hetero_attn.spec.config import ModelConfig
from hetero_attn.spec.decoder.attention import AttentionDeclaration
from hetero_attn.spec.draft_heads.eagle_config import NORM_EACH, ONE_NORM
from hetero_attn.spec.tensor_names import tensor_name
from hetero_attn.spec.weight_formats import WeightFormats
from hetero_attn.spec.weights import BLOCK_FEATURES, LinearSpec, Part

EMBEDDED, BOTH, TAKEN, FUSED = "embedded", "embedded_and_hidden", "taken", "fused"  # buffers


class FusionDeclaration(Declaration):
    """fc, in a pass of its own: one row of the head from the hidden states of one token."""

    kind = "fusion"
    layer = 0

    def __init__(self, config: ModelConfig, formats: WeightFormats) -> None:
        self._config, self.eagle = config, config.eagle
        tensor = tensor_name("fusion")
        part = Part(tensor, BLOCK_FEATURES, config.hidden_size, formats.of(tensor))
        self.fc = LinearSpec("layers.0.fusion", "fusion", 0, self.eagle.fusion_width, (part,), False, block="fusion")
        self.linears = (self.fc,)
        self.vectors = tuple(_norms(config))
        self.buffers = (BufferSet("wide", ((TAKEN, self.eagle.fusion_width), (FUSED, self.fc.out_features))),)


class EagleAttentionDeclaration(AttentionDeclaration):
    """The attention of the head; q, k and v are made of [norm(embedding), norm(residual)]."""

    small_calls = 4  # two norms and a copy; rotation with the append to the cache
    reorders = False

    def __init__(self, config: ModelConfig, layer: int, formats: WeightFormats) -> None:
        super().__init__(config, layer, formats)
        self.qkv = replace(self.qkv, in_features=2 * config.hidden_size)
        self.linears = (self.qkv, self.o)
        self.vectors += (Vector("hidden_norm", tensor_name("hidden_norm", layer), config.hidden_size),)
        self.buffers += (
            BufferSet("narrow", ((BOTH, 2 * config.hidden_size),)),
            BufferSet("embedded", ((EMBEDDED, config.hidden_size),)),
        )


def _norms(config: ModelConfig) -> list[Vector]:
    eagle = config.eagle
    if eagle.fusion_norm == ONE_NORM:
        return [Vector("norm", tensor_name("fusion_norm"), eagle.fusion_width)]
    each = range(eagle.taps if eagle.fusion_norm == NORM_EACH else 0)
    return [Vector(f"norm_{place}", f"fc_norm.{place}.weight", eagle.target_hidden_size) for place in each]
