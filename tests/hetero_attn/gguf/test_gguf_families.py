"""Families from GGUF files against transformers holding the same values in float32."""

import math

import pytest
import torch

from hetero_attn import LLM
from hetero_attn.checkpoints.sources import read_config
from hetero_attn.errors import ConfigError, UnsupportedModelError
from hetero_attn.planning.settle import plan_model
from tests.support.models.gguf_models import make_family_gguf
from tests.support.models.runtime import nmse
from tests.support.models.toy import hf_logits

TOKENS = tuple(torch.randint(260, (40,), generator=torch.Generator().manual_seed(3)).tolist())
# family: (metadata, values of the config); the metadata says the same in GGUF's words.
GRANITE = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
SHORT, LONG = [1.0 + 0.1 * pair for pair in range(24)], [2.0 + 0.3 * pair for pair in range(24)]
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 1e4}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
CASES = {
    "granite": (
        {"embedding_scale": 3.0, "residual_scale": 0.4, "attention.scale": 0.2, "logit_scale": 2.5},
        dict(zip(GRANITE, (3.0, 0.4, 0.2, 2.5), strict=True)),
    ),
    "smollm3": ({}, {"num_hidden_layers": 5, "rope_parameters": PLAIN_ROPE}),
    "seed_oss": ({}, {"attention_bias": True}),
    "phi3": (
        {
            "rope.dimension_count": 48,
            "attention.sliding_window": 9,
            "rope_factors_short.weight": SHORT,
            "rope_factors_long.weight": LONG,
            "rope.scaling.original_context_length": 256,
            "rope.scaling.attn_factor": (1 + math.log(2) / math.log(256)) ** 0.5,
        },
        {
            "sliding_window": 9,
            "original_max_position_embeddings": 256,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.75,
                "short_factor": SHORT,
                "long_factor": LONG,
            },
        },
    ),
    "glm4": (
        {"rope.dimension_count": 32},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ),
    "olmo2": ({}, {}),
    "olmo3": (
        {
            "attention.sliding_window": 9,
            "attention.sliding_window_pattern": (False, True, True),
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 128,
        },
        {
            "num_hidden_layers": 3,
            "sliding_window": 9,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": YARN | {"rope_theta": 1e4},
                "sliding_attention": PLAIN_ROPE,
            },
        },
    ),
    "cohere2": (
        {"logit_scale": 0.3, "attention.sliding_window": 9},
        {"logit_scale": 0.3, "sliding_window": 9, "num_hidden_layers": 5, "rope_parameters": PLAIN_ROPE},
    ),
    "starcoder2": ({"attention.sliding_window": 9}, {"sliding_window": 9, "rope_parameters": PLAIN_ROPE}),
    "gemma2": (
        {"attention.sliding_window": 9, "attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0},
        {
            "sliding_window": 9,
            "attn_logit_softcapping": 1.5,
            "final_logit_softcapping": 2.0,
            "query_pre_attn_scalar": 64,
            "num_hidden_layers": 3,
            "rope_parameters": PLAIN_ROPE,
        },
    ),
    "gemma3_text": (
        {
            "attention.sliding_window": 9,
            "attention.sliding_window_pattern": 3,
            "rope.freq_base": 5e4,
            "rope.freq_base_swa": 5e2,
        },
        {
            "sliding_window": 9,
            "sliding_window_pattern": 3,
            "query_pre_attn_scalar": 64,
            "num_hidden_layers": 4,
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 5e4},
                "sliding_attention": {"rope_type": "default", "rope_theta": 5e2},
            },
        },
    ),
}


@pytest.mark.parametrize("family", CASES)
def test_values_are_those_of_the_file(tmp_path, family):
    metadata, values = CASES[family]
    gguf_file, plain = make_family_gguf(tmp_path, family, metadata, **values)
    found = {}
    for device in ("cpu", "emulated"):
        with LLM(gguf_file, dtype="fp32", device=device, max_context=64, progress=False, num_threads=2) as llm:
            found[device] = llm.logits(TOKENS)

    for logits in found.values():
        assert nmse(logits, hf_logits(plain, list(TOKENS))) < 1e-10


def test_gemma3_keys_at_their_defaults(tmp_path):
    """Published files have neither the period nor the base of the windows' rotary embedding."""
    gguf_file, _ = make_family_gguf(
        tmp_path, "gemma3_text", {"attention.sliding_window": 512}, sliding_window=512, num_hidden_layers=7
    )
    config = read_config(gguf_file)

    assert config.sliding_window == (512,) * 5 + (0, 512)
    assert [config.rope_of(layer).theta for layer in (0, 5)] == [1e4, 1e4]
    assert config.hidden_act == "gelu_tanh" and config.norm_offset == 0.0 and config.eos_token_ids == (2, 3)


def test_gemma2_keys_at_their_defaults(tmp_path):
    """The first files have neither a window nor soft caps, and mean those of the published models."""
    gguf_file, _ = make_family_gguf(tmp_path, "gemma2", {}, num_hidden_layers=3)
    config = read_config(gguf_file)

    assert config.sliding_window == (4096, 0, 4096)
    assert (config.attention_cap, config.logit_cap) == (50.0, 30.0)


def test_cohere2_without_a_window_is_refused(tmp_path):
    """Its layers without a window turn nothing, so none at all would be a model without positions."""
    gguf_file, _ = make_family_gguf(tmp_path, "cohere2", {"logit_scale": 0.3}, num_hidden_layers=3)

    with pytest.raises(ConfigError, match=r"no cohere2.attention.sliding_window, which every model needs"):
        read_config(gguf_file)


def test_a_term_of_another_family_is_refused(tmp_path):
    """Gemma 3 has no soft caps, and leaving one out would change every answer."""
    gguf_file, _ = make_family_gguf(
        tmp_path, "gemma3_text", {"attention.sliding_window": 9, "final_logit_softcapping": 30.0}, sliding_window=9
    )

    with pytest.raises(UnsupportedModelError, match="final_logit_softcapping is 30.0"):
        plan_model(gguf_file, device="cpu")
