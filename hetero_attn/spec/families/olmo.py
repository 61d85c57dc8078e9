"""OLMo 2 and 3: norms only behind attention and MLP, and over all heads of q and of k together."""

from collections.abc import Mapping
from typing import Any

from hetero_attn.spec.families.family import Family, GgufTerms
from hetero_attn.spec.families.layer_ropes import rope_of_kind, ropes_by_window
from hetero_attn.spec.families.windows import FULL, SLIDING, WINDOW_KEYS, gguf_windows, windows_every
from hetero_attn.spec.json_fields import JsonFields
from hetero_attn.spec.rope_config import RopeConfig
from hetero_attn.spec.tensor_names import TensorNames


def olmo2_terms(fields: Any, found: Mapping[str, Any]) -> dict[str, Any]:
    """Where the norms are."""
    return {"pre_norms": False, "post_norms": True, "qk_norm": False, "qk_norm_whole": True}


def olmo3_rope(fields: JsonFields, head_dim: int, max_position_embeddings: int) -> RopeConfig:
    """That of the layers that see everything, the only ones whose rotation is stretched."""
    return rope_of_kind(fields, FULL, "rope_theta", OLMO3_THETA, head_dim, max_position_embeddings, shares_base=True)


def olmo3_terms(fields: JsonFields, found: Mapping[str, Any]) -> dict[str, Any]:
    """Where the norms are, and a rotary embedding of their own in layers with a window."""
    sizes = found["head_dim"], found["max_position_embeddings"]
    local = rope_of_kind(fields, SLIDING, "rope_theta", OLMO3_THETA, *sizes, shares_base=True)
    return olmo2_terms(fields, found) | ropes_by_window(found["sliding_window"], local, found["rope"])


def olmo_gguf(fields: Any, found: Mapping[str, Any]) -> dict[str, Any]:
    """The same from a GGUF file, which is of OLMo 3 where it has a window."""
    windows, rope = gguf_windows(fields, found["num_layers"], OLMO3_PERIOD), found["rope"]
    local = RopeConfig(rope.rotary_dim, theta=rope.theta)
    ropes = ropes_by_window(windows, local, rope) if any(windows) else {}
    return olmo2_terms(fields, found) | {"sliding_window": windows} | ropes


OLMO3_THETA, OLMO3_PERIOD = 5e5, 4
DEFAULTS = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "eos_token_id": 50279, "pad_token_id": 1}
OLMO_NAMES = TensorNames(
    layer_parts=(
        ("post_attention_layernorm", "attention_post_norm"),
        ("post_feedforward_layernorm", "mlp_post_norm"),
    )
)
OLMO2 = Family(
    "Olmo2ForCausalLM",
    DEFAULTS,
    terms=olmo2_terms,
    tensor_names=OLMO_NAMES,
    gguf=GgufTerms("olmo2", WINDOW_KEYS, olmo_gguf, needs_keys=False),
)
OLMO3 = Family(
    "Olmo3ForCausalLM",
    DEFAULTS | {"sliding_window": 4096, "sliding_window_pattern": OLMO3_PERIOD},
    windows=windows_every("sliding_window_pattern"),
    rope=olmo3_rope,
    terms=olmo3_terms,
    tensor_names=OLMO_NAMES,
)
