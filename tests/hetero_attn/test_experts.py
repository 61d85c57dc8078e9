"""Mixtures of experts against transformers in float32: every family, every lane, every way that a file has them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpu_kernels import reference
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
from placement.plan.memory import KvPlacement, LinearPlacement
from placement.plan.workload import NUM_ROW_TIERS
from tests.support.cpu_oracles import kernels
from tests.support.fake_engine import fake_engine
from tests.support.moe import FAMILIES, LEAST_GAP, fused, make_moe, moe_gguf, moe_logits
from tests.support.planted_experts import PITFALLS, Planted, planted_logits
from tests.support.runtime import (
    cpu_plan,
    decoded_together,
    emulated_plan,
    make_engine,
    nmse,
    run_logits,
    toy_workload,
    uniform_plan,
)
from tests.support.scaled_models import fp8_blocks
from tests.support.toy import edit_json

EXACT = 1e-10
TOKENS = torch.randint(307, (50,), generator=torch.Generator().manual_seed(2)).tolist()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return {family: make_moe(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


def logits_of(path, plan, prompt_tokens=40, overlap=True):
    engine = make_engine(path, plan, overlap=overlap)
    try:
        return run_logits(engine, TOKENS, prompt_tokens)
    finally:
        engine.close()


def test_experts_of_one_layer_in_several_formats_are_refused_by_name(checkpoints):
    """They lie in one piece, each as large as the first; one that was not used to be read as if it were."""
    config, odd = ModelConfig.from_dir(checkpoints["qwen3_moe"]), expert_tensor(1, 3, "down")
    formats = WeightFormats("bf16", "bf16", {odd: "fp8"})

    with pytest.raises(
        UnsupportedModelError, match=r"layers.1.experts: down of expert 3 is fp8 and that of expert 0 bf16"
    ):
        decoder(config, formats)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("overlap", [True, False], ids=["recorded", "plain"])
def test_the_cpu_lane_equals_transformers(checkpoints, family, overlap):
    """A prompt in three chunks, then tokens one by one, which one recorded program computes."""
    path = checkpoints[family]
    actual = logits_of(path, cpu_plan(toy_workload(path)), overlap=overlap)

    assert nmse(actual, moe_logits(path, TOKENS)) <= EXACT


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("gpu,stream,groups", [(0.0, 0.0, 0), (0.4, 0.3, 1), (0.5, 0.5, 2), (1.0, 0.0, 2)])
def test_three_lanes_equal_transformers(checkpoints, family, gpu, stream, groups):
    """Whole experts on every lane, and the shared expert's columns cut between them."""
    path = checkpoints[family]
    actual = logits_of(path, uniform_plan(toy_workload(path), gpu, stream, groups))

    assert nmse(actual, moe_logits(path, TOKENS)) <= EXACT


@pytest.mark.parametrize("family", ["gpt_oss", "qwen2_moe"])
@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_sequences_of_a_batch_do_not_mix(checkpoints, family, device):
    """Two prompts of other lengths, decoded together: each row its own experts."""
    path = checkpoints[family]
    workload = toy_workload(path)
    engine = make_engine(path, cpu_plan(workload) if device == "cpu" else uniform_plan(workload, 0.5, 0.2, 1))
    prompts = TOKENS[:9], TOKENS[20:41]
    _, found = decoded_together(engine, prompts, TOKENS[10:16])
    engine.close()

    for prompt, rows in zip(prompts, found, strict=True):
        expected = moe_logits(path, [*prompt, *TOKENS[10:16]])[len(prompt) :]
        assert nmse(torch.stack(rows), expected) <= EXACT


def test_one_recording_serves_changing_routes(checkpoints):
    """Ids are data: whatever is routed, one program a batch size."""
    engine = make_engine(checkpoints["qwen3_moe"], cpu_plan(toy_workload(checkpoints["qwen3_moe"])))
    sequence = engine.kv_cache.open()
    engine.prefill(sequence, TOKENS[:5])
    engine.decode_step([sequence], TOKENS[5:6])
    program = engine.forward.replay.program(1)
    for token in TOKENS[6:30]:
        engine.decode_step([sequence], [token])
    same = engine.forward.replay.program(1) is program
    engine.close()

    assert same


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


