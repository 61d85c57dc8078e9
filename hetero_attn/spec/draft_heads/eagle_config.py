"""What a config says of an EAGLE-3 head: one layer that drafts from what a large model computed (arXiv 2503.01840).

g = fc(norm?(hidden states of some layers of the large model)), or of a drafted token the head's own hidden state
h = g + o(attention(qkv([norm(embedding of the next token), norm(g)]))),   h += mlp(norm(h))
logits over the head's own vocabulary = lm_head(norm(h))
"""

from dataclasses import dataclass
from typing import Any

from hetero_attn.errors import UnsupportedModelError
from hetero_attn.spec.json_fields import JsonFields, show
from hetero_attn.spec.limits import MAX_HIDDEN, MAX_LAYERS, MAX_VOCAB

ARCHITECTURES = ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM", "Eagle3Speculator", "Eagle3DraftModel")
UNNAMED = (None, "LlamaForCausalLM")
LAYERS = "eagle_aux_hidden_state_layer_ids"
LAYER_TYPES = ("llama", "eagle", "eagle3")  # names of the one kind of layer
MOST_TAPS = 16
NO_NORM, ONE_NORM, NORM_EACH = "none", "one", "each"


@dataclass(frozen=True, slots=True)
class EagleConfig:
    """How a head differs from one layer of Llama.

    draft_vocab_size: of its own vocabulary. target_hidden_size: width of the large model. layer_ids: layers of the
    large model, None for the usual ones; takes_outputs: whether they name layers by what they give, rather than by
    what they take. fusion_norm: in front of fc: "none", "one" over all that it takes, or "each" of the hidden states
    its own. norm_before_residual: whether the residual stream begins with g normalised. norm_output: whether a drafted
    token's hidden state is handed on normalised. owns_embedding: whether its files have one, else the large model's
    serves.
    """

    draft_vocab_size: int
    target_hidden_size: int
    layer_ids: tuple[int, ...] | None = None
    takes_outputs: bool = False
    fusion_norm: str = NO_NORM
    norm_before_residual: bool = False
    norm_output: bool = False
    owns_embedding: bool = True

    @property
    def taps(self) -> int:
        """How many hidden states of the large model it takes."""
        return 3 if self.layer_ids is None else len(self.layer_ids)

    @property
    def fusion_width(self) -> int:
        """Numbers that it takes of a token of the large model."""
        return self.taps * self.target_hidden_size

    def tapped(self, num_layers: int) -> tuple[int, ...]:
        """Before which layers of a model of so many the hidden states are taken; num_layers is behind the last."""
        if self.layer_ids is None:
            return 2, num_layers // 2, num_layers - 3
        return tuple(layer + self.takes_outputs for layer in self.layer_ids)


def is_head(fields: JsonFields) -> bool:
    """Whether a config is that of an EAGLE-3 head; the first ones called themselves Llama, of one layer with another
    vocabulary."""
    if _architecture(fields) in UNNAMED:
        return fields.get("draft_vocab_size") is not None and fields.get("num_hidden_layers") == 1
    return _architecture(fields) in ARCHITECTURES


def check_known_head(fields: JsonFields) -> None:
    """Raise UnsupportedModelError for a head of another kind, which no family is."""
    name = _architecture(fields)
    if name not in ARCHITECTURES and fields.get("draft_vocab_size") is not None:
        raise UnsupportedModelError(
            f"{fields.path}: architecture {show(name)} is a head that drafts in a way that is not computed. Known "
            f"heads: {', '.join(ARCHITECTURES)}"
        )


def layer_fields(fields: JsonFields) -> JsonFields:
    """The config of a head with what it says of its layer beside the rest, where that stands in a part of its own."""
    layer = fields.get("transformer_layer_config")
    around = {key: value for key, value in fields.values.items() if value is not None}
    values = around if not isinstance(layer, dict) else layer | around
    kind = (layer if isinstance(layer, dict) else values).get("model_type", "llama")
    if kind not in LAYER_TYPES:
        raise UnsupportedModelError(
            f"{fields.path}: the layer of this head is of model_type {show(kind)}; only that of llama is computed"
        )
    return JsonFields(fields.path, values)


def read_eagle(fields: JsonFields, hidden_size: int, vocab_size: int) -> EagleConfig:
    """The terms of a head, from fields as `layer_fields` gives them. hidden_size, vocab_size: those of the config."""
    inner = fields.get("eagle_config")
    inner = JsonFields(fields.path, inner if isinstance(inner, dict) else {})
    takes_outputs = fields.get(LAYERS) is None
    if not inner.boolean("use_aux_hidden_state", True):
        raise UnsupportedModelError(f"{fields.path}: a head without hidden states of several layers is not computed")
    before_fc = fields.boolean("norm_before_fc", inner.boolean("norm_before_fc"))
    each = fields.boolean("fc_norm", inner.boolean("fc_norm"))
    return EagleConfig(
        draft_vocab_size=fields.integer("draft_vocab_size", min(MAX_VOCAB, vocab_size), vocab_size),
        target_hidden_size=fields.integer("target_hidden_size", MAX_HIDDEN, hidden_size),
        layer_ids=_layer_ids(inner if takes_outputs else fields),
        takes_outputs=takes_outputs,
        fusion_norm=NORM_EACH if each else ONE_NORM if before_fc else NO_NORM,
        norm_before_residual=fields.boolean("norm_before_residual", inner.boolean("norm_before_residual")),
        norm_output=fields.boolean("norm_output", inner.boolean("norm_output")),
    )


def _layer_ids(fields: JsonFields) -> tuple[int, ...] | None:
    found: Any = fields.get(LAYERS)
    if found is None:
        return None
    whole = isinstance(found, list) and all(isinstance(each, int) and not isinstance(each, bool) for each in found)
    if not whole or not 1 <= len(found) <= MOST_TAPS or not all(0 <= each <= MAX_LAYERS for each in found):
        fields.fail(LAYERS, found, f"1 to {MOST_TAPS} layers of the large model")
    return tuple(found)


def _architecture(fields: JsonFields) -> Any:
    listed = fields.get("architectures")
    return listed[0] if isinstance(listed, list) and listed else None
