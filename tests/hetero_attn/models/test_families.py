"""Every family against transformers in eager float32: logits of one device and of three lanes, every vector re-drawn."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from hetero_attn.checkpoints.sources import open_source
from hetero_attn.errors import CheckpointError, ConfigError, UnsupportedModelError
from hetero_attn.models.decoder import decoder
from hetero_attn.models.rope import rope_tables
from hetero_attn.spec.config import ModelConfig
from tests.support.models.runtime import cpu_plan, make_engine, nmse, run_logits, toy_workload, uniform_plan
from tests.support.models.toy import edit_json, hf_logits, make_family_checkpoint

TOKENS = torch.randint(307, (60,), generator=torch.Generator().manual_seed(1)).tolist()
GEMMA3 = {"sliding_window": 9, "query_pre_attn_scalar": 24, "layer_types": ["sliding_attention", "full_attention"] * 2}

PAIRS = {"short_factor": [1.0 + 0.1 * i for i in range(15)], "long_factor": [2.0 + 0.3 * i for i in range(15)]}
LONGROPE = PAIRS | {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75}
GLM4 = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}

MODELS = {
    "gemma3": ("gemma3_text", GEMMA3 | {"num_hidden_layers": 4}),
    "gemma3-scaled": (
        "gemma3_text",
        GEMMA3
        | {
            "num_hidden_layers": 4,
            "tie_word_embeddings": False,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e4},
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            },
        },
    ),
}

MODELS |= {
    "granite": (
        "granite",
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.2,
            "logits_scaling": 2.5,
            "attention_bias": True,
            "mlp_bias": True,
            "rms_norm_eps": 1e-3,
        },
    ),
    "smollm3": ("smollm3", {"num_hidden_layers": 4, "no_rope_layer_interval": 2, "head_dim": 12}),
    "smollm3-windows": (
        "smollm3",
        {
            "no_rope_layers": [1, 0, 1],
            "use_sliding_window": True,
            "sliding_window": 7,
            "tie_word_embeddings": False,
            "attention_bias": True,
            "head_dim": 12,
        },
    ),
    "seed-oss": ("seed_oss", {"attention_out_bias": True, "mlp_bias": True}),
    "phi3": ("phi3", {"sliding_window": 9, "head_dim": 12}),
    "phi4-mini": (
        "phi3",
        {
            "hidden_size": 240,
            "rope_parameters": LONGROPE,
            "original_max_position_embeddings": 256,
            "tie_word_embeddings": True,
        },
    ),
    "glm4": ("glm4", GLM4),
    "olmo3": (
        "olmo3",
        {
            "num_hidden_layers": 5,
            "sliding_window": 9,
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "yarn",
                    "rope_theta": 5e4,
                    "factor": 4.0,
                    "original_max_position_embeddings": 128,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 5e4},
            },
        },
    ),
    "cohere2": (
        "cohere2",
        {
            "hidden_size": 240,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "sliding_window": 9,
            "logit_scale": 0.3,
            "layer_norm_eps": 1e-3,
            "attention_bias": True,
        },
    ),
    "starcoder2": ("starcoder2", {"sliding_window": 9, "norm_epsilon": 1e-2}),
    "gemma2": (
        "gemma2",
        {
            "num_hidden_layers": 4,
            "sliding_window": 9,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 1.5,
            "final_logit_softcapping": 2.0,
            "hidden_size": 96,
        },
    ),
    "olmo2": ("olmo2", {"head_dim": 12, "attention_bias": True}),
}


@pytest.fixture(scope="module", params=MODELS, ids=str)
def checkpoint(request, tmp_path_factory):
    family, values = MODELS[request.param]
    return make_family_checkpoint(tmp_path_factory.mktemp(request.param), family, **values)


def logits_by(path, plan):
    engine = make_engine(path, plan)
    try:
        return run_logits(engine, TOKENS, prompt_tokens=50)
    finally:
        engine.close()


def test_logits_equal_transformers(checkpoint):
    assert nmse(logits_by(checkpoint, cpu_plan(toy_workload(checkpoint))), hf_logits(checkpoint, TOKENS)) <= 1e-10


@pytest.mark.table
@pytest.mark.parametrize(("gpu", "stream"), [(0.4, 0.3), (0.0, 0.6), (1.0, 0.0)])
def test_three_lanes_equal_transformers(checkpoint, gpu, stream):
    plan = uniform_plan(toy_workload(checkpoint), gpu=gpu, stream=stream, gpu_kv_heads=1)

    assert nmse(logits_by(checkpoint, plan), hf_logits(checkpoint, TOKENS)) <= 1e-10


def test_every_vector_counts(checkpoint):
    """A vector that is left out, or one that is added to it, would show in the logits: none is near its neutral value
    here, and the model has no tensor that is not read."""
    with open_source(checkpoint) as source:
        model = decoder(ModelConfig.from_dir(checkpoint), "fp32")

        assert source.check(model) == []
        for name, shape in model.tensors.items():
            if len(shape) == 1:
                values = source.read(name)
                assert (values.abs() > 1e-3).float().mean() > 0.9 and ((values - 1).abs() > 1e-3).float().mean() > 0.9


def test_paired_cuts_equal_transformers(tmp_path):
    """Both kinds of cuts write what is normalised before it is added."""
    path = make_family_checkpoint(
        tmp_path, "gemma3_text", **GEMMA3, num_hidden_layers=4, head_dim=64, intermediate_size=192
    )
    expected = hf_logits(path, TOKENS)
    for gpu, stream in ((0.5, 0.0), (0.0, 0.0), (0.0, 1.0), (0.5, 0.5), (1.0, 0.0)):
        plan = uniform_plan(toy_workload(path, paired=True), gpu, stream, gpu_kv_heads=1)

        assert nmse(logits_by(path, plan), expected) <= 1e-10


def test_gemma3_inside_a_model_of_images(tmp_path):
    """As published: text_config without the keys that are at their defaults, tensors under another prefix."""
    text = make_family_checkpoint(tmp_path / "text", "gemma3_text", **GEMMA3, num_hidden_layers=4)
    expected = hf_logits(text, TOKENS)
    values, tensors = json.loads((text / "config.json").read_text()), load_file(text / "model.safetensors")
    outer = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "eos_token_id": [2, 3]}
    (text / "config.json").write_text(json.dumps(outer | {"text_config": values, "vision_config": {"hidden_size": 8}}))
    renamed = {f"language_model.{name}": tensor for name, tensor in tensors.items()}
    save_file(renamed | {"vision_tower.x": torch.zeros(2)}, text / "model.safetensors", metadata={"format": "pt"})

    config = ModelConfig.from_dir(text)

    assert (config.architecture, config.num_layers, config.eos_token_ids) == ("Gemma3ForCausalLM", 4, (2,))
    assert nmse(logits_by(text, cpu_plan(toy_workload(text))), expected) <= 1e-10
    with open_source(text) as source:
        assert "vision_tower.x" in source.check(decoder(config))[0]


def test_published_gemma3_defaults(tmp_path):
    """The published 4B config names a third of its sizes; the others are transformers' defaults."""
    text = {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    outer = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps(outer))

    config = ModelConfig.from_dir(tmp_path)

    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.vocab_size) == (8, 4, 256, 262208)
    assert config.sliding_window[:7] == (1024,) * 5 + (0, 1024)
    assert (config.rope_of(0).theta, config.rope_of(0).rope_type) == (1e4, "default")
    assert (config.rope_of(5).theta, config.rope_of(5).rope_type, config.rope_of(5).factor) == (1e6, "linear", 8.0)
    assert config.tie_word_embeddings and config.attention_scale == 256**-0.5


