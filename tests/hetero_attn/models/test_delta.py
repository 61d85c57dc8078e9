"""Qwen3-Next and Qwen3.5 against transformers in float32: gated DeltaNet, gated attention, mixed layers, states."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpu_kernels import reference
from hetero_attn import LLM, SamplingParams
from hetero_attn.checkpoints.sources import open_source
from hetero_attn.errors import CheckpointError, ConfigError, UnsupportedModelError
from hetero_attn.models import delta as delta_block
from hetero_attn.models.decoder import decoder
from hetero_attn.models.delta import DeltaNet, runs_of
from hetero_attn.ops import delta
from hetero_attn.spec.config import ModelConfig
from hetero_attn.tools.timeline.simulate import Simulation
from placement.machine.hardware import HardwareProfile
from tests.support.gpu.fake_engine import fake_engine
from tests.support.models.moe import make_moe, moe_logits
from tests.support.models.runtime import (
    batch_and_again,
    cpu_plan,
    make_engine,
    nmse,
    run_logits,
    toy_workload,
    uniform_plan,
)
from tests.support.models.toy import edit_json
from tests.support.planted.planted_experts import Planted

FAMILIES = ("qwen3_5_moe_text", "qwen3_5_text", "qwen3_next")
EXACT = 1e-9  # of sums that run over all tokens, in float32
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
TOKENS = torch.randint(307, (90,), generator=torch.Generator().manual_seed(2)).tolist()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return {family: make_moe(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


@pytest.fixture(params=FAMILIES)
def path(models, request):
    return models[request.param]


def logits_of(path, plan, prompt_tokens=80):
    engine = make_engine(path, plan)
    try:
        return run_logits(engine, TOKENS, prompt_tokens)
    finally:
        engine.close()


@pytest.mark.parametrize("chunk", [1, 7, 80])
def test_chunks_of_any_size_equal_transformers(path, chunk):
    """Token by token, in odd chunks, and in one that the delta rule takes in two; then single tokens."""
    actual = logits_of(path, cpu_plan(toy_workload(path, prefill_chunk=chunk)))

    assert nmse(actual, moe_logits(path, TOKENS)) <= EXACT


@pytest.mark.parametrize("gpu,stream,groups", [(0.0, 0.0, 0), (0.4, 0.3, 1), (1.0, 0.0, 2)])
def test_three_lanes_equal_transformers(path, gpu, stream, groups):
    actual = logits_of(path, uniform_plan(toy_workload(path), gpu, stream, groups))

    assert nmse(actual, moe_logits(path, TOKENS)) <= EXACT


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_sequences_of_a_batch_do_not_mix(models, device):
    """The third begins with nothing where the first one was."""
    path = models["qwen3_next"]
    workload = toy_workload(path)
    engine = make_engine(path, cpu_plan(workload) if device == "cpu" else uniform_plan(workload, 0.5, 0.2, 1))

    for tokens, actual in batch_and_again(engine, TOKENS):
        assert nmse(actual, moe_logits(path, tokens)[-len(actual) :]) <= EXACT


def test_answers_of_requests_that_begin_alike(models):
    """Through the scheduler: a batch, the same prompt again, and one that goes on behind it, all shorter than a page."""
    path = models["qwen3_next"]
    prompts = ["the quick brown fox", "the quick brown fox", "the quick brown fox jumps over"]
    with LLM(path, device="cpu", dtype="fp32", max_context=96, max_batch=2, progress=False) as llm:
        together = [output.token_ids for output in llm.generate(prompts, GREEDY)]
        alone = [llm.generate([prompt], GREEDY)[0].token_ids for prompt in prompts]

    assert together == alone and alone[0] == alone[1]


def test_a_fork_has_a_state_of_its_own_and_a_rewind_is_refused(models):
    """Of tokens that no pass drafted."""
    path = models["qwen3_next"]
    engine = make_engine(path, cpu_plan(toy_workload(path)))
    sequence = engine.kv_cache.open(60)
    engine.prefill(sequence, TOKENS[:12])
    twin = engine.kv_cache.fork(sequence, 60)
    engine.decode_step([sequence], TOKENS[30:31])
    actual = engine.decode_step([twin], TOKENS[12:13])[0]
    rewound = engine.kv_cache.rewind(twin, 5)
    engine.close()

    assert nmse(actual, moe_logits(path, TOKENS[:13])[-1]) <= EXACT
    assert not rewound


def one_by_one(tokens, state):
    """The delta rule as it is defined, token by token."""
    outs = []
    for q, k, v, decay, strength in zip(*(part.unbind(2) for part in tokens), strict=True):
        state = state * decay.exp()[..., None, None]
        update = strength[..., None] * (v - (state * k[..., None]).sum(-2))
        state = state + k[..., None] * update[..., None, :]
        outs.append((state * q[..., None]).sum(-2))
    return torch.stack(outs, 2), state


@pytest.mark.parametrize("count", [1, 5, 64, 150])
def test_a_chunk_is_its_tokens_one_by_one(count):
    """Decays from none to all, in float32 against float64, from a state that is not zero."""
    generator = torch.Generator().manual_seed(count)
    q, k, v = (torch.randn(2, 3, count, width, generator=generator) for width in (16, 16, 20))
    decay = -torch.rand(2, 3, count, generator=generator).square() * torch.tensor([1e-3, 1.0, 40.0])[:, None]
    tokens = delta.DeltaTokens(
        delta.unit_length(q), delta.unit_length(k), v, decay, torch.rand(2, 3, count, generator=generator)
    )
    state = torch.randn(2, 3, 16, 20, generator=generator)
    out, after = delta.gated_delta(tokens, state)
    expected, left = one_by_one(delta.DeltaTokens(*(part.double() for part in tokens)), state.double())

    assert nmse(out, expected) <= 1e-11 and nmse(after, left) <= 1e-11


def test_rows_are_grouped_by_sequence():
    """Single tokens side by side, then a chunk; a chunk of one token beside them is one of them."""
    assert list(runs_of([3, 0, 1, 2, 2, 2])) == [(slice(0, 3), 3), (slice(3, 6), 1)]
    assert list(runs_of([1, 1, 4, 4])) == [(slice(0, 2), 1), (slice(2, 4), 1)]
    assert list(runs_of([5])) == [(slice(0, 1), 1)]


def planted_state(tokens, state):
    return delta.gated_delta(tokens, torch.zeros_like(state))


def planted_inputs(x, before, kernel):
    return delta.short_convolution(x, torch.zeros_like(before), kernel)


PLANTED = {
    "the state is forgotten between chunks": ("gated_delta", planted_state),
    "the convolution begins anew": ("short_convolution", planted_inputs),
    "no decay": ("gated_delta", lambda tokens, state: delta.gated_delta(
        tokens._replace(decay=torch.zeros_like(tokens.decay)), state)),
    "full strength": ("gated_delta", lambda tokens, state: delta.gated_delta(
        tokens._replace(strength=torch.ones_like(tokens.strength)), state)),
    "key heads of the wrong values": ("gated_delta", lambda tokens, state: delta.gated_delta(
        tokens._replace(k=tokens.k.roll(1, 1)), state)),
    "keys not of length one": ("unit_length", lambda x: x),
    "convolution turned round": ("short_convolution", lambda x, before, kernel: delta.short_convolution(
        x, before, kernel.flip(1))),
}  # fmt: skip


@pytest.mark.parametrize("case", PLANTED)
def test_a_planted_error_shows(models, monkeypatch, case):
    name, wrong = PLANTED[case]
    monkeypatch.setattr(delta_block, name, wrong)
    path = models["qwen3_next"]

    assert nmse(logits_of(path, cpu_plan(toy_workload(path))), moe_logits(path, TOKENS)) > 100 * EXACT


STEPS = {
    "nothing": lambda step, *given: None,
    "strengths for decays": lambda step, units, gates, *rest: step(units, gates.roll(gates.shape[1] // 2, 1), *rest),
    "the taps turned round": lambda step, units, gates, rule, *rest: step(
        units, gates, rule._replace(conv=rule.conv.flip(0)), *rest),
    "no decay": lambda step, units, gates, rule, *rest: step(
        units, gates, rule._replace(rates=torch.zeros_like(rule.rates)), *rest),
    "value heads in the other order": lambda step, units, gates, rule, *rest: step(
        units, gates, rule._replace(is_tiled=True), *rest),
    "the state is not kept": lambda step, units, gates, rule, states, *rest: step(
        units, gates, rule, states._replace(values=states.values.clone()), *rest),
}  # fmt: skip


@pytest.mark.parametrize("case", STEPS)
def test_a_planted_error_of_single_tokens_shows(models, case):
    path = models["qwen3_next"]

    assert error_with(path, "delta_step", STEPS[case], recorded=False) > 100 * EXACT


def error_with(path, name, call, recorded=True):
    """The error of an engine's logits where `call` takes the place of the operation `name`, which it is given first."""
    engine = make_engine(path, cpu_plan(toy_workload(path)))
    if not recorded:
        engine.forward.replay = None  # what is made for a call is gone when a program runs
    kept, engine.lanes.host_ops = engine.lanes.host_ops, Planted(engine.lanes.host_ops, name, call)
    try:
        actual = run_logits(engine, TOKENS[:20], 12)
    finally:
        engine.lanes.host_ops = kept
        engine.close()
    return nmse(actual, moe_logits(path, TOKENS[:20]))


