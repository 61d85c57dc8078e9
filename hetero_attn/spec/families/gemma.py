"""Gemma 2 and 3: norms of 1 + w, also behind attention and MLP; layers with a window between those without.

Gemma 2 has soft caps on scores and logits, Gemma 3 a rotary embedding of its own in layers with a window.
"""

from collections.abc import Mapping
from typing import Any

from hetero_attn.errors import UnsupportedModelError
from hetero_attn.spec.families.family import Family, GgufTerms
from hetero_attn.spec.families.layer_ropes import rope_of_kind, ropes_by_window
from hetero_attn.spec.families.windows import FULL, SLIDING, WINDOW_KEYS, gguf_windows, windows_every
from hetero_attn.spec.json_fields import JsonFields, show
from hetero_attn.spec.rope_config import RopeConfig
from hetero_attn.spec.tensor_names import TensorNames

LARGEST_LAYERS, LARGEST_LAYERS_2 = 62, 46  # of the models of 27B, whose scale llama.cpp takes from the width
CAP_KEYS = (".attn_logit_softcapping", ".final_logit_softcapping")
MOST_CAP = 1e6


def gemma2_terms(fields: JsonFields, found: Mapping[str, Any]) -> dict[str, Any]:
    """Norms of 1 + w, also behind attention and MLP; soft caps, null for none."""
    _refuse(fields, "use_bidirectional_attention")
    return _norms(fields, found) | {
        "attention_cap": fields.number("attn_logit_softcapping", 0.0, MOST_CAP, 0.0),
        "logit_cap": fields.number("final_logit_softcapping", 0.0, MOST_CAP, 0.0),
    }


def gemma2_gguf(fields: Any, found: Mapping[str, Any]) -> dict[str, Any]:
    """The same from a GGUF file, whose norms hold 1 + w."""
    return _gguf_norms(found, LARGEST_LAYERS_2) | {
        "sliding_window": gguf_windows(fields, found["num_layers"], period=2, absent=4096),
        "attention_cap": fields.number(CAP_KEYS[0], 0.0, MOST_CAP, 50.0),
        "logit_cap": fields.number(CAP_KEYS[1], 0.0, MOST_CAP, 30.0),
    }


def _refuse(fields: JsonFields, *keys: str) -> None:
    for key in keys:
        if fields.get(key):
            raise UnsupportedModelError(f"{fields.path}: {key} is {show(fields.get(key))}, which is not computed")


def _norms(fields: JsonFields, found: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "norm_offset": 1.0,
        "post_norms": True,
        "query_scale": fields.number("query_pre_attn_scalar", 0.0, 1e6) ** -0.5,
        "embedding_scale": found["hidden_size"] ** 0.5,
    }


def _gguf_norms(found: Mapping[str, Any], largest_layers: int) -> dict[str, Any]:
    """largest_layers: of the model whose scale llama.cpp takes from the width."""
    is_largest = found["num_layers"] == largest_layers
    width = found["hidden_size"] // found["num_heads"] if is_largest else found["head_dim"]
    return {
        "hidden_act": "gelu_tanh",
        "post_norms": True,
        "query_scale": width**-0.5,
        "embedding_scale": found["hidden_size"] ** 0.5,
    }


def gemma3_rope(fields: JsonFields, head_dim: int, max_position_embeddings: int) -> RopeConfig:
    """That of the layers that see everything."""
    return rope_of_kind(fields, FULL, "rope_theta", 1e6, head_dim, max_position_embeddings)


def gemma3_terms(fields: JsonFields, found: Mapping[str, Any]) -> dict[str, Any]:
    """Norms of 1 + w, also behind attention and MLP; a rotary embedding of their own in layers with a window."""
    _refuse(fields, "attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention")
    local = rope_of_kind(
        fields, SLIDING, "rope_local_base_freq", 1e4, found["head_dim"], found["max_position_embeddings"]
    )
    return ropes_by_window(found["sliding_window"], local, found["rope"]) | _norms(fields, found)


def gemma3_gguf(fields: Any, found: Mapping[str, Any]) -> dict[str, Any]:
    """The same from a GGUF file, whose norms hold 1 + w."""
    windows = gguf_windows(fields, found["num_layers"], period=6)
    local = RopeConfig(found["rope"].rotary_dim, theta=fields.number(".rope.freq_base_swa", 1.0, 1e15, 1e4))
    scaled = _gguf_norms(found, LARGEST_LAYERS)
    return ropes_by_window(windows, local, found["rope"]) | scaled | {"sliding_window": windows}


GEMMA_NAMES = TensorNames(
    layer_parts=(
        ("post_attention_layernorm", "attention_post_norm"),
        ("pre_feedforward_layernorm", "mlp_norm"),
        ("post_feedforward_layernorm", "mlp_post_norm"),
    ),
    prefixes=("language_model.model.", "model.language_model."),
)

GEMMA2 = Family(
    "Gemma2ForCausalLM",
    {
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 2,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
    },
    act_key="hidden_activation",
    windows=windows_every("sliding_window_pattern"),
    terms=gemma2_terms,
    tensor_names=GEMMA_NAMES,
    gguf=GgufTerms("gemma2", (*WINDOW_KEYS, *CAP_KEYS), gemma2_gguf),
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