def test_ids_that_a_family_has_beyond_a_smaller_vocabulary_are_none(tmp_path):
    """StarCoder2's default is 50256, its published vocabulary has 49152 tokens."""
    path = make_family_checkpoint(tmp_path, "starcoder2")
    edit_json(path / "config.json", bos_token_id=..., eos_token_id=...)
    (path / "generation_config.json").unlink()

    config = ModelConfig.from_dir(path)

    assert (config.bos_token_id, config.eos_token_ids) == (None, ())


def test_longrope_takes_the_long_divisors_where_a_run_may_be_long(tmp_path):
    """transformers does so for each call, here the context of the run decides."""
    values = {"hidden_size": 240, "rope_parameters": LONGROPE, "original_max_position_embeddings": 40}
    path = make_family_checkpoint(tmp_path, "phi3", **values)

    assert nmse(logits_by(path, cpu_plan(toy_workload(path))), hf_logits(path, TOKENS)) <= 1e-10
    config = ModelConfig.from_dir(path)
    assert not torch.equal(rope_tables(config, 40)[0], rope_tables(config, 41)[0][:40])


def test_rows_of_a_fused_tensor_that_do_not_fit_are_named(tmp_path):
    path = make_family_checkpoint(tmp_path, "phi3", head_dim=12)
    edit_json(path / "config.json", num_key_value_heads=6)

    with pytest.raises(CheckpointError, match=r"qkv_proj.weight has 120 rows, expected 216: those of q, k, v"):
        open_source(path)


