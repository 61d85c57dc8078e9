"""The decoder families, each one declaration: what its config leaves unsaid, and what it computes beside Llama.

Every default is that of transformers for a key that the family's config.json does not have.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hetero_attn.errors import ConfigError, UnsupportedModelError
from hetero_attn.spec.json_fields import JsonFields, show
from hetero_attn.spec.limits import MAX_CONTEXT
from hetero_attn.spec.rope_config import RopeConfig, read_rope, rope_from, rope_object
from hetero_attn.spec.tensor_names import TensorNames

FULL, SLIDING = "full_attention", "sliding_attention"
Windows = Callable[[JsonFields, int], tuple[int, ...]]


def no_windows(fields: JsonFields, num_layers: int) -> tuple[int, ...]:
    """Every token sees all before it, whatever the config says of windows."""
    return (0,) * num_layers


def one_window(fields: JsonFields, num_layers: int) -> tuple[int, ...]:
    """The same window in every layer."""
    return (fields.integer("sliding_window", MAX_CONTEXT, 0),) * num_layers


def windows_from(first_key: str) -> Windows:
    """Windows of the layers that layer_types names, else of those from the layer `first_key` on, where they are
    used."""

    def windows(fields: JsonFields, num_layers: int) -> tuple[int, ...]:
        window = fields.integer("sliding_window", MAX_CONTEXT, 0)
        if not fields.boolean("use_sliding_window"):
            window = 0
        if fields.get("layer_types") is not None:
            return windows_of_types(fields, fields.get("layer_types"), window, num_layers)
        first = fields.integer(first_key, MAX_CONTEXT, 28, low=0)
        return tuple(window if layer >= first else 0 for layer in range(num_layers))

    return windows


def windows_every(period_key: str) -> Windows:
    """Windows of the layers that layer_types names, else of all but every `period_key`-th."""

    def windows(fields: JsonFields, num_layers: int) -> tuple[int, ...]:
        window = fields.integer("sliding_window", MAX_CONTEXT, 0)
        period = fields.integer(period_key, MAX_CONTEXT)
        types = fields.get("layer_types")
        if types is None:
            types = [SLIDING if (layer + 1) % period else FULL for layer in range(num_layers)]
        return windows_of_types(fields, types, window, num_layers)

    return windows


def windows_of_types(fields: JsonFields, layer_types: Any, window: int, num_layers: int) -> tuple[int, ...]:
    """The window of every layer by the name of its kind; raises for other kinds, or windows of no size."""
    known = (FULL, SLIDING)
    if not isinstance(layer_types, list) or len(layer_types) != num_layers:
        fields.fail("layer_types", layer_types, f"a list of num_hidden_layers = {num_layers} names")
    for name in layer_types:
        if name not in known:
            raise UnsupportedModelError(
                f"{fields.path}: layer type {show(name)} is not supported. Known layer types: {', '.join(known)}"
            )
    if SLIDING in layer_types and not window:
        raise ConfigError(
            f"{fields.path}: layer_types has sliding_attention, but sliding_window is null or use_sliding_window "
            "false; set both or use full_attention"
        )
    return tuple(window if name == SLIDING else 0 for name in layer_types)


def nothing_more(fields: JsonFields, found: Mapping[str, Any]) -> dict[str, Any]:
    """No term beside those of Llama."""
    return {}


@dataclass(frozen=True, slots=True)
class Family:
    """What differs between the families.

    qkv_bias, o_bias, mlp_bias: whether the linears have one, or the key that decides. windows: the sliding window of
    each layer. rope: (fields, head_dim, max_position_embeddings) -> the rotary embedding of layers that see everything.
    terms: (fields, the fields of ModelConfig so far) -> those that Llama leaves at their defaults, and better ones.
    wrapper: model_type and architecture of a model of text and images whose text model is of this family.
    tensor_names: what its files call the tensors.
    """

    architecture: str
    defaults: Mapping[str, Any]
    qkv_bias: bool | str = "attention_bias"
    o_bias: bool | str = "attention_bias"
    mlp_bias: bool | str = False
    qk_norm: bool = False
    act_key: str = "hidden_act"
    windows: Windows = no_windows
    rope: Callable[[JsonFields, int, int], RopeConfig] = read_rope
    terms: Callable[[JsonFields, Mapping[str, Any]], dict[str, Any]] = nothing_more
    wrapper: tuple[str, str] | None = None
    tensor_names: TensorNames = TensorNames()


def gemma3_rope(fields: JsonFields, head_dim: int, max_position_embeddings: int) -> RopeConfig:
    """That of the layers that see everything."""
    return _gemma3_rope(fields, FULL, "rope_theta", 1e6, head_dim, max_position_embeddings)


def _gemma3_rope(fields: JsonFields, kind: str, key: str, theta: float, head_dim: int, context: int) -> RopeConfig:
    """From an object for each kind of layer, or from one that is only of layers that see everything."""
    found = rope_object(fields)
    by_kind = isinstance(found.get(kind), dict)
    own = found[kind] if by_kind else {} if kind == SLIDING or FULL in found or SLIDING in found else found
    return rope_from(fields, own, fields.number(key, 1.0, 1e15, theta), head_dim, context)


def gemma3_terms(fields: JsonFields, found: Mapping[str, Any]) -> dict[str, Any]:
    """Norms of 1 + w, also behind attention and MLP; a rotary embedding of their own in layers with a window."""
    for key in ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"):
        if fields.get(key):
            raise UnsupportedModelError(f"{fields.path}: {key} is {show(fields.get(key))}, which is not computed")
    local = _gemma3_rope(
        fields, SLIDING, "rope_local_base_freq", 1e4, found["head_dim"], found["max_position_embeddings"]
    )
    return {
        "layer_ropes": tuple(local if window else found["rope"] for window in found["sliding_window"]),
        "norm_offset": 1.0,
        "post_norms": True,
        "query_scale": fields.number("query_pre_attn_scalar", 0.0, 1e6) ** -0.5,
        "embedding_scale": found["hidden_size"] ** 0.5,
    }


GEMMA_NAMES = TensorNames(
    layer_parts=(
        ("post_attention_layernorm", "attention_post_norm"),
        ("pre_feedforward_layernorm", "mlp_norm"),
        ("post_feedforward_layernorm", "mlp_post_norm"),
    ),
    prefixes=("language_model.model.", "model.language_model."),
)

FAMILIES = {
    "llama": Family("LlamaForCausalLM", {"max_position_embeddings": 2048}, mlp_bias="mlp_bias"),
    "mistral": Family(
        "MistralForCausalLM",
        {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
        qkv_bias=False,
        o_bias=False,
        windows=one_window,
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096},
        qkv_bias=True,
        o_bias=False,
        windows=windows_from("max_window_layers"),
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096, "head_dim": 128},
        qk_norm=True,
        windows=windows_from("max_window_layers"),
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        {
            "vocab_size": 262208,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "max_position_embeddings": 131072,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "sliding_window_pattern": 6,
            "hidden_activation": "gelu_pytorch_tanh",
            "tie_word_embeddings": True,
            "bos_token_id": 2,
            "eos_token_id": 1,
            "pad_token_id": 0,
        },
        qk_norm=True,
        act_key="hidden_activation",
        windows=windows_every("sliding_window_pattern"),
        rope=gemma3_rope,
        terms=gemma3_terms,
        wrapper=("gemma3", "Gemma3ForConditionalGeneration"),
        tensor_names=GEMMA_NAMES,
    ),
}
