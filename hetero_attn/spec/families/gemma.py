"""Gemma 3: norms of 1 + w, also behind attention and MLP; five layers with a window to one without."""

from collections.abc import Mapping
from typing import Any

from hetero_attn.errors import UnsupportedModelError
from hetero_attn.spec.families.family import Family, GgufTerms
from hetero_attn.spec.families.layer_ropes import rope_of_kind, ropes_by_window
from hetero_attn.spec.families.windows import FULL, SLIDING, WINDOW_KEYS, gguf_windows, windows_every
from hetero_attn.spec.json_fields import JsonFields, show
from hetero_attn.spec.rope_config import RopeConfig
from hetero_attn.spec.tensor_names import TensorNames

LARGEST_LAYERS = 62  # of the model whose scale llama.cpp takes from the width, 27B


def gemma3_rope(fields: JsonFields, head_dim: int, max_position_embeddings: int) -> RopeConfig:
    """That of the layers that see everything."""
    return rope_of_kind(fields, FULL, "rope_theta", 1e6, head_dim, max_position_embeddings)


def gemma3_terms(fields: JsonFields, found: Mapping[str, Any]) -> dict[str, Any]:
    """Norms of 1 + w, also behind attention and MLP; a rotary embedding of their own in layers with a window."""
    for key in ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"):
        if fields.get(key):
            raise UnsupportedModelError(f"{fields.path}: {key} is {show(fields.get(key))}, which is not computed")
    local = rope_of_kind(
        fields, SLIDING, "rope_local_base_freq", 1e4, found["head_dim"], found["max_position_embeddings"]
    )
    return ropes_by_window(found["sliding_window"], local, found["rope"]) | {
        "norm_offset": 1.0,
        "post_norms": True,
        "query_scale": fields.number("query_pre_attn_scalar", 0.0, 1e6) ** -0.5,
        "embedding_scale": found["hidden_size"] ** 0.5,
    }


def gemma3_gguf(fields: Any, found: Mapping[str, Any]) -> dict[str, Any]:
    """The same from a GGUF file, whose norms hold 1 + w."""
    layers, windows = found["num_layers"], gguf_windows(fields, found["num_layers"], period=6)
    local = RopeConfig(found["rope"].rotary_dim, theta=fields.number(".rope.freq_base_swa", 1.0, 1e15, 1e4))
    width = found["hidden_size"] // found["num_heads"] if layers == LARGEST_LAYERS else found["head_dim"]
    return ropes_by_window(windows, local, found["rope"]) | {
        "sliding_window": windows,
        "hidden_act": "gelu_tanh",
        "post_norms": True,
        "query_scale": width**-0.5,
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

GEMMA3 = Family(
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
    gguf=GgufTerms("gemma3", (*WINDOW_KEYS, ".rope.freq_base_swa"), gemma3_gguf),
)