def test_tokens_are_recorded_where_no_gpu_takes_part(path):
    """With the bits of the plain path."""
    found = []
    for recorded in (True, False):
        engine = make_engine(path, cpu_plan(toy_workload(path)))
        if not recorded:
            engine.forward.replay = None
        found.append(run_logits(engine, TOKENS[:20], 12))
        assert engine.forward.can_replay(0) == recorded
        assert not recorded or len(engine.forward.replay.program(1)) > 0
        engine.close()

    assert torch.equal(*found)


def steps_for_cuda(path, handover):
    """Logits of steps of two sequences, whose prompts are single tokens too, in one order and in the other; and what
    was captured."""
    plan, tokens = uniform_plan(toy_workload(path), 0.5, 0.2, 1), iter(TOKENS)
    with fake_engine(path, plan, handover=handover, slack_bytes=1 << 18) as engine:
        sequences, rows = [engine.kv_cache.open(), engine.kv_cache.open()], []
        for sequence, count in zip(sequences, (3, 5), strict=True):
            for _ in range(count):
                engine.prefill(sequence, [next(tokens)])
        for order in (1, 1, 1, -1, -1, 1, -1):
            found = engine.decode_step(sequences[::order], [next(tokens), next(tokens)][::order])
            rows.append(found.clone() if order == 1 else found.flip(0))
        captured = engine.forward.replay and [bool(each) for each in engine.forward.replay._captured.values()]
    return torch.cat(rows), captured