@pytest.mark.parametrize("form", ["rope_parameters", "rope_scaling"])
def test_olmo3_with_one_object_of_rope_parameters(tmp_path, form):
    """The base is that of all layers, the scaling that of those that see everything: as vLLM reads it, and as
    transformers read rope_scaling beside rope_theta. The base of the one object was lost in layers with a window."""
    path = make_family_checkpoint(tmp_path, *MODELS["olmo3"][:1], **MODELS["olmo3"][1])
    expected = ModelConfig.from_dir(path)
    one = dict(MODELS["olmo3"][1]["rope_parameters"]["full_attention"])
    changes = {form: one} if form == "rope_parameters" else {"rope_theta": one.pop("rope_theta"), form: one}
    edit_json(path / "config.json", **{"rope_parameters": ..., "rope_scaling": ..., "rope_theta": ...} | changes)

    assert ModelConfig.from_dir(path) == expected
    assert {rope.rope_type for rope in expected.layer_ropes} == {"default", "yarn"}


REFUSED = {
    "longrope": (
        "phi3",
        {
            "rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0] * 3},
            "num_attention_heads": 8,
        },
        ConfigError,
        "short_factor is .*a list of 4 numbers",
    ),
    "no rope": ("smollm3", {"no_rope_layers": [1], "num_attention_heads": 4}, ConfigError, "no_rope_layers"),
    "soft cap": ("gemma3_text", {"attn_logit_softcapping": 50.0}, UnsupportedModelError, "attn_logit_softcapping"),
    "both ways": ("gemma3_text", {"use_bidirectional_attention": True}, UnsupportedModelError, "bidirectional"),
    "layer kind": ("gemma3_text", {"layer_types": ["linear_attention"] * 3}, UnsupportedModelError, "linear_attention"),
    "no window": ("gemma3_text", {"sliding_window": None}, ConfigError, "sliding_window"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_terms_that_are_not_computed_are_refused_by_name(tmp_path, case):
    family, changes, error, words = REFUSED[case]
    values = {
        "model_type": family,
        "num_hidden_layers": 3,
        "vocab_size": 140000,
        "hidden_size": 64,
        "intermediate_size": 8,
    }
    (tmp_path / "config.json").write_text("{}")
    edit_json(tmp_path / "config.json", **values | changes)

    with pytest.raises(error, match=words):
        ModelConfig.from_dir(tmp_path)
