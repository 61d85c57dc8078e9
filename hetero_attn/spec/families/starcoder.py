"""StarCoder2: layer norms with a bias, an MLP without a gate, and biases everywhere."""

from collections.abc import Mapping
from typing import Any

from hetero_attn.spec.families.family import Family, GgufTerms
from hetero_attn.spec.families.windows import WINDOW_KEYS, gguf_one_window, one_window
from hetero_attn.spec.tensor_names import TensorNames


def starcoder2_terms(fields: Any, found: Mapping[str, Any]) -> dict[str, Any]:
    """Its norms and its MLP."""
    return {"layer_norm": True, "norm_bias": True, "gated": False}


def starcoder2_gguf(fields: Any, found: Mapping[str, Any]) -> dict[str, Any]:
    """The same from a GGUF file, which names no activation."""
    window = gguf_one_window(fields, found["num_layers"])
    return starcoder2_terms(fields, found) | {"hidden_act": "gelu_tanh", "sliding_window": window}


STARCODER2 = Family(
    "Starcoder2ForCausalLM",
    {
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "norm_epsilon": 1e-5,
        "hidden_act": "gelu_pytorch_tanh",
        "use_bias": True,
        "tie_word_embeddings": True,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
    },
    qkv_bias="use_bias",
    o_bias="use_bias",
    mlp_bias="use_bias",
    eps_key="norm_epsilon",
    windows=one_window,
    terms=starcoder2_terms,
    tensor_names=TensorNames(layer_parts=(("mlp.c_fc", "up"), ("mlp.c_proj", "down"))),
    gguf=GgufTerms(
        "starcoder2", WINDOW_KEYS[:1], starcoder2_gguf, eps_key=".attention.layer_norm_epsilon", needs_keys=False
    ),
)
