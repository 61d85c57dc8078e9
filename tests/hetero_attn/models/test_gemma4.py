"""Gemma 4 against transformers in float32, dense and with experts, on every lane; and what of it is refused by name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpu_kernels import reference
from hetero_attn import LLM
from hetero_attn.checkpoints.sources import open_source
from hetero_attn.errors import ConfigError, UnsupportedModelError
from hetero_attn.models.decoder import decoder
from hetero_attn.spec.config import ModelConfig
from hetero_attn.tools import verify
from tests.support.gpu.fake_engine import fake_engine
from tests.support.kernels.cpu_oracles import kernels
from tests.support.models.moe import make_moe, moe_logits
from tests.support.models.runtime import (
    cpu_plan,
    decoded_together,
    make_engine,
    nmse,
    run_logits,
    toy_workload,
    uniform_plan,
)
from tests.support.models.toy import edit_json, hf_logits
from tests.support.planted.planted_experts import planted_logits

FAMILY, EXACT = "gemma4_text", 1e-10
TOKENS = torch.randint(307, (50,), generator=torch.Generator().manual_seed(2)).tolist()
KINDS = {
    "experts": {},
    "dense": {"enable_moe_block": False},
    "dense-own-values": {
        "enable_moe_block": False,
        "attention_k_eq_v": False,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "full_attention": {
                "rope_type": "proportional",
                "partial_rotary_factor": 0.5,
                "factor": 3.0,
                "rope_theta": 5e3,
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
        },
    },
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    made = {kind: make_moe(tmp_path_factory.mktemp(kind), FAMILY, layers=4, **more) for kind, more in KINDS.items()}
    return made


def expected_logits(path, tokens=TOKENS):
    return (moe_logits if json.loads((path / "config.json").read_text())["enable_moe_block"] else hf_logits)(
        path, tokens
    )


def logits_of(path, plan, overlap=True):
    engine = make_engine(path, plan, overlap=overlap)
    try:
        return run_logits(engine, TOKENS, 40)
    finally:
        engine.close()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("overlap", [True, False], ids=["recorded", "plain"])
def test_the_cpu_lane_equals_transformers(checkpoints, kind, overlap):
    path = checkpoints[kind]

    assert nmse(logits_of(path, cpu_plan(toy_workload(path)), overlap), expected_logits(path)) <= EXACT


@pytest.mark.parametrize("kind", ["experts", "dense"])
@pytest.mark.parametrize("gpu,stream,groups", [(0.0, 0.0, 0), (0.4, 0.3, 1), (0.5, 0.5, 2), (1.0, 0.0, 2)])
def test_three_lanes_equal_transformers(checkpoints, kind, gpu, stream, groups):
    """Heads of two sizes in one cache, whole experts on every lane, the MLP's columns cut between them."""
    path = checkpoints[kind]
    actual = logits_of(path, uniform_plan(toy_workload(path), gpu, stream, groups))

    assert nmse(actual, expected_logits(path)) <= EXACT


def test_sequences_of_a_batch_do_not_mix(checkpoints):
    path, prompts = checkpoints["experts"], (TOKENS[:9], TOKENS[20:41])
    engine = make_engine(path, uniform_plan(toy_workload(path), 0.5, 0.2, 1))
    _, found = decoded_together(engine, prompts, TOKENS[10:16])
    engine.close()

    for prompt, rows in zip(prompts, found, strict=True):
        expected = expected_logits(path, [*prompt, *TOKENS[10:16]])[len(prompt) :]
        assert nmse(torch.stack(rows), expected) <= EXACT


@pytest.mark.parametrize("handover", [pytest.param("events", marks=pytest.mark.matrix), "graph"])
def test_steps_queued_for_cuda_are_the_emulated_ones(checkpoints, handover):
    """The CUDA driver over its stand-ins, every access in the order that its streams and events say."""
    path = checkpoints["experts"]
    plan = uniform_plan(toy_workload(path), 0.4, 0.3, 1)
    with fake_engine(path, plan, handover=handover, slack_bytes=1 << 18) as engine:
        actual = run_logits(engine, TOKENS, 40)

    assert nmse(actual, expected_logits(path)) <= EXACT


@pytest.mark.parametrize("weight_dtype", ["q8", "q4"])
def test_no_bit_depends_on_the_lane_of_an_expert(checkpoints, weight_dtype):
    """The activation of these experts has the same bits on every lane, as their products do."""
    path = checkpoints["experts"]
    logits = []
    for experts in (0.0, 0.5, 1.0):
        policy = path / f"policy-{experts}.yaml"
        policy.write_text(
            "gpu_memory: 1GiB\nrules:\n"
            f"  - {{match: 'layers.*.experts', gpu: {round(10 * experts)} units, cpu: {round(10 - 10 * experts)} units}}\n"
            "  - {match: '*', gpu: 1.0}\n"
        )
        with LLM(path, device="emulated", dtype=weight_dtype, policy=policy, max_context=64, progress=False) as llm:
            logits.append(llm.logits(TOKENS[:20]))

    assert all(torch.equal(other, logits[0]) for other in logits[1:])


