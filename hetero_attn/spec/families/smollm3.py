"""SmolLM3: Llama in which every fourth layer turns nothing."""

from collections.abc import Mapping
from typing import Any

from hetero_attn.spec.families.family import Family, GgufTerms
from hetero_attn.spec.families.layer_ropes import ropes_where
from hetero_attn.spec.families.windows import FULL, SLIDING, windows_of_types
from hetero_attn.spec.json_fields import JsonFields
from hetero_attn.spec.limits import MAX_CONTEXT, MAX_LAYERS

PERIOD = 4


def turned_layers(fields: JsonFields, num_layers: int) -> list[bool]:
    """Whether each layer turns queries and keys."""
    listed = fields.get("no_rope_layers")  # 1 where a layer does turn them, in spite of the name
    if listed is None:
        period = fields.integer("no_rope_layer_interval", MAX_LAYERS, PERIOD)
        return [bool((layer + 1) % period) for layer in range(num_layers)]
    if not isinstance(listed, list) or len(listed) != num_layers or not all(value in (0, 1) for value in listed):
        fields.fail("no_rope_layers", listed, f"a list of num_hidden_layers = {num_layers} numbers, 0 or 1")
    return [bool(value) for value in listed]


def smollm3_windows(fields: JsonFields, num_layers: int) -> tuple[int, ...]:
    """Windows of the layers that layer_types names, else of those that turn nothing, where they are used."""
    window, types = fields.integer("sliding_window", MAX_CONTEXT, 0), fields.get("layer_types")
    if types is None:
        used = fields.boolean("use_sliding_window") and window > 0
        types = [SLIDING if used and not turns else FULL for turns in turned_layers(fields, num_layers)]
    return windows_of_types(fields, types, window, num_layers)


def smollm3_terms(fields: JsonFields, found: Mapping[str, Any]) -> dict[str, Any]:
    """Layers without rotation."""
    return ropes_where(turned_layers(fields, found["num_layers"]), found["rope"])


def smollm3_gguf(fields: Any, found: Mapping[str, Any]) -> dict[str, Any]:
    """Every fourth layer, which no key says."""
    return ropes_where([bool((layer + 1) % PERIOD) for layer in range(found["num_layers"])], found["rope"])


SMOLLM3 = Family(
    "SmolLM3ForCausalLM",
    {
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rope_theta": 2e6,
        "tie_word_embeddings": True,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "pad_token_id": 128004,
    },
    mlp_bias="mlp_bias",
    windows=smollm3_windows,
    terms=smollm3_terms,
    gguf=GgufTerms("smollm3", terms=smollm3_gguf, is_turned=True),
)
