"""Gemma 4 in GGUF files: heads of two sizes under keys of their own, the pairs that stand still as a tensor."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hetero_attn.spec.experts_config import ExpertsConfig, gguf_experts
from hetero_attn.spec.families.experts import EXPERT_COUNT
from hetero_attn.spec.families.family import KV_HEADS, GgufTerms
from hetero_attn.spec.families.gemma import MOST_CAP
from hetero_attn.spec.families.layer_ropes import ropes_by_window
from hetero_attn.spec.families.windows import WINDOW_KEYS, gguf_windows
from hetero_attn.spec.limits import MAX_HEAD_DIM, MAX_HEADS, MAX_LAYERS
from hetero_attn.spec.rope_config import RopeConfig

PERIOD = 6  # layers from one that sees everything to the next
LOGIT_CAP = ".final_logit_softcapping"


def every_kind(hidden_size: int) -> dict[str, Any]:
    """What every Gemma 4 has beside Llama, whatever file it comes from."""
    return {
        "post_norms": True,
        "query_scale": 1.0,
        "embedding_scale": hidden_size**0.5,
        "value_norm": True,
        "layer_scalars": True,
    }


def gemma4_gguf(fields: Any, found: Mapping[str, Any]) -> dict[str, Any]:
    """Of a GGUF file. What it says of heads and rotary embedding without a further word is of the layers that see
    everything; those of the others end in swa."""
    windows = _windows(fields)
    full_dim = found["head_dim"]
    head_dim = fields.integer(".attention.key_length_swa", MAX_HEAD_DIM, full_dim, low=2)
    if (values := fields.integer(".attention.value_length_swa", MAX_HEAD_DIM, head_dim)) != head_dim:
        fields.fail(".attention.value_length_swa", values, f"{head_dim}, as that of keys")
    turned = fields.integer(".rope.dimension_count_swa", head_dim, head_dim)
    local = RopeConfig(turned, theta=fields.number(".rope.freq_base_swa", 1.0, 1e15))
    return ropes_by_window(windows, local, found["rope"]) | {
        **every_kind(found["hidden_size"]),
        "hidden_act": "gelu_tanh",
        "sliding_window": windows,
        "head_dim": head_dim,
        "rope": local,
        "full_attention": (_kv_heads(fields, found["num_heads"], has_window=False), full_dim),
        "logit_cap": fields.number(LOGIT_CAP, 0.0, MOST_CAP, 0.0),
        "experts": _experts(fields, found) if fields.is_set(EXPERT_COUNT) else None,
    }


def _experts(fields: Any, found: Mapping[str, Any]) -> ExpertsConfig:
    experts = gguf_experts(fields, found, normalised=True)
    return replace(experts, shared_width=found["intermediate_size"], shared_factor=False, beside_mlp=True)


def _windows(fields: Any) -> tuple[int, ...]:
    return gguf_windows(fields, fields.integer(".block_count", MAX_LAYERS), PERIOD, absent=None)


def window_kv_heads(fields: Any, num_heads: int) -> int:
    """KV heads of the layers with a window."""
    return _kv_heads(fields, num_heads, has_window=True)


def _kv_heads(fields: Any, num_heads: int, has_window: bool) -> int:
    """KV heads of the layers with a window, or of those without; where there are none, of any."""
    if not fields.is_list(KV_HEADS):
        return fields.integer(KV_HEADS, MAX_HEADS, num_heads)
    windows = _windows(fields)
    each = [int(count) for count in fields.numbers(KV_HEADS, len(windows))]
    kinds = {count for count, window in zip(each, windows, strict=True) if bool(window) == has_window} or set(each)
    if len(kinds) > 1 or not 0 < min(kinds) <= num_heads or num_heads % min(kinds):
        which = "with" if has_window else "without"
        fields.fail(KV_HEADS, sorted(kinds), f"one divisor of {num_heads} heads for all layers {which} a window")
    return min(kinds)


GEMMA4_GGUF = GgufTerms(
    "gemma4",
    (EXPERT_COUNT, *WINDOW_KEYS, LOGIT_CAP),
    gemma4_gguf,
    kv_heads=window_kv_heads,
    may_share_values=True,
    may_be_dense=True,
)
