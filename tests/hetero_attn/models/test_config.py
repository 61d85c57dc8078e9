"""ModelConfig.from_dir: what transformers would read from the same files, and errors that say what is wrong."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hetero_attn.errors import ConfigError, UnsupportedModelError
from hetero_attn.models.rope import rope_tables
from hetero_attn.spec.config import ModelConfig
from tests.support.models.toy import FAMILIES, ROPES, edit_json, hf_model, make_checkpoint

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
}
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
QWEN3 = LLAMA | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
MISTRAL = LLAMA | {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}


def read(directory, values, generation=None):
    """Write `values` as config.json (`...` removes a key) and read it back through the door."""
    (directory / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return ModelConfig.from_dir(directory)


@pytest.mark.parametrize("biases", [False, True], ids=["plain", "biases"])
@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_and_biases_are_those_of_the_transformers_module(tmp_path, family, biases):
    path = make_checkpoint(tmp_path, family, biases=biases, tied=biases)
    model = hf_model(path)

    config = ModelConfig.from_dir(path)

    layer = model.model.layers[0]
    assert type(model).__name__ == config.architecture
    assert (layer.self_attn.q_proj.bias is not None) == config.qkv_bias
    assert (layer.self_attn.o_proj.bias is not None) == config.o_bias
    assert (layer.mlp.gate_proj.bias is not None) == config.mlp_bias
    assert hasattr(layer.self_attn, "q_norm") == config.qk_norm
    assert layer.self_attn.scaling == config.attention_scale
    assert layer.self_attn.num_key_value_groups == config.heads_per_kv_head == 3
    assert (3, 6, 2, 40) == (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim)
    assert (72, 150, 307, 512) == (
        config.hidden_size,
        config.intermediate_size,
        config.vocab_size,
        config.max_position_embeddings,
    )
    assert biases == config.tie_word_embeddings


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_are_those_of_transformers(tmp_path, family):
    """A config may leave out what its family takes for granted: head_dim 128 in Qwen3, a window of 4096 in Mistral."""
    from transformers import AutoConfig

    given = {
        "model_type": family,
        "hidden_size": 4096,
        "intermediate_size": 64,
        "num_hidden_layers": 30,
        "num_attention_heads": 32,
        "vocab_size": 100,
        "use_sliding_window": True,
        "eos_token_id": 7,
    }
    config = read(tmp_path, given)
    expected = AutoConfig.from_pretrained(tmp_path)

    assert expected.num_key_value_heads == config.num_kv_heads
    assert (getattr(expected, "head_dim", None) or 128) == config.head_dim
    assert expected.max_position_embeddings == config.max_position_embeddings
    assert expected.rms_norm_eps == config.rms_norm_eps
    assert expected.rope_parameters["rope_theta"] == config.rope.theta
    assert expected.tie_word_embeddings == config.tie_word_embeddings


def test_windows_of_each_family(tmp_path):
    mistral = read(tmp_path, MISTRAL | {"sliding_window": 32})
    no_window = read(tmp_path, MISTRAL | {"sliding_window": None})
    absent = read(tmp_path, MISTRAL)
    switched_off = read(tmp_path, QWEN2 | {"sliding_window": 32, "max_window_layers": 0})
    from_second_layer = read(
        tmp_path, QWEN2 | {"sliding_window": 32, "max_window_layers": 1, "use_sliding_window": True}
    )
    types = ["sliding_attention", "full_attention"]
    by_types = read(tmp_path, QWEN3 | {"sliding_window": 32, "use_sliding_window": True, "layer_types": types})
    llama = read(tmp_path, LLAMA | {"sliding_window": 32})

    assert (32, 32) == mistral.sliding_window
    assert (0, 0) == no_window.sliding_window
    assert (4096, 4096) == absent.sliding_window
    assert (0, 0) == switched_off.sliding_window
    assert (0, 32) == from_second_layer.sliding_window
    assert (32, 0) == by_types.sliding_window
    assert (0, 0) == llama.sliding_window


@pytest.mark.parametrize("rope_type", ROPES)
def test_old_and_new_rope_keys_mean_the_same(tmp_path, rope_type):
    parameters = ROPES[rope_type]
    old = {key: value for key, value in parameters.items() if key not in ("rope_theta", "rope_type")}
    old |= {"type": rope_type}

    new_form = read(tmp_path, LLAMA | {"rope_parameters": parameters})
    old_form = read(tmp_path, LLAMA | {"rope_theta": parameters["rope_theta"], "rope_scaling": old})

    assert new_form.rope == old_form.rope
    assert rope_type == new_form.rope.rope_type


def test_original_context_comes_from_the_top_level_then_the_rope_then_the_context(tmp_path):
    yarn = {"rope_type": "yarn", "factor": 4.0}
    top = read(
        tmp_path,
        LLAMA
        | {"rope_scaling": yarn | {"original_max_position_embeddings": 32}}
        | {"original_max_position_embeddings": 16},
    )
    inner = read(tmp_path, LLAMA | {"rope_scaling": yarn | {"original_max_position_embeddings": 32}})
    neither = read(tmp_path, LLAMA | {"rope_scaling": yarn})

    assert [16, 32, 256] == [config.rope.original_max_position_embeddings for config in (top, inner, neither)]


def test_yarn_without_factor_uses_the_ratio_of_contexts(tmp_path):
    rope = {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 64}

    assert 4.0 == read(tmp_path, LLAMA | {"rope_scaling": rope}).rope.factor


def test_token_ids_come_from_the_generation_config_first(tmp_path):
    config = read(
        tmp_path, LLAMA | {"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": -1}, {"eos_token_id": [5, 6]}
    )

    assert ((5, 6), 1, None) == (config.eos_token_ids, config.bos_token_id, config.pad_token_id)


@pytest.mark.parametrize(
    ("key", "value"), [("dtype", "bfloat16"), ("torch_dtype", "bfloat16"), ("dtype", "torch.bfloat16")]
)
def test_dtype_of_old_and_new_configs(tmp_path, key, value):
    assert "bf16" == read(tmp_path, LLAMA | {"torch_dtype": ...} | {key: value}).dtype


def test_architecture_alone_is_enough(tmp_path):
    config = read(tmp_path, QWEN3 | {"model_type": ..., "head_dim": None})

    assert config.qk_norm
    assert 16 == config.head_dim


def test_a_config_is_really_frozen(tmp_path):
    config = read(tmp_path, LLAMA)

    with pytest.raises(AttributeError):
        config.num_layers = 3
    assert not hasattr(config, "__dict__")


# Each fault: keys to change, error class, and what the message must say besides the file and the key.
FAULTS = {
    "layers-absurd": ({"num_hidden_layers": 100000}, ConfigError, ["num_hidden_layers is 100000", "1 to 1024"]),
    "layers-negative": ({"num_hidden_layers": -1}, ConfigError, ["num_hidden_layers is -1", "1 to 1024"]),
    "layers-string": ({"num_hidden_layers": "two"}, ConfigError, ["num_hidden_layers is 'two'", "an integer"]),
    "layers-bool": ({"num_hidden_layers": True}, ConfigError, ["num_hidden_layers is True", "an integer"]),
    "layers-fraction": ({"num_hidden_layers": 2.5}, ConfigError, ["num_hidden_layers is 2.5", "an integer"]),
    "vocab-absurd": ({"vocab_size": 2**22 + 1}, ConfigError, ["vocab_size is 4194305", "1 to 4194304"]),
    "hidden-absurd": ({"hidden_size": 2**18 + 4}, ConfigError, ["hidden_size is 262148", "1 to 262144"]),
    "context-absurd": ({"max_position_embeddings": 2**25 + 1}, ConfigError, ["max_position_embeddings is", "33554432"]),
    "hidden-missing": ({"hidden_size": ...}, ConfigError, ["hidden_size is missing", "download"]),
    "hidden-null": ({"hidden_size": None}, ConfigError, ["hidden_size is missing"]),
    "heads-hidden": ({"num_attention_heads": 6}, ConfigError, ["hidden_size 64", "num_attention_heads 6", "head_dim"]),
    "heads-kv": (
        {"num_key_value_heads": 3},
        ConfigError,
        ["num_attention_heads 4", "num_key_value_heads 3", "same number"],
    ),
    "head-dim-odd": ({"head_dim": 15}, ConfigError, ["head_dim 15", "even"]),
    "eps-zero": ({"rms_norm_eps": 0.0}, ConfigError, ["rms_norm_eps is 0.0", "above 0"]),
    "eps-string": ({"rms_norm_eps": "1e-5"}, ConfigError, ["rms_norm_eps is '1e-5'", "a number"]),
    "tie-string": ({"tie_word_embeddings": "yes"}, ConfigError, ["tie_word_embeddings is 'yes'", "true or false"]),
    "eos-beyond-vocab": ({"eos_token_id": 100}, ConfigError, ["eos_token_id is 100", "vocab_size 100"]),
    "eos-string": ({"eos_token_id": ["</s>"]}, ConfigError, ["eos_token_id is ['</s>']"]),
    "dtype-unknown": ({"torch_dtype": "int3"}, ConfigError, ["dtype is 'int3'", "bfloat16"]),
    "architecture": (
        {"architectures": ["GemmaForCausalLM"], "model_type": "gemma"},
        UnsupportedModelError,
        ["GemmaForCausalLM", "LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM"],
    ),
    "architecture-near": (
        {"architectures": ["LlamaForCausalML"]},
        UnsupportedModelError,
        ["did you mean 'LlamaForCausalLM'?"],
    ),
    "architecture-near-with-its-end": (
        {"architectures": ["LamaForCausalLM"]},
        UnsupportedModelError,
        ["did you mean 'LlamaForCausalLM'?"],
    ),
    "architecture-latent": (
        {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "kv_lora_rank": 512},
        UnsupportedModelError,
        ["is not supported: its attention has a latent (kv_lora_rank), which is not here yet"],
    ),
    "architecture-head": ({"architectures": ["LlamaForSequenceClassification"]}, UnsupportedModelError, ["Known arch"]),
    "architecture-none": (
        {"architectures": ..., "model_type": ...},
        ConfigError,
        ["neither model_type nor architectures"],
    ),
    "model-type-list": ({"architectures": ..., "model_type": [1]}, UnsupportedModelError, ["[1]"]),
    "rope-unknown": (
        {"rope_scaling": {"rope_type": "weird", "factor": 2}},
        UnsupportedModelError,
        ["rope type 'weird'", "default, linear, dynamic, llama3, yarn, longrope"],
    ),
    "rope-near": ({"rope_scaling": {"type": "yran"}}, UnsupportedModelError, ["did you mean 'yarn'?"]),
    "rope-list": ({"rope_scaling": [1]}, ConfigError, ["rope_scaling is [1]", "an object"]),
    "rope-no-factor": ({"rope_scaling": {"type": "linear"}}, ConfigError, ["factor is missing"]),
    "rope-factor": ({"rope_scaling": {"type": "linear", "factor": -2}}, ConfigError, ["factor is -2", "above 0"]),
    "rope-theta": ({"rope_theta": float("nan")}, ConfigError, ["rope_theta is nan"]),
    "rope-per-layer": (
        {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
        UnsupportedModelError,
        ["per layer type (full_attention)"],
    ),
    "rope-frequencies": (
        {"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}},
        ConfigError,
        ["high_freq_factor is 4", "above 4"],
    ),
    "quantised": (
        {"quantization_config": {"quant_method": "awq-next"}},
        UnsupportedModelError,
        ["quantization_config", "'awq-next'", "unquantised"],
    ),
    "quantised-unnamed": ({"quantization_config": {}}, UnsupportedModelError, ["'unnamed'"]),
    "activation": ({"hidden_act": "gelu"}, UnsupportedModelError, ["hidden_act is 'gelu'", "silu"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_values_are_named(tmp_path, fault):
    changes, error_class, parts = FAULTS[fault]

    with pytest.raises(error_class) as caught:
        read(tmp_path, LLAMA | changes)

    assert 3 == caught.value.exit_code
    for part in ["config.json", *parts]:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"layer_types": ["full_attention"]}, ["layer_types", "num_hidden_layers = 2"]),
        ({"layer_types": ["full_attention", "mamba"]}, ["'mamba'", "full_attention, sliding_attention"]),
        ({"layer_types": ["full_attention", "sliding_attention"]}, ["use_sliding_window"]),
        ({"use_sliding_window": True, "sliding_window": -4}, ["sliding_window is -4"]),
    ],
    ids=["length", "unknown", "without-window", "negative"],
)
def test_bad_windows_are_named(tmp_path, changes, parts):
    with pytest.raises((ConfigError, UnsupportedModelError)) as caught:
        read(tmp_path, QWEN2 | changes)

    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b'{"a": 1,\n "b": }', "line 2"),
        (b"", "line 1"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b'{"n": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"[1, 2]", "found a JSON list, expected an object"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b" " * (1 << 20) + b"{}", "expected at most 1048576"),
    ],
    ids=["syntax", "empty", "encoding", "digits", "list", "deep", "large"],
)
def test_bad_json_is_named(tmp_path, content, part):
    (tmp_path / "config.json").write_bytes(content)

    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dir(tmp_path)

    assert "config.json" in str(caught.value)
    assert part in str(caught.value)


def test_missing_config_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json: file not found"):
        ModelConfig.from_dir(tmp_path)


def test_errors_of_the_generation_config_name_that_file(tmp_path):
    with pytest.raises(ConfigError, match=r"generation_config\.json: eos_token_id is 'x'"):
        read(tmp_path, LLAMA, {"eos_token_id": "x"})


NASTY = [
    None,
    True,
    0,
    -1,
    1,
    2,
    3,
    7,
    2**70,
    0.5,
    1e400,
    float("nan"),
    -0.0,
    "",
    "yarn",
    "linear",
    [],
    [1, "a"],
    {},
    {"type": 5},
]
ROPE_KEYS = ["rope_type", "type", "factor", "rope_theta", "low_freq_factor", "high_freq_factor", "attention_factor"]
ROPE_KEYS += ["original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"]
KEYS = [
    *LLAMA,
    "head_dim",
    "hidden_act",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "partial_rotary_factor",
    "dtype",
]
KEYS += ["sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "tie_word_embeddings", "mlp_bias"]
KEYS += ["attention_bias", "eos_token_id", "bos_token_id", "pad_token_id", "quantization_config"]


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    base=st.sampled_from([LLAMA, MISTRAL, QWEN2, QWEN3]),
    changes=st.dictionaries(st.sampled_from(KEYS), st.sampled_from(NASTY), max_size=3),
    rope=st.dictionaries(st.sampled_from(ROPE_KEYS), st.sampled_from([*NASTY, *ROPES]), max_size=5),
)
def test_any_json_is_a_config_or_a_named_error(tmp_path, base, changes, rope):
    """No value of any key may surface as a TypeError, or as a table of NaN that only shows in the text."""
    try:
        config = read(tmp_path, base | {"rope_scaling": rope} | changes)
    except (ConfigError, UnsupportedModelError) as error:
        assert "config.json" in str(error)
        return

    assert len(config.sliding_window) == config.num_layers
    assert all(table.isfinite().all() for table in rope_tables(config, 8))


def test_auto_map_is_ignored_and_runs_nothing(tmp_path):
    """A config may name Python code of its own (vLLM CVE-2026-22807 ran it); here it must not even be looked at."""
    path = make_checkpoint(tmp_path / "model", layers=1)
    canary = tmp_path / "canary"
    (path / "evil.py").write_text(f"open({str(canary)!r}, 'w').close()\nclass C: pass\n")
    edit_json(path / "config.json", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.C"})

    config = ModelConfig.from_dir(path)

    assert "LlamaForCausalLM" == config.architecture
    assert not canary.exists()


def test_no_name_is_suggested_for_the_end_that_all_share(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["DeepseekV3ForCausalLM"]}))

    with pytest.raises(UnsupportedModelError) as raised:
        ModelConfig.from_dir(tmp_path)
    assert "did you mean" not in str(raised.value)
