"""Mixtures of experts against transformers in float32: every family, every lane, every way that a file has them."""

import pytest
import torch

from hetero_attn.checkpoints.checkpoint import Checkpoint
from hetero_attn.errors import CheckpointError, ConfigError
from hetero_attn.models.decoder import decoder
from hetero_attn.spec.config import ModelConfig
from tests.support.moe import FAMILIES, fused, make_moe, moe_logits
from tests.support.runtime import cpu_plan, make_engine, nmse, run_logits, toy_workload, uniform_plan
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


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_sequences_of_a_batch_do_not_mix(checkpoints, device):
    """Two prompts of other lengths, decoded together: each row its own experts."""
    path = checkpoints["qwen2_moe"]
    workload = toy_workload(path)
    engine = make_engine(path, cpu_plan(workload) if device == "cpu" else uniform_plan(workload, 0.5, 0.2, 1))
    prompts, found = (TOKENS[:9], TOKENS[20:41]), [[], []]
    sequences = [engine.kv_cache.open() for _ in prompts]
    for sequence, prompt in zip(sequences, prompts, strict=True):
        for start in range(0, len(prompt), 16):
            engine.prefill(sequence, prompt[start : start + 16])
    for token in TOKENS[10:16]:
        for rows, logits in zip(found, engine.decode_step(sequences, [token, token]), strict=True):
            rows.append(logits)
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
    program = engine.replay.program(1)
    for token in TOKENS[6:30]:
        engine.decode_step([sequence], [token])
    same = engine.replay.program(1) is program
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
