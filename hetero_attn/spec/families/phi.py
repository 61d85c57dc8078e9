"""Phi-3 and Phi-4: q, k and v in one tensor, gate and up in another; a part of each head is turned, by longrope."""

from collections.abc import Mapping
from typing import Any

from hetero_attn.spec.families.family import Family, GgufTerms
from hetero_attn.spec.families.windows import WINDOW_KEYS, gguf_one_window, one_window
from hetero_attn.spec.json_fields import JsonFields
from hetero_attn.spec.rope_config import RopeConfig, read_rope
from hetero_attn.spec.tensor_names import TensorNames

QKV, GATE_UP = ("q", "k", "v"), ("gate", "up")


def phi3_rope(fields: JsonFields, head_dim: int, max_position_embeddings: int) -> RopeConfig:
    """The part of a head that partial_rotary_factor says."""
    return read_rope(fields, head_dim, max_position_embeddings, partial=True)


def phi3_gguf(fields: Any, found: Mapping[str, Any]) -> dict[str, Any]:
    """The one window, 0 where there is none."""
    return {"sliding_window": gguf_one_window(fields, found["num_layers"])}


PHI3 = Family(
    "Phi3ForCausalLM",
    {
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 32000,
        "pad_token_id": 32000,
    },
    qkv_bias=False,
    o_bias=False,
    windows=one_window,
    rope=phi3_rope,
    tensor_names=TensorNames(fused=(("self_attn.qkv_proj", QKV), ("mlp.gate_up_proj", GATE_UP))),
    gguf=GgufTerms("phi3", WINDOW_KEYS[:1], phi3_gguf, fused=(("attn_qkv", QKV), ("ffn_up", GATE_UP))),
)
