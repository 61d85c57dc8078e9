"""Gemma 4, dense and with experts beside the MLP: larger heads, and fewer KV heads, in the layers that see everything,
whose values are their keys before norm and rotation; a norm of every v head; a number that multiplies what leaves a
layer.

The small models (E2B, E4B) add embeddings of each layer and layers that share keys and values, which are not computed.
"""

import math
from collections.abc import Mapping
from typing import Any

from hetero_attn.errors import UnsupportedModelError
from hetero_attn.spec.experts_config import gemma4_experts
from hetero_attn.spec.families.family import Family
from hetero_attn.spec.families.gemma import GEMMA_NAMES, MOST_CAP
from hetero_attn.spec.families.layer_ropes import rope_of_kind, ropes_by_window
from hetero_attn.spec.families.mixtures.gemma4_gguf import GEMMA4_GGUF, PERIOD, every_kind
from hetero_attn.spec.families.windows import FULL, SLIDING, windows_of_types
from hetero_attn.spec.json_fields import JsonFields, show
from hetero_attn.spec.limits import MAX_CONTEXT, MAX_HEAD_DIM, MAX_HEADS, MAX_LAYERS
from hetero_attn.spec.rope_config import DEFAULT_THETA, RopeConfig, rope_object

FULL_THETA = 1e6
PROPORTIONAL = "proportional"  # the rotary embedding whose slowest pairs stand still
ROPES = {
    FULL: {"rope_type": PROPORTIONAL, "partial_rotary_factor": 0.25, "rope_theta": FULL_THETA},
    SLIDING: {"rope_type": "default", "rope_theta": DEFAULT_THETA},
}
# Of the small models, by what each would add.
REFUSED = {
    "hidden_size_per_layer_input": "embeddings of each layer",
    "num_kv_shared_layers": "layers that attend to the keys and values of another one",
}


def gemma4_windows(fields: JsonFields, num_layers: int) -> tuple[int, ...]:
    """Windows of the layers that layer_types names, else of all but every sixth; the last layer has none."""
    types = fields.get("layer_types")
    if types is None:
        types = [SLIDING if (layer + 1) % PERIOD else FULL for layer in range(num_layers)]
    if isinstance(types, list) and types:
        types = [*types[:-1], FULL if types[-1] == SLIDING else types[-1]]
    return windows_of_types(fields, types, fields.integer("sliding_window", MAX_CONTEXT), num_layers)


def full_attention(fields: JsonFields, windows: tuple[int, ...]) -> tuple[int, int]:
    """KV heads and head_dim of the layers that see everything, from keys of their own or, as transformers writes it,
    from what is said of each layer."""
    full = [layer for layer, window in enumerate(windows) if not window]
    own = _of_layers(fields, full)
    heads, is_shared = fields.integer("num_key_value_heads", MAX_HEADS), fields.boolean("attention_k_eq_v")
    if own is None:
        asked = fields.integer("num_global_key_value_heads", MAX_HEADS, heads) if is_shared else heads
        found = asked, fields.integer("global_head_dim", MAX_HEAD_DIM, 512, low=2)
    else:
        found = own.integer("num_key_value_heads", MAX_HEADS, heads), own.integer("head_dim", MAX_HEAD_DIM, low=2)
    queries = fields.integer("num_attention_heads", MAX_HEADS)
    if queries % found[0]:
        fields.fail("num_global_key_value_heads", found[0], f"a divisor of num_attention_heads {queries}")
    return found


