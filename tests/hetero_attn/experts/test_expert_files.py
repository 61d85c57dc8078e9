"""Every way that a file has experts, and what it says of them: the same model, or a refusal by name."""

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from hetero_attn import LLM
from hetero_attn.checkpoints.checkpoint import Checkpoint
from hetero_attn.checkpoints.gguf.fields import GgufFields
from hetero_attn.checkpoints.sources import open_source, read_config, stored_formats
from hetero_attn.errors import CheckpointError, ConfigError, UnsupportedModelError
from hetero_attn.models.decoder import decoder
from hetero_attn.spec.config import ModelConfig
from hetero_attn.spec.experts_config import gguf_experts
from hetero_attn.spec.tensor_names import expert_tensor
from hetero_attn.spec.weight_formats import WeightFormats
from hetero_attn.spec.workload import Sizes, build_workload
from tests.support.models.expert_logits import EXACT, TOKENS, logits_of
from tests.support.models.moe import FAMILIES, fused, make_moe, moe_gguf, moe_logits
from tests.support.models.runtime import (
    cpu_plan,
    nmse,
    toy_workload,
    uniform_plan,
)
from tests.support.models.toy import edit_json
from tests.support.quantised.scaled_models import fp8_blocks


def test_experts_of_one_layer_in_several_formats_are_refused_by_name(checkpoints):
    """They lie in one piece, each as large as the first; one that was not used to be read as if it were."""
    config, odd = ModelConfig.from_dir(checkpoints["qwen3_moe"]), expert_tensor(1, 3, "down")
    formats = WeightFormats("bf16", "bf16", {odd: "fp8"})

    with pytest.raises(
        UnsupportedModelError, match=r"layers.1.experts: down of expert 3 is fp8 and that of expert 0 bf16"
    ):
        decoder(config, formats)


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe"])
def test_fused_tensors_are_the_same_model(checkpoints, family, tmp_path):
    """All experts of a layer in one tensor: cut by offsets, read by the same names."""
    path = tmp_path / "fused"
    fused(checkpoints[family], path)
    with Checkpoint.open(path) as one, Checkpoint.open(checkpoints[family]) as other:
        names = [name for name in other.names if ".experts." in name]
        assert sorted(one.names) == sorted(other.names)
        assert all(torch.equal(one.read(name), other.read(name)) for name in names)
        assert not one.check(decoder(ModelConfig.from_dir(path)))
    actual = logits_of(path, cpu_plan(toy_workload(path)))

    assert nmse(actual, moe_logits(checkpoints[family], TOKENS)) <= EXACT


def test_a_missing_expert_is_named(checkpoints, tmp_path):
    path = make_moe(tmp_path, "qwen3_moe")
    edit_json(path / "config.json", num_local_experts=13)

    with Checkpoint.open(path) as checkpoint, pytest.raises(CheckpointError, match=r"experts\.12\.|mlp\.gate"):
        checkpoint.check(decoder(ModelConfig.from_dir(path)))


@pytest.mark.parametrize("key", ["num_experts", "num_local_experts"])
def test_both_spellings_of_the_count(checkpoints, tmp_path, key):
    source = checkpoints["qwen3_moe"] / "config.json"
    (tmp_path / "config.json").write_bytes(source.read_bytes())
    edit_json(tmp_path / "config.json", num_experts=..., num_local_experts=...)
    edit_json(tmp_path / "config.json", **{key: 12})

    assert ModelConfig.from_dir(tmp_path).experts.experts == 12


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_experts_per_tok": 99}, "num_experts_per_tok"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok"),
        ({"moe_intermediate_size": -1}, "moe_intermediate_size"),
        ({"mlp_only_layers": "all"}, "mlp_only_layers"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step"),
    ],
)
def test_impossible_counts_are_refused(checkpoints, tmp_path, changes, named):
    (tmp_path / "config.json").write_bytes((checkpoints["qwen3_moe"] / "config.json").read_bytes())
    edit_json(tmp_path / "config.json", **changes)

    with pytest.raises(ConfigError, match=named):
        ModelConfig.from_dir(tmp_path)


@pytest.mark.parametrize(("key", "value"), [("expert_gating_func", 2), ("expert_weights_scale", 2.5)])
def test_a_file_whose_router_is_another_is_refused_by_its_key(key, value):
    with pytest.raises(UnsupportedModelError, match=key):
        gguf_experts(router_fields(**{key: value}), {"intermediate_size": 64, "num_layers": 2}, True)


@pytest.mark.parametrize("said", [None, True, False])
def test_a_file_that_says_whether_weights_are_normalised_is_believed(said):
    more = {} if said is None else {"expert_weights_norm": said}
    found = [
        gguf_experts(router_fields(expert_gating_func=1, **more), {"intermediate_size": 64, "num_layers": 2}, usual)
        for usual in (True, False)
    ]

    assert [config.normalised for config in found] == ([True, False] if said is None else [said] * 2)


