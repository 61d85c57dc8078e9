"""OLMo 2 and 3: norms only behind attention and MLP, and over all heads of q and of k together."""

from collections.abc import Mapping
from typing import Any

from hetero_attn.spec.families.family import Family, GgufTerms
from hetero_attn.spec.tensor_names import TensorNames


def olmo2_terms(fields: Any, found: Mapping[str, Any]) -> dict[str, Any]:
    """Where the norms are."""
    return {"pre_norms": False, "post_norms": True, "qk_norm": False, "qk_norm_whole": True}


OLMO2 = Family(
    "Olmo2ForCausalLM",
    {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "eos_token_id": 50279, "pad_token_id": 1},
    terms=olmo2_terms,
    tensor_names=TensorNames(
        layer_parts=(
            ("post_attention_layernorm", "attention_post_norm"),
            ("post_feedforward_layernorm", "mlp_post_norm"),
        )
    ),
    gguf=GgufTerms("olmo2", terms=olmo2_terms),
)
