"""GLM-4.5 to 4.7: half of each head turned, first layers dense, experts by corrected sigmoids beside a shared one.

Files may have layers behind the model's that predict further tokens; they are left alone.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hetero_attn.spec.experts_config import GLM_EPS, MAX_EXPERTS, SIGMOID, gguf_experts, glm4_moe_experts
from hetero_attn.spec.families.family import Family, GgufTerms
from hetero_attn.spec.families.phi import phi3_rope
from hetero_attn.spec.limits import MAX_LAYERS
from hetero_attn.spec.tensor_names import TensorNames


def glm4_moe_terms(fields: Any, found: Mapping[str, Any]) -> dict[str, Any]:
    """Of a config.json."""
    return {
        "experts": glm4_moe_experts(fields, found["num_layers"]),
        "qk_norm": fields.boolean("use_qk_norm"),
        "spare_layers": fields.integer("num_nextn_predict_layers", MAX_LAYERS, 1, low=0),
    }


def glm4_moe_gguf(fields: Any, found: Mapping[str, Any]) -> dict[str, Any]:
    """Of a GGUF file, which counts the layers that predict further tokens among the model's."""
    spare = fields.integer(".nextn_predict_layers", found["num_layers"] - 1, 0, low=0)
    layers = {"num_layers": found["num_layers"] - spare, "spare_layers": spare}
    dense = fields.integer(".leading_dense_block_count", MAX_LAYERS, 0, low=0)
    groups = fields.integer(".expert_group_count", MAX_EXPERTS, 1)
    experts = gguf_experts(fields, dict(found) | layers, normalised=False, gating=SIGMOID)
    experts = replace(
        experts,
        shared_width=experts.width * fields.integer(".expert_shared_count", MAX_EXPERTS, 1),
        layers=tuple(layer >= dense for layer in range(layers["num_layers"])),
        shared_factor=False,
        groups=groups,
        kept_groups=fields.integer(".expert_group_used_count", groups, groups),
        eps=GLM_EPS,
    )
    if experts.experts % groups or experts.kept_groups * (experts.experts // groups) < experts.per_row:
        fields.fail(".expert_group_count", groups, f"groups of {experts.experts} experts that hold a row's")
    return {"experts": experts, "sliding_window": (0,) * layers["num_layers"]} | layers


GLM4_MOE = Family(
    "Glm4MoeForCausalLM",
    {
        "num_hidden_layers": 46,
        "hidden_size": 4096,
        "intermediate_size": 10944,
        "num_attention_heads": 96,
        "num_key_value_heads": 8,
        "vocab_size": 151552,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
    },
    o_bias=False,
    rope=phi3_rope,
    terms=glm4_moe_terms,
    tensor_names=TensorNames(
        layer_parts=tuple((f"mlp.shared_experts.{part}_proj", f"shared_{part}") for part in ("gate", "up", "down")),
    ),
    gguf=GgufTerms(
        "glm4moe",
        (".expert_count", ".nextn_predict_layers"),
        glm4_moe_gguf,
        parts=(("post_attention_norm", "mlp_norm"),),
    ),
)