def test_gelu_has_the_same_bits_on_every_lane():
    gate_up = 4.0 * torch.randn(64, 96, generator=torch.Generator().manual_seed(3))
    gate_up[0, :4] = torch.tensor([0.0, -0.0, 90.0, -90.0])
    found = torch.empty(2, 64, 48)
    kernels().gelu_mul(gate_up, found[0])
    reference.gelu_mul(gate_up, found[1])

    assert torch.equal(found[0], found[1])


PLANTED = {
    "numbers of experts forgotten": ("add_expert_bias", lambda op, bias, picks, out: out.fill_(1.0)),
    "numbers of other experts": ("add_expert_bias", lambda op, bias, picks, out: op(bias.roll(1, 0), picks, out)),
    "what leaves a layer is not scaled": (
        "scale_rows",
        lambda op, factors, out: None if out.shape[1] == 72 else op(factors, out),
    ),
    "the experts' sum begins with what was there": ("copy_rows", lambda op, target, source: None),
    "silu": ("gelu_mul", lambda op, gate_up, out: reference.silu_mul(gate_up, out)),
    "values not normed": (
        "rms_norm",
        lambda op, x, weight, eps, out, *add: None if weight.shape[0] in (24, 40) else op(x, weight, eps, out, *add),
    ),
}


@pytest.mark.parametrize("error", PLANTED)
def test_a_planted_error_shows(checkpoints, error):
    path = checkpoints["experts"]
    actual = planted_logits(path, PLANTED[error], TOKENS[:16], 12)

    assert not nmse(actual, expected_logits(path, TOKENS[:16])) <= 100 * EXACT


def as_published(path, folder):
    """The config and names of the published models: sizes by keys of their own, text beside what sees images."""
    folder.mkdir()
    config = json.loads((path / "config.json").read_text())
    assert "per_layer_config" in config, "transformers no longer writes what is said of each layer; drop this test"
    text = {key: value for key, value in config.items() if key not in ("architectures", "per_layer_config")}
    text |= {"global_head_dim": 40, "num_global_key_value_heads": 3}
    whole = {"model_type": "gemma4", "architectures": ["Gemma4ForConditionalGeneration"], "text_config": text}
    (folder / "config.json").write_text(json.dumps(whole | {"tie_word_embeddings": False}))
    (folder / "tokenizer.json").write_bytes((path / "tokenizer.json").read_bytes())
    tensors = load_file(path / "model.safetensors")
    named = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in tensors.items()}
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_the_published_form_is_the_same_model(checkpoints, tmp_path):
    path = as_published(checkpoints["experts"], tmp_path / "published")
    plain = ModelConfig.from_dir(checkpoints["experts"])

    assert ModelConfig.from_dir(path) == plain
    assert plain.full_attention == (3, 40) and plain.experts.beside_mlp
    with open_source(path) as source:
        assert not source.check(decoder(plain))


@pytest.mark.parametrize(
    ("changes", "error", "named"),
    [
        ({"hidden_size_per_layer_input": 16}, UnsupportedModelError, "embeddings of each layer"),
        ({"num_kv_shared_layers": 2}, UnsupportedModelError, "keys and values of another"),
        ({"use_bidirectional_attention": "all"}, UnsupportedModelError, "use_bidirectional_attention"),
        ({"top_k_experts": 11}, ConfigError, "top_k_experts"),
        ({"per_layer_config": {"0": {"head_dim": 40}}}, UnsupportedModelError, "per_layer_config"),
        ({"per_layer_config": ..., "num_global_key_value_heads": 5}, ConfigError, "num_global_key_value_heads"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(checkpoints, tmp_path, changes, error, named):
    (tmp_path / "config.json").write_bytes((checkpoints["experts"] / "config.json").read_bytes())
    edit_json(tmp_path / "config.json", **changes)

    with pytest.raises(error, match=named):
        ModelConfig.from_dir(tmp_path)


def test_the_yardstick_of_verify_is_the_same_model(checkpoints):
    """The twin in exact arithmetic: an operation that writes its first argument was computed, and lost."""
    with LLM(checkpoints["experts"], device="cpu", dtype="fp32", max_context=64, progress=False) as llm:
        report = verify.run(llm, TOKENS[:20], 4)

    assert report.rounding.nmse <= EXACT
