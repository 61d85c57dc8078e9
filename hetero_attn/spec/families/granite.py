"""Granite: Llama with factors on the embedding, on what each block adds, on the scores and on the logits.

A factor m on what every block adds to the stream is the same model without it whose stream is 1 / m of it: the
embedding divided by m, and eps by m^2, because an RMS norm takes every factor out of its input but eps.
"""

from collections.abc import Mapping
from typing import Any

from hetero_attn.spec.families.family import Family, GgufTerms

MOST = 1e6


def scaled(found: Mapping[str, Any], embedding: float, residual: float, query: float, logits: float) -> dict[str, Any]:
    """Our fields of the four factors; logits: what they are divided by."""
    return {
        "embedding_scale": embedding / residual,
        "rms_norm_eps": found["rms_norm_eps"] / residual**2,
        "query_scale": query,
        "logit_scale": 1.0 / logits,
    }


def granite_terms(fields: Any, found: Mapping[str, Any]) -> dict[str, Any]:
    """The factors of a config.json."""
    keys = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
    return scaled(found, *(fields.number(key, 0.0, MOST, 1.0) for key in keys))


KEYS = (".embedding_scale", ".residual_scale", ".attention.scale", ".logit_scale")


def granite_gguf(fields: Any, found: Mapping[str, Any]) -> dict[str, Any]:
    """The factors of a GGUF file; one that it does not name is that of Llama."""
    embedding, residual, logits = (fields.number(key, 0.0, MOST, 1.0) for key in (KEYS[0], KEYS[1], KEYS[3]))
    return scaled(found, embedding, residual, fields.number(KEYS[2], 0.0, MOST, found["head_dim"] ** -0.5), logits)


GRANITE = Family(
    "GraniteForCausalLM",
    {"max_position_embeddings": 2048},
    mlp_bias="mlp_bias",
    terms=granite_terms,
    gguf=GgufTerms("granite", KEYS, granite_gguf, is_turned=True),
)