def router_fields(**values):
    """Metadata of a GGUF file with experts."""
    keys = {"expert_count": 8, "expert_used_count": 2} | values
    return GgufFields(
        Path("model.gguf"),
        {"general.architecture": "qwen3moe"} | {f"qwen3moe.{key}": value for key, value in keys.items()},
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_gguf_files_hold_the_same_model(family, tmp_path):
    """Experts of a layer in one tensor each; sizes from the metadata; the codes run as they are, or as float32."""
    file, plain = moe_gguf(tmp_path, family)
    config, expected = read_config(file), ModelConfig.from_dir(plain)
    assert config.experts == expected.experts
    assert config.qk_norm_whole == expected.qk_norm_whole
    with open_source(file) as source, open_source(plain) as other:
        source.check(decoder(config))
        name = "model.layers.1.mlp.experts.2.down_proj.weight"
        assert source.shape(name) == other.shape(name) and source.dtype(name) == "q8"

    llm = LLM(file, device="cpu", dtype="fp32", max_context=64)
    exact = llm.logits(TOKENS[:12])
    llm.close()
    assert nmse(exact, moe_logits(plain, TOKENS[:12])) <= EXACT

    assert stored_formats(file, config).label == "q8"  # routers are float32 whatever the file has
    llm = LLM(file, device="cpu", max_context=64)
    coded = llm.logits(TOKENS[:12])
    llm.close()
    assert nmse(coded, moe_logits(plain, TOKENS[:12])) <= 1e-2


def test_layers_that_predict_further_tokens_are_left_alone(checkpoints, tmp_path):
    """The one layer behind the model's that its config allows; a second one is an error."""
    config = ModelConfig.from_dir(checkpoints["glm4_moe"])
    tensors = load_file(checkpoints["glm4_moe"] / "model.safetensors")
    (tmp_path / "config.json").write_bytes((checkpoints["glm4_moe"] / "config.json").read_bytes())
    for layer in (3, 4):
        save_file(tensors | {f"model.layers.{layer}.eh_proj.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
        with open_source(tmp_path) as source:
            if layer == 3:
                assert "model.layers.3.eh_proj.weight" in source.check(decoder(config))[0]
                continue
            with pytest.raises(CheckpointError, match="have layers up to 4"):
                source.check(decoder(config))


def test_experts_of_minimax_in_fp8_as_published(tmp_path):
    """Blocks of 128 x 128 with a scale each, under the names that Mixtral gives experts."""
    plain, write = make_moe(tmp_path / "plain", "minimax_m2", layers=2), fp8_blocks(128, 128)
    tensors, stored = load_file(plain / "model.safetensors"), {}
    for seed, (name, values) in enumerate(sorted(tensors.items())):
        parts = {"weight": values}
        if ".experts." in name or "_proj.weight" in name:
            parts, tensors[name] = write(*values.shape, torch.Generator().manual_seed(seed))
        stored |= {
            f"{name.rpartition('.')[0]}.{part}" if part != "weight" else name: item for part, item in parts.items()
        }
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    scaled = tmp_path / "scaled"
    scaled.mkdir()
    (scaled / "config.json").write_bytes((plain / "config.json").read_bytes())
    edit_json(scaled / "config.json", quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    save_file(stored, scaled / "model.safetensors", metadata={"format": "pt"})
    with LLM(scaled, device="cpu", dtype="fp32", max_context=64, progress=False) as llm:
        logits = llm.logits(TOKENS[:12])

    assert nmse(logits, moe_logits(plain, TOKENS[:12])) <= EXACT


def test_a_plan_names_what_down_is_packed_as_where_it_is_another_format(tmp_path):
    """As GGUF mixtures have it: 6 bits for down in some layers. A table used to show gate's and up's alone, and a rule
    to ask for their dtype would convert down too."""
    config = ModelConfig.from_dir(make_moe(tmp_path, "qwen3_moe", layers=2, moe_intermediate_size=256, hidden_size=256))
    finer = {expert_tensor(1, index, "down"): "q6_k" for index in range(config.experts.experts)}
    formats = WeightFormats("q8", "q8", finer)
    sizes = Sizes(max_context=64, max_batch=1, page_size=4, prefill_chunk=16)
    plan = cpu_plan(build_workload(decoder(config, formats), formats, "toy", sizes))
    rows = [line.rstrip() for line in plan.table(200).splitlines() if ".experts " in line]
    narrow = uniform_plan(plan.workload, 0.5, 0.0, 1).table(80)
    rules = {rule["match"]: rule for rule in yaml.safe_load(plan.to_yaml())["rules"]}

    assert [line.split("  ")[-1] for line in rows] == ["q8", "q8, down q6_k"]
    assert "layers.1.experts q8, down q6_k" in " ".join(narrow.split())
    assert max(map(len, (plan.table(80) + narrow).splitlines())) <= 80
    assert rules["layers.0.experts"]["dtype"] == "q8" and "dtype" not in rules["layers.1.experts"]
    assert set(plan.workload.weight_formats) == {"q8", "q6_k"} and plan.workload.is_mixed
    assert {each["weight_format"] for each in plan.to_dict()["linears"]} == {"q8"}
