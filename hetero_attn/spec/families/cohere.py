"""Cohere 2: attention and MLP beside each other behind one layer norm; only layers with a window turn q and k."""

from collections.abc import Mapping
from typing import Any

from hetero_attn.spec.families.family import Family, GgufTerms
from hetero_attn.spec.families.layer_ropes import ropes_where
from hetero_attn.spec.families.windows import WINDOW_KEYS, gguf_windows, windows_every
from hetero_attn.spec.tensor_names import TensorNames

PERIOD = 4
MOST = 1e6


def beside_each_other(found: Mapping[str, Any], windows: tuple[int, ...], logit_scale: float) -> dict[str, Any]:
    """What the two kinds of files say alike."""
    return ropes_where([window > 0 for window in windows], found["rope"]) | {
        "sliding_window": windows,
        "layer_norm": True,
        "parallel": True,
        "logit_scale": logit_scale,
    }


def cohere2_terms(fields: Any, found: Mapping[str, Any]) -> dict[str, Any]:
    """Of a config.json."""
    return beside_each_other(found, found["sliding_window"], fields.number("logit_scale", 0.0, MOST))


def cohere2_gguf(fields: Any, found: Mapping[str, Any]) -> dict[str, Any]:
    """Of a GGUF file."""
    windows = gguf_windows(fields, found["num_layers"], PERIOD, absent=None)
    return beside_each_other(found, windows, fields.number(".logit_scale", 0.0, MOST))


COHERE2 = Family(
    "Cohere2ForCausalLM",
    {
        "max_position_embeddings": 8192,
        "layer_norm_eps": 1e-5,
        "logit_scale": 0.0625,
        "tie_word_embeddings": True,
        "sliding_window": 4096,
        "sliding_window_pattern": PERIOD,
        "bos_token_id": 5,
        "eos_token_id": 255001,
        "pad_token_id": 0,
    },
    eps_key="layer_norm_eps",
    windows=windows_every("sliding_window_pattern"),
    terms=cohere2_terms,
    tensor_names=TensorNames(is_turned=True),
    gguf=GgufTerms(
        "cohere2", (".logit_scale", *WINDOW_KEYS), cohere2_gguf, is_turned=True, eps_key=".attention.layer_norm_epsilon"
    ),
)
