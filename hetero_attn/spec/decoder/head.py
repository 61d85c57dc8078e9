"""What the head of a model declares: a norm and the projection onto the vocabulary."""

from hetero_attn.spec.blocks import BufferSet, Declaration
from hetero_attn.spec.config import ModelConfig
from hetero_attn.spec.decoder.norms import norm_vectors
from hetero_attn.spec.tensor_names import tensor_name
from hetero_attn.spec.weight_formats import WeightFormats
from hetero_attn.spec.weights import BLOCK_FEATURES, LinearSpec, Part


class HeadDeclaration(Declaration):
    """The head; where it is tied, its weight is the token embedding."""

    kind = "head"
    layer = None

    def __init__(self, config: ModelConfig, formats: WeightFormats) -> None:
        tensor = tensor_name("embed" if config.tie_word_embeddings else "head")
        part = Part(tensor, BLOCK_FEATURES, self.rows_of(config), formats.of(tensor))
        self._config = config
        self.linears = (LinearSpec("head", "head", None, config.hidden_size, (part,), False, block="head"),)
        self.vectors = norm_vectors(config, "final_norm", None, config.logit_scale)
        self.buffers = (BufferSet("narrow", (("normed", config.hidden_size),)),)

    @staticmethod
    def rows_of(config: ModelConfig) -> int:
        """How many logits it gives: one a token, or of a head that drafts one for each that it may guess."""
        return config.vocab_size if config.eagle is None else config.eagle.draft_vocab_size
