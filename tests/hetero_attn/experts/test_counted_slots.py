"""Expert slots on lanes whose time is counted: a step lasts as long as the planner predicts, by the routes of real text.

The trained mixture reads its held-out text; what its routers choose is known to the planner as `profile --routes` would
have it. Rates are round ones of a CPU, a bus and a GPU, and the clock counts what they would take.
"""

from dataclasses import replace
from pathlib import Path

import pytest

from hetero_attn import LLM
from hetero_attn.tools.routes.heat import run
from placement.cost.model import predict
from placement.plan.memory import KvPlacement, LinearPlacement
from placement.plan.warm import expert_slot_hits
from placement.plan.workload import NUM_ROW_TIERS
from tests.support.models.runtime import emulated_plan, toy_workload
from tests.support.planning.counted_lanes import counted, counted_machine

EXAMPLES = Path(__file__).parents[3] / "examples"
MODEL = EXAMPLES / "tiny-moe"
PROMPT, WARM, COUNTED, CHUNK = 60, 20, 80, 20
NO_STREAM = (0,) * NUM_ROW_TIERS


@pytest.fixture(scope="module")
def text_and_workload():
    """Tokens, and a workload that knows how warm the experts are over them."""
    with LLM(MODEL, dtype="q8", device="cpu", max_context=256, progress=False) as llm:
        tokens = llm.tokenizer.encode((EXAMPLES / "tiny" / "heldout.txt").read_text())[: PROMPT + WARM + COUNTED]
        heats = iter([layer.heat for layer in run(llm, tokens).layers])
    workload = toy_workload(MODEL, "q8", max_context=256, max_batch=1, prefill_chunk=PROMPT)
    linears = tuple(replace(shard, heat=next(heats)) if shard.picks else shard for shard in workload.linears)
    return tokens, replace(workload, linears=linears)


def slotted(workload, slots):
    """All experts in DRAM, so many slots for them in every layer, all else on the GPU."""
    linears = [
        LinearPlacement(s.name, 0, NO_STREAM, s.units, slots)
        if s.picks
        else LinearPlacement(s.name, s.units, NO_STREAM, s.units)
        for s in workload.linears
    ]
    kv = [KvPlacement(s.name, s.kv_heads, workload.layer_tokens(s), s.kv_heads) for s in workload.kv]
    return emulated_plan(workload, linears, kv)


def step_seconds(plan, machine, tokens):
    """Seconds of a decode step, the first ones left out, and the share of picks that were in slots."""
    with counted(MODEL, plan, machine) as (engine, clock):
        sequence = engine.kv_cache.open()
        engine.prefill(sequence, tokens[:PROMPT])
        for token in tokens[PROMPT : PROMPT + WARM]:
            engine.decode_step([sequence], [token])
        started, before = clock.now, engine.report.experts
        for token in tokens[PROMPT + WARM :]:
            engine.decode_step([sequence], [token])
        after = engine.report.experts
    hits = (after.hits - before.hits) / max(1, after.picks - before.picks)
    return (clock.now - started) / COUNTED, hits


@pytest.mark.parametrize(
    ("bus_bytes_per_s", "slots", "tolerance"),
    [
        (1e9, 0, 0.02),
        *(pytest.param(1e9, slots, 0.1, marks=pytest.mark.matrix) for slots in (8, 16, 24)),
        (0.5e9, 16, 0.1),
        pytest.param(0.25e9, 16, 0.1, marks=pytest.mark.matrix),
    ],
    ids=["no slots", "a quarter", "half", "three quarters", "half, a slow bus", "half, a slower bus"],
)
def test_a_step_lasts_as_long_as_predicted(text_and_workload, bus_bytes_per_s, slots, tolerance):
    """A copy begins when the step that missed its expert has ended, and serves the step behind the next one."""
    tokens, workload = text_and_workload
    machine = counted_machine(1e9, bus_bytes_per_s, 8e9)
    plan = slotted(workload, slots)
    seconds, hits = step_seconds(plan, machine, tokens)
    middle = PROMPT + WARM + COUNTED // 2
    predicted = predict(
        plan.workload, plan.linears, plan.kv, machine, phase="decode", rows=1, context=middle, on_gpu=True
    )

    assert 1 / predicted.tokens_per_s == pytest.approx(seconds, rel=tolerance)
    assert expert_slot_hits(workload, plan.linears, predicted.batch_steps) == pytest.approx(hits, abs=0.05)
    assert (hits > 0.2) == (slots > 0)


def prompt_seconds(machine, tokens, workload, is_by_heat):
    """Seconds of the chunks of a prompt that streams half of the experts, the first chunk left out, and the share of
    the picks that those served."""
    linears = [
        LinearPlacement(s.name, 0, (0, 0, 0, 16, 16), s.units)
        if s.picks
        else LinearPlacement(s.name, s.units, NO_STREAM, s.units)
        for s in workload.linears
    ]
    kv = [KvPlacement(s.name, s.kv_heads, workload.layer_tokens(s), s.kv_heads) for s in workload.kv]
    with counted(MODEL, emulated_plan(workload, linears, kv), machine) as (engine, clock):
        sequence, started = engine.kv_cache.open(), 0.0
        for at in range(0, len(tokens), CHUNK):
            if not is_by_heat:
                engine._streamed_experts._heat[:] = 0.0
            engine.prefill(sequence, tokens[at : at + CHUNK])
            started = started or clock.now
        return clock.now - started, engine.report.streamed_experts.served


def test_a_prompt_waits_less_where_the_warm_experts_are_streamed(text_and_workload):
    """Chunks of few rows, of which the cold experts have none: the CPU reads fewer experts."""
    tokens, workload = text_and_workload
    unknown = tuple(replace(shard, heat=None) for shard in workload.linears)
    workload = replace(workload, linears=unknown, prefill_chunk=CHUNK)
    machine = counted_machine(1e9, 8e9, 8e9)
    (first, served_first), (warm, served_warm) = (
        prompt_seconds(machine, tokens, workload, is_by_heat) for is_by_heat in (False, True)
    )

    assert served_warm > served_first + 0.05
    assert warm < 0.95 * first