def _of_layers(fields: JsonFields, full: list[int]) -> JsonFields | None:
    """What per_layer_config says of every layer that sees everything; None where the config has none."""
    said = fields.get("per_layer_config")
    if said is None:
        return None
    if not isinstance(said, dict) or not all(str(layer).isdecimal() for layer in said):
        fields.fail("per_layer_config", said, "an object of layers by their numbers")
    by_layer = {int(layer): values for layer, values in said.items() if values}
    values = by_layer.get(full[0])
    if not isinstance(values, dict) or by_layer != dict.fromkeys(full, values):
        raise UnsupportedModelError(
            f"{fields.path}: per_layer_config is {show(said)}; only layers of full attention, {full}, may differ, and "
            "all alike"
        )
    if unknown := sorted(values.keys() - {"head_dim", "num_key_value_heads"}):
        raise UnsupportedModelError(f"{fields.path}: per_layer_config changes {unknown[0]}, which is not computed")
    return JsonFields(fields.path, values)


def full_rope(fields: JsonFields, head_dim: int, context: int) -> RopeConfig:
    """That of the layers that see everything: of a proportional one only the first pairs turn, each as fast as if all
    did."""
    found = rope_object(fields).get(FULL)
    if not isinstance(found, dict) or found.get("rope_type") != PROPORTIONAL:
        return rope_of_kind(fields, FULL, "rope_theta", FULL_THETA, head_dim, context)
    rope = JsonFields(fields.path, found)
    turned = int(rope.number("partial_rotary_factor", 0.0, 1.0, 1.0) * head_dim // 2)
    factor = rope.number("factor", 0.0, 1e6, 1.0)
    divisors = (factor,) * turned + (math.inf,) * (head_dim // 2 - turned)
    return RopeConfig(head_dim, "divisors", rope.number("rope_theta", 1.0, 1e15, DEFAULT_THETA), divisors=divisors)


def sliding_rope(fields: JsonFields, head_dim: int, context: int) -> RopeConfig:
    """That of the layers with a window."""
    return rope_of_kind(fields, SLIDING, "rope_local_base_freq", DEFAULT_THETA, head_dim, context)


def gemma4_terms(fields: JsonFields, found: Mapping[str, Any]) -> dict[str, Any]:
    """Of a config.json."""
    for key, what in REFUSED.items():
        if fields.integer(key, MAX_LAYERS, 0, low=0):
            raise UnsupportedModelError(
                f"{fields.path}: {key} is {show(fields.get(key))}: {what}, as the small models of Gemma 4 (E2B, E4B) "
                "have them, are not computed; the larger ones (26B-A4B, 31B) are"
            )
    if fields.get("use_bidirectional_attention") == "all":
        raise UnsupportedModelError(f"{fields.path}: use_bidirectional_attention is 'all', which is not computed")
    windows, context = found["sliding_window"], found["max_position_embeddings"]
    full = full_attention(fields, windows)
    has_experts = fields.boolean("enable_moe_block")
    return ropes_by_window(windows, found["rope"], full_rope(fields, full[1], context)) | {
        **every_kind(found["hidden_size"]),
        "full_attention": full,
        "logit_cap": fields.number("final_logit_softcapping", 0.0, MOST_CAP, 0.0),
        "shared_projection": fields.boolean("attention_k_eq_v"),
        "experts": gemma4_experts(fields, found["num_layers"]) if has_experts else None,
    }


NAMES = GEMMA_NAMES.with_parts(
    ("pre_feedforward_layernorm_2", "experts_norm"),
    ("post_feedforward_layernorm_1", "shared_post_norm"),
    ("post_feedforward_layernorm_2", "experts_post_norm"),
    ("router.proj", "router"),
    ("router", "router"),
)
GEMMA4 = Family(
    "Gemma4ForCausalLM",
    {
        "vocab_size": 262144,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 30,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131072,
        "sliding_window": 512,
        "rope_parameters": ROPES,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size_per_layer_input": 256,
        "tie_word_embeddings": True,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
    },
    qk_norm=True,
    act_key="hidden_activation",
    windows=gemma4_windows,
    rope=sliding_rope,
    terms=gemma4_terms,
    wrapper=("gemma4", "Gemma4ForConditionalGeneration"),
    tensor_names=NAMES,
    gguf=GEMMA4_GGUF,
)
