"""The families whose layers have experts in the place of an MLP."""

from collections.abc import Callable, Mapping
from typing import Any

from hetero_attn.spec.experts_config import (
    ExpertsConfig,
    gguf_experts,
    mixtral_experts,
    olmoe_experts,
    qwen2_moe_experts,
    qwen3_moe_experts,
)
from hetero_attn.spec.families.family import Family, GgufTerms
from hetero_attn.spec.families.windows import FULL, SLIDING, no_windows, one_window, windows_of_types
from hetero_attn.spec.json_fields import JsonFields
from hetero_attn.spec.limits import MAX_CONTEXT

EXPERT_COUNT = ".expert_count"


def with_experts(
    read: Callable[[JsonFields, int], ExpertsConfig],
) -> Callable[[JsonFields, Mapping[str, Any]], dict[str, Any]]:
    """The experts that `read` finds in a config."""
    return lambda fields, found: {"experts": read(fields, found["num_layers"])}


def gguf_with_experts(architecture: str, normalised: bool, is_turned: bool = False, **more: Any) -> GgufTerms:
    """GGUF files of a family: sizes from their metadata; whether weights are normalised, and `more`, from the
    architecture, as llama.cpp has it."""

    def terms(fields: Any, found: Mapping[str, Any]) -> dict[str, Any]:
        return {"experts": gguf_experts(fields, found, normalised)} | more

    return GgufTerms(architecture, (EXPERT_COUNT,), terms, is_turned)


def window_if_used(fields: JsonFields, num_layers: int) -> tuple[int, ...]:
    """The same window in every layer, where windows are used."""
    return one_window(fields, num_layers) if fields.boolean("use_sliding_window") else no_windows(fields, num_layers)


def qwen2_moe_windows(fields: JsonFields, num_layers: int) -> tuple[int, ...]:
    """Windows of the layers that layer_types names, else of every other one below max_window_layers, where they are
    used; in dense Qwen2 it is those from there on."""
    window = fields.integer("sliding_window", MAX_CONTEXT, 0) if fields.boolean("use_sliding_window") else 0
    types, stop = fields.get("layer_types"), fields.integer("max_window_layers", MAX_CONTEXT, 28, low=0)
    if types is None:
        has_window = [window > 0 and layer % 2 == 0 and layer < stop for layer in range(num_layers)]
        types = [SLIDING if has else FULL for has in has_window]
    return windows_of_types(fields, types, window, num_layers)


MIXTRAL = Family(
    "MixtralForCausalLM",
    {"num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 1e6},
    qkv_bias=False,
    o_bias=False,
    windows=one_window,
    terms=with_experts(mixtral_experts),
    gguf=gguf_with_experts("llama", normalised=True, is_turned=True),
)
OLMOE = Family(
    "OlmoeForCausalLM",
    {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "intermediate_size": 2048, "pad_token_id": 1},
    terms=lambda fields, found: {
        "experts": olmoe_experts(fields, found["num_layers"]),
        "qk_norm_whole": True,
    },
    gguf=gguf_with_experts("olmoe", normalised=False, qk_norm=False, qk_norm_whole=True),
)
QWEN2_MOE = Family(
    "Qwen2MoeForCausalLM",
    {"num_key_value_heads": 16, "max_position_embeddings": 32768, "intermediate_size": 5632, "sliding_window": 4096},
    qkv_bias=True,
    o_bias=False,
    windows=qwen2_moe_windows,
    terms=with_experts(qwen2_moe_experts),
    gguf=gguf_with_experts("qwen2moe", normalised=False),
)
QWEN3_MOE = Family(
    "Qwen3MoeForCausalLM",
    {"num_key_value_heads": 4, "max_position_embeddings": 32768, "intermediate_size": 6144, "sliding_window": 4096},
    qk_norm=True,
    windows=window_if_used,
    terms=with_experts(qwen3_moe_experts),
    gguf=gguf_with_experts("qwen3moe", normalised=True),
)
