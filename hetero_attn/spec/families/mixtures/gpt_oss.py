"""gpt-oss: heads with sinks, every second layer a window, biases everywhere, experts with a clamped activation."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hetero_attn.spec.experts_config import SOFTMAX_OF_CHOSEN, gguf_experts, gpt_oss_experts
from hetero_attn.spec.families.family import Family, GgufTerms
from hetero_attn.spec.families.windows import WINDOW_KEYS, gguf_windows, windows_every
from hetero_attn.spec.tensor_names import TensorNames

PERIOD = 2
ALPHA, LIMIT = 1.702, 7.0
YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def gpt_oss_terms(fields: Any, found: Mapping[str, Any]) -> dict[str, Any]:
    """Of a config.json."""
    return {"experts": gpt_oss_experts(fields, found["num_layers"]), "has_sinks": True}


def gpt_oss_gguf(fields: Any, found: Mapping[str, Any]) -> dict[str, Any]:
    """Of a GGUF file. Its keys cannot say that the ramp of yarn is not rounded to whole pairs, as trained."""
    experts = gguf_experts(fields, found, normalised=True, gating=SOFTMAX_OF_CHOSEN)
    return {
        "experts": replace(experts, has_bias=True, clamp=(ALPHA, LIMIT)),
        "has_sinks": True,
        "rope": replace(found["rope"], truncate=False),
        "sliding_window": gguf_windows(fields, found["num_layers"], PERIOD, absent=None),
    }


GPT_OSS = Family(
    "GptOssForCausalLM",
    {
        "num_hidden_layers": 36,
        "vocab_size": 201088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "head_dim": 64,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "sliding_window": 128,
        "sliding_window_pattern": PERIOD,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000.0,
        "rope_parameters": YARN,
        "attention_bias": True,
    },
    windows=windows_every("sliding_window_pattern"),
    terms=gpt_oss_terms,
    tensor_names=TensorNames(layer_parts=(("mlp.router", "router"),), has_turned_experts=True),
    gguf=GgufTerms(
        "gpt-oss",
        (".expert_count", *WINDOW_KEYS),
        gpt_oss_gguf,
        parts=(("post_attention_norm", "mlp_norm"),),
    ),
)
