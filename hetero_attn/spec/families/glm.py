"""GLM-4, dense: norms behind attention and MLP, half of each head turned, in pairs that lie side by side."""

from collections.abc import Mapping
from typing import Any

from hetero_attn.spec.families.family import Family, GgufTerms
from hetero_attn.spec.families.phi import GATE_UP, phi3_rope
from hetero_attn.spec.tensor_names import TensorNames


def glm4_terms(fields: Any, found: Mapping[str, Any]) -> dict[str, Any]:
    """Norms behind attention and MLP."""
    return {"post_norms": True}


GLM4 = Family(
    "Glm4ForCausalLM",
    {
        "num_key_value_heads": 2,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 0.00000015625,
        "attention_bias": True,
        "partial_rotary_factor": 0.5,
        "eos_token_id": [151329, 151336, 151338],
        "pad_token_id": 151329,
    },
    o_bias=False,
    rope=phi3_rope,
    terms=glm4_terms,
    tensor_names=TensorNames(
        layer_parts=(("post_self_attn_layernorm", "attention_post_norm"), ("post_mlp_layernorm", "mlp_post_norm")),
        fused=(("mlp.gate_up_proj", GATE_UP),),
        is_turned=True,
    ),
    gguf=GgufTerms("glm4", terms=glm4_terms, is_turned=True, fused=(("ffn_up", GATE_UP),)),
)