def test_some_layers_may_be_dense(tmp_path):
    """Every second layer has experts, and the last of those is said to be dense."""
    path = make_moe(tmp_path, "qwen3_moe", layers=4, decoder_sparse_step=2, mlp_only_layers=[3])
    kinds = [layer[1].kind for layer in decoder(ModelConfig.from_dir(path)).layers]

    assert kinds == ["mlp", "experts", "mlp", "mlp"]
    assert nmse(logits_of(path, cpu_plan(toy_workload(path))), moe_logits(path, TOKENS)) <= EXACT


def test_windows_are_those_of_every_other_layer_below_a_limit(tmp_path):
    """Of Qwen2-MoE, where a config does not name the layers' kinds; dense Qwen2 has them from the limit on."""
    windows = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 3}
    path = make_moe(tmp_path, "qwen2_moe", layers=5, **windows)
    edit_json(path / "config.json", layer_types=...)

    assert ModelConfig.from_dir(path).sliding_window == (9, 0, 9, 0, 0)
    assert nmse(logits_of(path, cpu_plan(toy_workload(path))), moe_logits(path, TOKENS)) <= EXACT


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe"])
def test_a_window_that_is_used_and_not_given_is_that_of_transformers(checkpoints, tmp_path, family):
    (tmp_path / "config.json").write_bytes((checkpoints[family] / "config.json").read_bytes())
    edit_json(tmp_path / "config.json", layer_types=..., sliding_window=..., use_sliding_window=True)

    assert ModelConfig.from_dir(tmp_path).sliding_window[0] == 4096


@pytest.mark.parametrize("pitfall", PITFALLS)
def test_a_planted_error_shows(checkpoints, pitfall):
    """What the comparison with transformers would say of each of them: far beyond what it allows."""
    family, *planted = PITFALLS[pitfall]
    path = checkpoints[family]
    actual = planted_logits(path, planted, TOKENS[:16], 12)

    assert nmse(actual, moe_logits(path, TOKENS[:16])) > 100 * EXACT


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_far_enough_apart(checkpoints, family):
    """The toy routers leave no near ties, so that one chosen set is right and every other one is an error."""
    path, gaps = checkpoints[family], []

    def keep(route, x, router, scoring, into):
        route(x, router, scoring, into)
        ids, count, k = into.ids, into.starts.shape[0] - 1, into.ids.shape[1]
        if k < count:
            found = reference.choice_scores(x.double(), router[:count].double(), scoring)
            found = reference.in_best_groups(found, scoring)
            scores = found.sort(-1, descending=True).values
            gaps.append((scores[:, k - 1] - scores[:, k]).min().item() / scores[scores.isfinite()].std().item())
            expected = found.topk(k).indices.sort(-1).values
            assert torch.equal(ids.long(), expected)

    engine = make_engine(path, cpu_plan(toy_workload(path)), overlap=False)
    kept = engine.lanes.host_ops
    engine.lanes.host_ops = Planted(kept, "route", keep)
    try:
        run_logits(engine, TOKENS, 40)
    finally:
        engine.lanes.host_ops = kept
        engine.close()

    assert gaps and min(gaps) > LEAST_GAP


@pytest.mark.parametrize("weight_dtype", ["bf16", "q8", "q4"])
def test_packed_experts_are_the_same_on_every_lane(checkpoints, weight_dtype):
    """Against the one-device run in the same format, within what its rounding explains."""
    path = checkpoints["qwen2_moe"]
    one = logits_of(path, cpu_plan(toy_workload(path, weight_dtype)))
    lanes = logits_of(path, uniform_plan(toy_workload(path, weight_dtype), 0.4, 0.3, 1))

    assert nmse(lanes, one) <= 2e-4


