"""rope_tables against the rotary modules of transformers: bit for bit, because angles round differently otherwise."""

import importlib
import json
import math
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig

from hetero_attn.errors import UnsupportedModelError
from hetero_attn.models.rope import rope_tables
from hetero_attn.spec.config import ModelConfig
from tests.support.models.toy import FAMILIES, ROPES

YARNS = {
    "yarn-attention-factor": {"attention_factor": 1.3},
    "yarn-mscale": {"mscale": 0.707, "mscale_all_dim": 0.5},
    "yarn-betas": {"beta_fast": 16, "beta_slow": 2},
    "yarn-untruncated": {"truncate": False},
    "yarn-low-theta": {"rope_theta": 100.0},
}
VARIANTS = dict(ROPES) | {name: ROPES["yarn"] | extra for name, extra in YARNS.items()}


def both_configs(directory, family="llama", rope="default", **changes):
    """(our config, transformers' config) read from the same config.json."""
    values = {"model_type": family, "hidden_size": 128, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 9}
    values |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64, "max_position_embeddings": 512}
    parameters = VARIANTS[rope] if isinstance(rope, str) else rope
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(values | {"rope_parameters": parameters} | changes))
    return ModelConfig.from_dir(directory), AutoConfig.from_pretrained(directory)


def hf_tables(hf_config, position_ids):
    """cos and sin of the family's rotary module, float32 [len(position_ids), rotary_dim / 2]."""
    family = hf_config.model_type
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    rotary = getattr(module, f"{family.capitalize()}RotaryEmbedding")(hf_config)
    cos, sin = rotary(torch.zeros(1), position_ids[None])
    half = cos.shape[-1] // 2
    return cos[0, :, :half], sin[0, :, :half]


@pytest.mark.parametrize("head_dim", [40, 64, 96, 128])
@pytest.mark.parametrize("rope", VARIANTS)
def test_equals_transformers(tmp_path, rope, head_dim):
    config, hf_config = both_configs(tmp_path, rope=rope, head_dim=head_dim)

    cos, sin = rope_tables(config, 512)

    expected_cos, expected_sin = hf_tables(hf_config, torch.arange(512))
    assert torch.equal(expected_cos, cos)
    assert torch.equal(expected_sin, sin)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rope", ["linear", "llama3", "yarn"])
def test_every_family_reads_its_rope(tmp_path, family, rope):
    config, hf_config = both_configs(tmp_path, family, rope)

    cos, _ = rope_tables(config, 300)

    assert torch.equal(hf_tables(hf_config, torch.arange(300))[0], cos)


def test_far_positions_round_like_transformers(tmp_path):
    config, hf_config = both_configs(tmp_path, max_position_embeddings=131072)

    cos, sin = rope_tables(config, 131072)

    far = torch.arange(131000, 131072)
    expected_cos, expected_sin = hf_tables(hf_config, far)
    assert torch.equal(expected_cos, cos[far])
    assert torch.equal(expected_sin, sin[far])


def test_dynamic_beyond_the_trained_length_stretches_for_the_whole_context(tmp_path):
    config, hf_config = both_configs(tmp_path, rope="dynamic", max_position_embeddings=64, head_dim=40)

    cos, sin = rope_tables(config, 200)

    expected_cos, expected_sin = hf_tables(hf_config, torch.arange(200))
    assert torch.equal(expected_cos, cos)
    assert torch.equal(expected_sin, sin)


def test_dynamic_within_the_trained_length_is_default(tmp_path):
    dynamic, _ = both_configs(tmp_path, rope="dynamic")
    default, _ = both_configs(tmp_path)

    for max_positions in (100, 512):
        assert torch.equal(rope_tables(default, max_positions)[0], rope_tables(dynamic, max_positions)[0])
    assert not torch.equal(rope_tables(default, 512)[0], rope_tables(dynamic, 512, seq_len=600)[0])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rope", ["default", "linear"])
def test_a_partial_rotary_factor_is_refused_by_name(tmp_path, family, rope):
    """transformers ignores it for the default type, which was applied here: another model, and no word of it."""
    _, whole = both_configs(tmp_path / "whole", family, rope)
    with pytest.raises(UnsupportedModelError, match="partial_rotary_factor is 0.5"):
        both_configs(tmp_path / "part", family, ROPES[rope] | {"partial_rotary_factor": 0.5})

    part = AutoConfig.from_pretrained(tmp_path / "part")
    same = torch.equal(hf_tables(part, torch.arange(9))[0], hf_tables(whole, torch.arange(9))[0])
    assert same == (rope == "default")
    assert both_configs(tmp_path / "one", family, ROPES[rope] | {"partial_rotary_factor": 1.0})[0].rope.rotary_dim == 64


def test_heads_that_are_rotated_in_part_have_narrow_tables(tmp_path):
    """As GGUF files may ask for."""
    config, _ = both_configs(tmp_path, rope="linear")
    config = replace(config, rope=replace(config.rope, rotary_dim=32))

    cos, sin = rope_tables(config, 10)

    assert config.rope.rotary_dim == 32
    assert cos.shape == sin.shape == (10, 16)
    angle = 3 * 10000.0 ** (-2 * 5 / 32) / 2.5
    assert math.isclose(cos[3, 5], math.cos(angle), abs_tol=1e-6)
