"""Configs of published models that are unlike Llama, as their folders have them, and what is planned for them."""

import json
import tempfile
from functools import cache
from pathlib import Path

from hetero_attn.planning.options import LoadOptions
from hetero_attn.planning.settle import ask
from placement import HardwareProfile, Workload

QWEN3_30B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "head_dim": 128,
    "hidden_size": 2048,
    "max_position_embeddings": 40960,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "vocab_size": 151936,
}
GPT_OSS_120B = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "attention_bias": True,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "max_position_embeddings": 131072,
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "num_local_experts": 128,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "vocab_size": 201088,
}
QWEN3_NEXT_80B = {
    "architectures": ["Qwen3NextForCausalLM"],
    "model_type": "qwen3_next",
    "head_dim": 256,
    "hidden_size": 2048,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "max_position_embeddings": 262144,
    "moe_intermediate_size": 512,
    "num_attention_heads": 16,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "num_hidden_layers": 48,
    "num_key_value_heads": 2,
    "partial_rotary_factor": 0.25,
    "rope_theta": 10000000,
    "shared_expert_intermediate_size": 512,
    "vocab_size": 151936,
}
GEMMA3_27B = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "head_dim": 128,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 5376,
    "intermediate_size": 21504,
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_hidden_layers": 62,
    "num_key_value_heads": 16,
    "query_pre_attn_scalar": 168,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "rope_theta": 1000000.0,
    "sliding_window": 1024,
    "sliding_window_pattern": 6,
    "vocab_size": 262208,
}
CONFIGS = {
    "qwen3-30b": QWEN3_30B,
    "gpt-oss-120b": GPT_OSS_120B,
    "qwen3-next-80b": QWEN3_NEXT_80B,
    "gemma3-27b": GEMMA3_27B,
}


def published(name: str, dtype: str, context: int, hardware: HardwareProfile, gpu_memory: int) -> Workload:
    """What a plan for a GPU with so much memory is asked for, everything else left open."""
    sizes = {"max_context": context, "gpu_memory": gpu_memory, "hardware": hardware}
    return ask(LoadOptions(model=folder_of(name).name, dtype=dtype, device="cuda", **sizes)).workload


@cache
def folder_of(name: str) -> tempfile.TemporaryDirectory:
    """A folder of this model's config alone, until the process ends."""
    folder = tempfile.TemporaryDirectory(prefix=f"{name}-")
    Path(folder.name, "config.json").write_text(json.dumps(CONFIGS[name]))
    return folder
