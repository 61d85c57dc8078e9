"""Mixtures of experts against transformers in float32: every family, every lane, every way that a file has them."""

import pytest
import torch

from gpu_kernels import reference
from hetero_attn import LLM
from hetero_attn.models.decoder import decoder
from hetero_attn.spec.config import ModelConfig
from placement.plan.memory import KvPlacement, LinearPlacement
from placement.plan.workload import NUM_ROW_TIERS
from tests.support.gpu.fake_engine import fake_engine
from tests.support.kernels.cpu_oracles import kernels
from tests.support.models.expert_logits import EXACT, TOKENS, logits_of
from tests.support.models.moe import FAMILIES, LEAST_GAP, make_moe, moe_gguf, moe_logits
from tests.support.models.runtime import (
    cpu_plan,
    decoded_together,
    emulated_plan,
    make_engine,
    nmse,
    run_logits,
    toy_workload,
    uniform_plan,
)
from tests.support.models.toy import edit_json
from tests.support.planted.planted_experts import PITFALLS, Planted, planted_logits


@pytest.mark.table
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("overlap", [True, False], ids=["recorded", "plain"])
def test_the_cpu_lane_equals_transformers(checkpoints, family, overlap):
    """A prompt in three chunks, then tokens one by one, which one recorded program computes."""
    path = checkpoints[family]
    actual = logits_of(path, cpu_plan(toy_workload(path)), overlap=overlap)

    assert nmse(actual, moe_logits(path, TOKENS)) <= EXACT


PLACES = [(0.4, 0.3, 1), (0.0, 0.0, 0), (0.5, 0.5, 2), (1.0, 0.0, 2)]
# Every family on all three lanes at once, and by one of the other ways, each of which serves at least two families.
WAYS = [
    pytest.param(family, *place, marks=() if way in (0, 1 + turn % (len(PLACES) - 1)) else pytest.mark.matrix)
    for turn, family in enumerate(FAMILIES)
    for way, place in enumerate(PLACES)
]


@pytest.mark.parametrize("family,gpu,stream,groups", WAYS)
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


@pytest.mark.parametrize("weight_dtype", ["q8", pytest.param("q4", marks=pytest.mark.matrix)])
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


@pytest.mark.parametrize(
    "handover", [*(pytest.param(name, marks=pytest.mark.matrix) for name in ("events", "flags")), "graph"]
)
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