def experts_at(workload, gpu, stream):
    """Everything but experts alike: on the GPU what is dense, of the experts such shares on the GPU and streamed."""
    linears = []
    for shard in workload.linears:
        home = round(gpu * shard.units) if shard.picks else shard.units
        streamed = round(stream * shard.units) if shard.picks else 0
        linears.append(LinearPlacement(shard.name, home, (streamed,) * NUM_ROW_TIERS, shard.units))
    kv = [KvPlacement(shard.name, shard.kv_heads, workload.full_tokens, shard.kv_heads) for shard in workload.kv]
    return emulated_plan(workload, linears, kv)


CUTS = [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.3, 0.4), (0.8, 0.0)]


@pytest.mark.parametrize("weight_dtype", ["q8", "q4"])
def test_no_bit_depends_on_the_lane_of_an_expert(checkpoints, weight_dtype):
    """Of whole-number formats: a prompt in chunks and then single tokens, each expert on any lane."""
    path = checkpoints["qwen3_moe"]
    logits = [logits_of(path, experts_at(toy_workload(path, weight_dtype), *cut)) for cut in CUTS]

    assert all(torch.equal(other, logits[0]) for other in logits[1:])


def test_of_numbers_the_lane_of_an_expert_is_seen(checkpoints):
    """That the test above could fail: bf16 experts are rounded alike but not added alike."""
    path = checkpoints["qwen3_moe"]
    logits = [logits_of(path, experts_at(toy_workload(path, "bf16"), *cut)) for cut in CUTS[:2]]

    assert not torch.equal(*logits)


@pytest.mark.parametrize("kind", ["MXFP4", "Q5_1"])
def test_no_bit_of_a_file_s_codes_depends_on_the_lane(kind, tmp_path):
    file, _ = moe_gguf(tmp_path, "qwen3_moe", kind)
    logits = []
    for units in (0, 7, 12):
        (tmp_path / "policy.yaml").write_text(
            "gpu_memory: 1GiB\nrules:\n"
            f"  - {{match: 'layers.*.experts', gpu: {units} units, cpu: {12 - units} units}}\n"
            "  - {match: '*', gpu: 1.0}\n"
        )
        with LLM(file, device="emulated", policy=tmp_path / "policy.yaml", max_context=64, progress=False) as llm:
            assert llm.plan.linear("layers.1.experts").gpu_units == units
            logits.append(llm.logits(TOKENS[:20]))

    assert all(torch.equal(other, logits[0]) for other in logits[1:])


@pytest.mark.parametrize("handover", ["events", "flags", "graph"])
def test_steps_queued_for_cuda_follow_changing_routes(checkpoints, handover):
    """The CUDA driver over its stand-ins: captured once, experts resident, streamed and on the CPU, to the bit."""
    path = checkpoints["qwen3_moe"]
    plan = experts_at(toy_workload(path, "q4"), 0.3, 0.4)
    with fake_engine(path, plan, handover=handover, slack_bytes=1 << 18) as engine:
        actual = run_logits(engine, TOKENS, 40)

    assert torch.equal(actual, logits_of(path, plan))


@pytest.mark.parametrize("ops", ["reference", "kernels"])
def test_where_experts_live_changes_no_bit_of_their_sum(ops):
    """Outputs by place from one kernel, near or far, in any split: the sum runs in the order of ids."""
    generator = torch.Generator().manual_seed(1)
    parts, weights = torch.randn(24, 40, generator=generator), torch.rand(8, 3, generator=generator)
    places, rows = torch.randperm(24, generator=generator).view(8, 3).int(), torch.randn(8, 40, generator=generator)
    sums = []
    for border in range(0, 25, 6):
        out = rows.clone()
        other = torch.full_like(parts, torch.nan)
        near, far = parts.clone(), parts.clone()
        near[border:], far[:border] = other[border:], other[:border]
        {"reference": reference, "kernels": kernels()}[ops].combine(
            near, far, torch.tensor([border], dtype=torch.int32), places, weights, out
        )
        sums.append(out)

    assert all(torch.equal(out, sums[0]) for out in sums)


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
