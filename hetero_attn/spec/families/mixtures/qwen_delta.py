"""Qwen3-Next and Qwen3.5: gated DeltaNet in three of four layers, gated attention in the others, norms of 1 + w.

Of models of text and images the text alone, in which all parts of a rotary embedding of several axes are the same.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from hetero_attn.spec.delta_config import gguf_delta, read_delta
from hetero_attn.spec.experts_config import ExpertsConfig, gguf_experts, qwen3_5_moe_experts, qwen3_next_experts
from hetero_attn.spec.families.family import Family, GgufTerms
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


def delta_gguf(architecture: str, has_experts: bool, is_tiled: bool) -> GgufTerms:
    """Of GGUF files, whose norms hold 1 + w but for those of the heads' outputs. has_experts: whether every layer has
    them."""

    def terms(fields: Any, found: Mapping[str, Any]) -> dict[str, Any]:
        spare = fields.integer(".nextn_predict_layers", found["num_layers"] - 1, 0, low=0)
        layers = {"num_layers": found["num_layers"] - spare, "spare_layers": spare}
        delta = gguf_delta(fields, layers["num_layers"], found["num_layers"])
        return layers | {
            "sliding_window": (0,) * layers["num_layers"],
            "gated_attention": True,
            "delta": replace(delta, is_tiled=is_tiled),
            "experts": gguf_experts(fields, dict(found) | layers, normalised=True) if has_experts else None,
        }

    return GgufTerms(
        architecture,
        (".nextn_predict_layers", *((".expert_count",) if has_experts else ())),
        terms,
        parts=(
            ("post_attention_norm", "mlp_norm"),
            ("attn_gate", "delta_z"),
            ("ssm_beta", "delta_b"),
            ("ssm_alpha", "delta_a"),
            ("ssm_conv1d", "delta_conv"),
            ("ssm_norm", "delta_norm"),
            ("ssm_out", "delta_out"),
        ),
        fused=(("attn_qkv", ("delta_q", "delta_k", "delta_v")),),
        grouped=(
            ("attn_q", ("q", "q_gate")),
            ("ssm_in", ("delta_q", "delta_k", "delta_v", "delta_z")),
            ("ssm_ba", ("delta_b", "delta_a")),
        ),
        has_tiled_values=is_tiled,
    )


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
    gguf=delta_gguf("qwen3next", has_experts=True, is_tiled=False),
)
QWEN3_5 = Family(
    "Qwen3_5ForCausalLM",
    SIZES | {"vocab_size": 248320, "num_key_value_heads": 4, "intermediate_size": 12288},
    qk_norm=True,
    rope=phi3_rope,
    terms=delta_terms(None),
    wrapper=("qwen3_5", "Qwen3_5ForConditionalGeneration"),
    tensor_names=NAMES,
    gguf=delta_gguf("qwen35", has_experts=False, is_tiled=True),
)
QWEN3_5_MOE = Family(
    "Qwen3_5MoeForCausalLM",
    SIZES | {"vocab_size": 248320, "num_key_value_heads": 2, "intermediate_size": 512},
    qk_norm=True,
    rope=phi3_rope,
    terms=delta_terms(qwen3_5_moe_experts),
    wrapper=("qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration"),
    tensor_names=NAMES,
    gguf=delta_gguf("qwen35moe", has_experts=True, is_tiled=True),
)