def test_a_captured_step_follows_the_ids_of_its_sequences(path):
    """The CUDA driver over its stand-ins: recorded once for two rows, whichever sequence is first; bits of the plain
    path, and of transformers the logits."""
    plain, nothing = steps_for_cuda(path, "flags")
    found, captured = steps_for_cuda(path, "graph")
    tokens = [[*TOKENS[:3], *TOKENS[8:22:2]], [*TOKENS[3:8], *TOKENS[9:22:2]]]
    expected = [moe_logits(path, each)[-7:] for each in tokens]

    assert captured == [True] and nothing is None
    assert torch.equal(found, plain)
    assert nmse(found.view(7, 2, -1), torch.stack(expected, 1)) <= EXACT


def test_a_captured_step_with_the_ids_of_another_step_shows(models, monkeypatch):
    """Planted: sequence ids that are not read where the step finds them."""
    path, right = models["qwen3_next"], reference.delta_step
    plain, _ = steps_for_cuda(path, "graph")
    monkeypatch.setattr(
        reference,
        "delta_step",
        lambda *given: right(*given[:4], torch.arange(len(given[4])), given[5]) if len(given[4]) > 1 else right(*given),
    )
    wrong, _ = steps_for_cuda(path, "graph")

    assert nmse(wrong, plain) > 100 * EXACT


