"""Qwen3-Next and Qwen3.5: gated DeltaNet in three of four layers, gated attention in the others, norms of 1 + w.

Of models of text and images the text alone, in which all parts of a rotary embedding of several axes are the same.
"""

from collections.abc import Callable, Mapping
from typing import Any

from hetero_attn.spec.delta_config import read_delta
from hetero_attn.spec.experts_config import ExpertsConfig, qwen3_5_moe_experts, qwen3_next_experts
from hetero_attn.spec.families.family import Family
from hetero_attn.spec.families.phi import phi3_rope
from hetero_attn.spec.json_fields import JsonFields
from hetero_attn.spec.tensor_names import TensorNames


def delta_terms(
    experts: Callable[[JsonFields, int], ExpertsConfig] | None,
) -> Callable[[JsonFields, Mapping[str, Any]], dict[str, Any]]:
    """Of a config.json; experts: what reads them, None for a dense model."""

    def terms(fields: JsonFields, found: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "norm_offset": 1.0,
            "gated_attention": True,
            "delta": read_delta(fields, found["num_layers"]),
            "experts": None if experts is None else experts(fields, found["num_layers"]),
        }

    return terms


QUERIES = ("self_attn.q_proj", ("q", "q_gate"))
NEXT_NAMES = TensorNames(
    grouped=(
        QUERIES,
        ("linear_attn.in_proj_qkvz", ("delta_q", "delta_k", "delta_v", "delta_z")),
        ("linear_attn.in_proj_ba", ("delta_b", "delta_a")),
    ),
)
NAMES = TensorNames(
    layer_parts=tuple((f"linear_attn.in_proj_{part}", f"delta_{part}") for part in ("z", "b", "a")),
    prefixes=("model.language_model.",),
    fused=(("linear_attn.in_proj_qkv", ("delta_q", "delta_k", "delta_v")),),
    grouped=(QUERIES,),
)
SIZES = {
    "num_attention_heads": 16,
    "head_dim": 256,
    "max_position_embeddings": 32768,
    "partial_rotary_factor": 0.25,
}
QWEN3_NEXT = Family(
    "Qwen3NextForCausalLM",
    SIZES | {"num_key_value_heads": 2, "intermediate_size": 5632},
    qk_norm=True,
    rope=phi3_rope,
    terms=delta_terms(qwen3_next_experts),
    tensor_names=NEXT_NAMES,
)
QWEN3_5 = Family(
    "Qwen3_5ForCausalLM",
    SIZES | {"vocab_size": 248320, "num_key_value_heads": 4, "intermediate_size": 12288},
    qk_norm=True,
    rope=phi3_rope,
    terms=delta_terms(None),
    wrapper=("qwen3_5", "Qwen3_5ForConditionalGeneration"),
    tensor_names=NAMES,
)
QWEN3_5_MOE = Family(
    "Qwen3_5MoeForCausalLM",
    SIZES | {"vocab_size": 248320, "num_key_value_heads": 2, "intermediate_size": 512},
    qk_norm=True,
    rope=phi3_rope,
    terms=delta_terms(qwen3_5_moe_experts),
    wrapper=("qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration"),
    tensor_names=NAMES,
)
