"""MiniMax-M2: q and k normed over all heads, a part of each head turned, experts by corrected sigmoids."""

from collections.abc import Mapping
from typing import Any

from hetero_attn.spec.experts_config import SIGMOID, gguf_experts, minimax_m2_experts
from hetero_attn.spec.families.family import Family, GgufTerms
from hetero_attn.spec.json_fields import JsonFields
from hetero_attn.spec.limits import MAX_HEAD_DIM
from hetero_attn.spec.rope_config import RopeConfig, read_rope
from hetero_attn.spec.tensor_names import TensorNames

WHOLE_NORMS = {"qk_norm": False, "qk_norm_whole": True}


def minimax_m2_rope(fields: JsonFields, head_dim: int, max_position_embeddings: int) -> RopeConfig:
    """The part of a head that rotary_dim, in the first files, or partial_rotary_factor says."""
    if (rotary_dim := fields.integer("rotary_dim", MAX_HEAD_DIM, None)) is not None:
        factor = {"partial_rotary_factor": rotary_dim / head_dim}
        fields = JsonFields(fields.path, factor | dict(fields.values), fields.defaults)
    return read_rope(fields, head_dim, max_position_embeddings, partial=True)


def minimax_m2_terms(fields: Any, found: Mapping[str, Any]) -> dict[str, Any]:
    """Of a config.json."""
    return {"experts": minimax_m2_experts(fields, found["num_layers"])} | WHOLE_NORMS


def minimax_m2_gguf(fields: Any, found: Mapping[str, Any]) -> dict[str, Any]:
    """Of a GGUF file."""
    return {"experts": gguf_experts(fields, found, normalised=True, gating=SIGMOID)} | WHOLE_NORMS


MINIMAX_M2 = Family(
    "MiniMaxM2ForCausalLM",
    {
        "num_hidden_layers": 62,
        "hidden_size": 3072,
        "intermediate_size": 1536,
        "num_attention_heads": 48,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 200064,
        "max_position_embeddings": 196608,
        "rms_norm_eps": 1e-6,
        "rope_theta": 5e6,
        "bos_token_id": 200034,
        "eos_token_id": 200020,
    },
    qkv_bias=False,
    o_bias=False,
    rope=minimax_m2_rope,
    terms=minimax_m2_terms,
    tensor_names=TensorNames(),
    gguf=GgufTerms("minimax-m2", (".expert_count",), minimax_m2_gguf),
)