@pytest.mark.parametrize("name", ["sigmoid_mul", "scale_rows"])
def test_a_forgotten_gate_shows(models, name):
    """Of what is attended to, and of the shared expert."""
    path = models["qwen3_5_moe_text"]

    assert error_with(path, name, lambda op, *arguments: None) > 100 * EXACT


def test_the_text_of_a_model_of_images(models, tmp_path):
    """As published: text_config, another prefix, and tensors of images and of further tokens that are left alone."""
    text = models["qwen3_5_moe_text"]
    values, tensors = json.loads((text / "config.json").read_text()), load_file(text / "model.safetensors")
    outer = {"model_type": "qwen3_5_moe", "architectures": ["Qwen3_5MoeForConditionalGeneration"]}
    (tmp_path / "config.json").write_text(json.dumps(outer | {"text_config": values, "vision_config": {"depth": 2}}))
    renamed = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in tensors.items()}
    extra = {"model.visual.x": torch.zeros(2), "mtp.fc.weight": torch.zeros(2)}
    save_file(renamed | extra, tmp_path / "model.safetensors", metadata={"format": "pt"})

    assert nmse(logits_of(tmp_path, cpu_plan(toy_workload(tmp_path))), moe_logits(text, TOKENS)) <= EXACT
    with open_source(tmp_path) as source:
        (warning,) = source.check(decoder(ModelConfig.from_dir(tmp_path)))
        assert "model.visual.x" in warning and "mtp.fc.weight" in warning


def test_what_is_in_the_file_is_all_used(path):
    with open_source(path) as source:
        assert source.check(decoder(ModelConfig.from_dir(path), "fp32")) == []


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"layer_types": ["linear_attention"] * 2}, ConfigError, "layer_types"),
        ({"layer_types": ["linear_attention", "mamba", "full_attention"]}, UnsupportedModelError, "mamba"),
        ({"linear_num_value_heads": 3}, ConfigError, "linear_num_value_heads is 3"),
    ],
)
def test_layers_that_are_not_computed_are_refused(models, tmp_path, changes, error, words):
    (tmp_path / "config.json").write_bytes((models["qwen3_next"] / "config.json").read_bytes())
    edit_json(tmp_path / "config.json", **changes)

    with pytest.raises(error, match=words):
        ModelConfig.from_dir(tmp_path)


def test_rows_that_are_no_whole_groups_are_named(models, tmp_path):
    source = models["qwen3_next"]
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_bytes((source / file).read_bytes())
    edit_json(tmp_path / "config.json", linear_key_head_dim=17)

    with pytest.raises(CheckpointError, match=r"in_proj_qkvz.weight has .* rows, expected groups of"):
        open_source(tmp_path)


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("passes", [1, 2])
def test_a_step_that_was_interrupted_is_taken_again_from_states_as_they_were(models, monkeypatch, layer, passes):
    """Behind the first layer with a state, or the last, of a step with another's prompt or another's token: the stream
    that goes on has taken in nothing twice."""
    forward, seen = DeltaNet.forward, []

    def interrupted(block, *arguments):
        forward(block, *arguments)
        seen.append(block.layer)
        if seen.count(layer) == passes:
            raise KeyboardInterrupt

    with LLM(models["qwen3_next"], device="cpu", dtype="fp32", max_context=64, max_batch=2, progress=False) as llm:
        expected = llm.generate("outer", GREEDY)[0].text
        stream = llm.stream("outer", GREEDY)
        pieces = [next(stream).text, next(stream).text]
        monkeypatch.setattr(DeltaNet, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate("inner", GREEDY)
        monkeypatch.undo()
        pieces += [piece.text for piece in stream]

    assert "".join(pieces) == expected and len(pieces) > 4


def test_lanes_of_a_model_with_states_are_not_simulated(models):
    path = models["qwen3_next"]
    plan = uniform_plan(toy_workload(path), 0.5, 0.2, 1)

    with pytest.raises(UnsupportedModelError, match="Qwen3NextForCausalLM is not simulated"):
        Simulation(ModelConfig.from_dir(path), plan, HardwareProfile.named("emulated"))
