"""Experts that prompts stream by their heat: whichever they are, every pick is computed once and a bit stays what it was."""

from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch

from gpu_kernels import reference
from hetero_attn.ops.streamed_expert_keeper import HALF_LIFE_ROWS, StreamKeeper
from hetero_attn.ops.streamed_experts import pieces_of
from placement.plan.heat import ExpertHeat
from placement.plan.memory import KvPlacement, LinearPlacement
from placement.plan.workload import NUM_ROW_TIERS, row_tier
from tests.support.gpu.fake_engine import fake_engine
from tests.support.gpu.simulated_lanes import simulated
from tests.support.models.moe import make_moe
from tests.support.models.runtime import emulated_plan, make_engine, nmse, run_logits, toy_workload
from tests.support.planted.planted_experts import Planted

TOKENS = torch.randint(307, (40,), generator=torch.Generator().manual_seed(2)).tolist()
PROMPT = 24
PROMPTS_ONLY = 0, 0, 4, 4, 4  # a chunk of 16 rows streams, a decode step of one or two does not
ALWAYS = (4,) * NUM_ROW_TIERS


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    layers = {"qwen3_moe": 2, "gpt_oss": 2, "gemma4_text": 4}
    return {family: make_moe(tmp_path_factory.mktemp(family), family, layers=n) for family, n in layers.items()}


def streaming(workload, stream, *, gpu=0, slots=0):
    """A plan with `gpu` experts and all dense parts on the GPU, so many expert slots, and what each row tier streams."""
    linears = [
        LinearPlacement(s.name, gpu, tuple(stream), s.units, slots)
        if s.picks
        else LinearPlacement(s.name, s.units, (0,) * NUM_ROW_TIERS, s.units)
        for s in workload.linears
    ]
    kv = [KvPlacement(s.name, s.kv_heads, workload.layer_tokens(s), s.kv_heads) for s in workload.kv]
    return emulated_plan(workload, linears, kv)


def on_cpu(workload):
    """The plan whose experts are all the CPU's."""
    return streaming(workload, (0,) * NUM_ROW_TIERS)


def logits_of(path, plan):
    engine = make_engine(path, plan)
    try:
        return run_logits(engine, TOKENS, PROMPT)
    finally:
        engine.close()


class Drawn:
    """Every expert's heat drawn anew before each pass."""

    def __init__(self, engine, seed=0):
        self.keeper, self.draw = engine._streamed_experts, np.random.default_rng(seed)
        self.streamed = set()
        self._settle, self.keeper.settle = self.keeper.settle, self.settle

    def settle(self, tier, is_captured):
        self.keeper._heat[:] = self.draw.random(self.keeper._heat.shape)
        self.keeper._passes += 1
        self._settle(tier, is_captured)
        self.streamed |= {(tier, each.ids) for linear in self.keeper._linears if (each := linear.streamed(tier))}


def with_drawn_heat(path, plan, seed=0):
    """Logits, and every (row tier, ids) that was streamed."""
    engine = make_engine(path, plan)
    drawn = Drawn(engine, seed)
    try:
        return run_logits(engine, TOKENS, PROMPT), drawn.streamed
    finally:
        engine.close()


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "gemma4_text"])
def test_no_heat_changes_a_bit(paths, family):
    """In prompts alone, and in every step: what is streamed changes in the middle of an answer. gpt-oss has biases,
    Gemma 4 a number of each expert."""
    workload = toy_workload(paths[family], "q8")
    expected = logits_of(paths[family], on_cpu(workload))
    for stream in (PROMPTS_ONLY, ALWAYS):
        actual, streamed = with_drawn_heat(paths[family], streaming(workload, stream))

        assert torch.equal(actual, expected)
        assert len({ids for _, ids in streamed}) > len(stream) - stream.count(0)


@pytest.mark.parametrize("seed", [*range(3), *(pytest.param(seed, marks=pytest.mark.matrix) for seed in range(3, 12))])
def test_drawn_plans_and_heats_give_the_same_bits(paths, seed):
    """Experts at home, in slots that take in others, streamed by tier, and on the CPU; elastic or not."""
    draw, path = Random(seed), paths[("qwen3_moe", "gpt_oss")[seed % 2]]
    chunk = draw.choice([1, 7, 16])
    workload = toy_workload(path, draw.choice(["q8", "q4"]), prefill_chunk=chunk, max_batch=draw.randint(1, 3))
    workload = replace(workload, inserts=draw.randint(0, 4), elastic=draw.random() < 0.5)
    experts, unit_bytes = next((s.units, s.unit_bytes) for s in workload.linears if s.picks)
    workload = replace(workload, staging_piece_bytes=unit_bytes * draw.randint(1, 3))
    gpu = draw.randint(0, experts - 2)
    stream = [draw.randint(0, experts - gpu) for _ in range(NUM_ROW_TIERS)]
    plan = streaming(workload, stream, gpu=gpu, slots=draw.randint(0, experts - gpu))

    assert torch.equal(with_drawn_heat(path, plan, seed)[0], logits_of(path, on_cpu(workload)))


def test_experts_of_numbers_stream_as_before(paths):
    """Lanes of bf16 agree within rounding: which experts are the GPU's is fixed by their ids."""
    engine = make_engine(paths["qwen3_moe"], streaming(toy_workload(paths["qwen3_moe"], "bf16"), ALWAYS))
    once, again = (run_logits(engine, TOKENS, PROMPT) for _ in range(2))
    linears = [linear for linear in engine.weights.linears if linear.spec.kind == "experts"]
    engine.close()

    assert torch.equal(once, again)
    assert all(linear.streamed_experts is None and linear.device_units(0) == 4 for linear in linears)


def counted_by_hand(chosen, experts, seen=0.0):
    """The heat of experts after passes that chose ids [rows, k] each: the newest counts whole."""
    heat = np.full(experts, seen)
    for ids in chosen:
        heat = heat * 0.5 ** (len(ids) / HALF_LIFE_ROWS) + np.bincount(np.ravel(ids), minlength=experts)
    return heat


def test_the_warmest_experts_are_streamed(paths, monkeypatch):
    """Of every layer and chunk those with the most rows in the chunks before, by the definition; at first the first."""
    workload = toy_workload(paths["qwen3_moe"], "q8", prefill_chunk=8)
    engine = make_engine(paths["qwen3_moe"], streaming(workload, (0, 0, 5, 5, 5), gpu=2))
    linears = [linear for linear in engine.weights.linears if linear.spec.kind == "experts"]
    chosen, streamed, route = [[] for _ in linears], [], engine.lanes.device.ops.route

    def noted(x, router, scoring, into):
        route(x, router, scoring, into)
        layer = next(index for index in range(2) if len(chosen[index]) == len(streamed))
        chosen[layer].append(into.ids.tolist())

    monkeypatch.setattr(engine.lanes.device.ops, "route", noted, raising=False)
    sequence = engine.kv_cache.open()
    for start in range(0, PROMPT, 8):
        engine.prefill_logits(sequence, TOKENS[start : start + 8])
        streamed.append([linear.streamed(row_tier(8)).ids for linear in linears])
    engine.close()

    for at, ids in enumerate(streamed):
        for layer in range(2):
            heat = counted_by_hand(chosen[layer][:at], 12)
            warmest = sorted(range(2, 12), key=lambda expert: (-heat[expert], expert))  # two are at home

            assert ids[layer] == tuple(sorted(warmest[:5]))
    assert len({tuple(ids) for ids in streamed}) > 1


def test_a_profile_says_what_is_streamed_first(paths):
    workload = toy_workload(paths["qwen3_moe"], "q8")
    shares = (0.0, 0.3, 0.55, 0.7, 0.8, *(0.8 + 0.025 * at for at in range(1, 9)))
    heat = ExpertHeat((0.0,) * 13, shares, (7, 0, 9, 3, 11, 1, 2, 4, 5, 6, 8, 10))
    linears = tuple(replace(s, heat=heat) if s.picks else s for s in workload.linears)
    engine = make_engine(paths["qwen3_moe"], streaming(replace(workload, linears=linears), PROMPTS_ONLY))
    engine.prefill(engine.kv_cache.open(), TOKENS[:16])
    streamed = [linear.streamed(2).ids for linear in engine._streamed_experts._linears]
    engine.close()

    assert streamed == [(0, 3, 7, 9)] * 2


def test_what_is_in_slots_is_not_streamed(paths):
    workload = replace(toy_workload(paths["qwen3_moe"], "q8"), inserts=2)
    engine = make_engine(paths["qwen3_moe"], streaming(workload, PROMPTS_ONLY, slots=5))
    run_logits(engine, TOKENS, PROMPT)
    engine.prefill(engine.kv_cache.open(), TOKENS[:16])
    tables = [engine._expert_slots.inside(linear.spec.name)[0] for linear in engine._streamed_experts._linears]
    streamed = [linear.streamed(2).ids for linear in engine._streamed_experts._linears]
    report = engine.report.streamed_experts
    engine.close()

    assert all((table[list(ids)] < 0).sum() >= 2 for table, ids in zip(tables, streamed, strict=True))
    assert 0 < report.streamed_picks < report.picks


def test_a_long_prompt_counts_its_first_chunk_and_its_last(paths):
    """Chunks follow each other while the GPU computes; only where nothing is known yet the first one is waited for."""
    workload = toy_workload(paths["qwen3_moe"], "q8", prefill_chunk=8)
    engine = make_engine(paths["qwen3_moe"], streaming(workload, (0, 0, 5, 5, 5)))
    sequence = engine.kv_cache.open()
    for start in range(0, 40, 8):
        engine.prefill(sequence, TOKENS[start : start + 8], logits=start == 32)
    counts, passes, line = engine.report.streamed_experts, engine._streamed_experts._passes, engine.report.table()
    shown = engine.report.expert_picks()
    engine.close()

    assert passes == 2 and counts.picks == 2 * 2 * 8 * 4
    assert (counts.streamed, counts.in_dram) == (2 * 2 * 5, 2 * 2 * 12)
    assert shown == {
        "hetero_streamed_expert_picks": (
            "served",
            {"yes": counts.streamed_picks, "no": counts.picks - counts.streamed_picks},
        )
    }
    assert f"42% of those in DRAM streamed by heat, for {counts.served:.0%} of the picks" in line


@pytest.mark.parametrize("handover", ["events", "flags"])
def test_gathered_copies_race_with_nothing(paths, handover):
    """Everything happens as late as it may, and every access that nothing orders is found."""
    workload = replace(toy_workload(paths["gpt_oss"], "q8", prefill_chunk=8, max_batch=1), inserts=2)
    expected = logits_of(paths["gpt_oss"], on_cpu(workload))
    with simulated(paths["gpt_oss"], streaming(workload, ALWAYS, slots=2), handover) as engine:
        drawn = Drawn(engine)
        actual = run_logits(engine, TOKENS, PROMPT)

    assert torch.equal(actual, expected) and len(drawn.streamed) > 8


@pytest.mark.parametrize("handover", ["flags", "graph"])
def test_captured_steps_keep_what_they_stream_and_prompts_do_not(paths, handover):
    """The CUDA driver over its stand-ins: a step of one row is captured once, whatever becomes warm."""
    workload = replace(toy_workload(paths["gpt_oss"], "q8"), inserts=2)
    expected = logits_of(paths["gpt_oss"], on_cpu(workload))
    with fake_engine(
        paths["gpt_oss"], streaming(workload, ALWAYS, slots=2), handover=handover, slack_bytes=1 << 18
    ) as engine:
        drawn = Drawn(engine)
        first = run_logits(engine, TOKENS, PROMPT)
        streamed = {ids for tier, ids in drawn.streamed if tier == 0}
        again, replay = run_logits(engine, TOKENS, PROMPT), engine.forward.replay
        captured = None if replay is None else len(replay._captured)
        later = {ids for tier, ids in drawn.streamed if tier == 0} - streamed
        prompts = {ids for tier, ids in drawn.streamed if tier == row_tier(16)}

    assert torch.equal(first, expected) and torch.equal(again, expected)
    assert captured == {"flags": None, "graph": 1}[handover] and bool(later) == (handover == "flags")
    assert len(prompts) > 4


def test_experts_that_are_not_page_locked_are_gathered_by_the_caller(paths):
    workload = toy_workload(paths["qwen3_moe"], "q8")
    expected = logits_of(paths["qwen3_moe"], on_cpu(workload))
    with fake_engine(paths["qwen3_moe"], streaming(workload, ALWAYS), refuse_pins=True) as engine:
        Drawn(engine)
        actual = run_logits(engine, TOKENS, PROMPT)

    assert torch.equal(actual, expected)


def test_another_plan_keeps_what_was_counted(paths):
    """Resized between chunks and steps: other cuts, with and without slots, and no heat is lost."""
    workload = replace(toy_workload(paths["qwen3_moe"], "q8", prefill_chunk=8), inserts=2, elastic=True)
    plans = [streaming(workload, (0, 0, 5, 5, 5)), streaming(workload, ALWAYS, gpu=3), on_cpu(workload)]
    plans.append(streaming(workload, (2, 2, 3, 3, 3), slots=4))
    expected = logits_of(paths["qwen3_moe"], on_cpu(workload))
    engine = make_engine(paths["qwen3_moe"], max(plans, key=lambda plan: plan.memory.gpu_bytes))
    sequence, rows = engine.kv_cache.open(), []
    for start in range(0, PROMPT, 8):
        engine.move(plans[start // 8])
        rows.append(engine.prefill_logits(sequence, TOKENS[start : start + 8]))
    counted = engine._streamed_experts._heat.copy()
    for index, token in enumerate(TOKENS[PROMPT:]):
        engine.move(plans[index % 4])
        rows.append(engine.decode_step([sequence], [token]).clone())
    engine.close()

    assert torch.equal(torch.cat(rows), expected)
    assert counted.sum() > 8 * 4 * 2 and (engine._streamed_experts._heat.sum(1) > counted.sum(1)).all()


def test_a_pass_that_fails_loses_nothing(paths, monkeypatch):
    """What was announced, chosen and brought over for it serves the next one or is replaced."""
    workload = replace(toy_workload(paths["qwen3_moe"], "q8"), inserts=1)
    expected = logits_of(paths["qwen3_moe"], on_cpu(workload))
    engine = make_engine(paths["qwen3_moe"], streaming(workload, ALWAYS, slots=2))
    Drawn(engine)
    multiply, calls = engine.lanes.device.ops.expert_linear, iter(range(10**9))

    def failing(*arguments):
        if next(calls) == 5:
            raise RuntimeError("planted")
        multiply(*arguments)

    sequence = engine.kv_cache.open()
    with monkeypatch.context() as patch:
        patch.setattr(engine.lanes.device.ops, "expert_linear", failing, raising=False)
        with pytest.raises(RuntimeError, match="planted"):
            engine.prefill(sequence, TOKENS[:16])
    engine.kv_cache.close(sequence)
    actual = run_logits(engine, TOKENS, PROMPT)
    engine.close()

    assert torch.equal(actual, expected)


def stale_table(keeper, seat):
    """The table goes on naming what the first pass streamed."""
    if keeper._passes <= 1:
        seat()
    keeper._seated = None


def with_copies_of(keeper, ids_of):
    """What is copied for each tier, in the place of the experts that the table names."""
    for linear in keeper._linears:
        for tier, each in linear.streamed_experts.by_tier.items():
            pieces = pieces_of(ids_of(each.ids), linear.dram, linear.first_dram_unit, linear.piece_blocks)
            linear.streamed_experts.by_tier[tier] = replace(each, pieces=pieces)


def wrong_copy(keeper, seat):
    """One expert is copied in the place of another."""
    seat()
    with_copies_of(keeper, lambda ids: (*ids[:-1], min(set(range(12)) - set(ids))))


def dropped(keeper, seat):
    """The last expert is named and never copied: its picks are nobody's."""
    seat()
    with_copies_of(keeper, lambda ids: ids[:-1])


def wrong_number(keeper, seat):
    """One expert has the number of another."""
    seat()
    for linear in keeper._linears:
        table = linear.streamed_experts.table
        table[int((table < 0).nonzero()[-1])] = 0


@pytest.mark.parametrize("fault", [stale_table, wrong_copy, dropped, wrong_number])
def test_a_planted_fault_shows(paths, monkeypatch, fault):
    workload = toy_workload(paths["qwen3_moe"], "q8")
    expected = logits_of(paths["qwen3_moe"], on_cpu(workload))
    engine = make_engine(paths["qwen3_moe"], streaming(workload, PROMPTS_ONLY))
    Drawn(engine)
    seat = StreamKeeper._seat
    monkeypatch.setattr(
        StreamKeeper, "_seat", lambda keeper, *arguments: fault(keeper, lambda: seat(keeper, *arguments))
    )
    actual = run_logits(engine, TOKENS, PROMPT)
    engine.close()

    assert nmse(actual, expected) > 1e-4 or not actual.isfinite().all()


def on_both_lanes(into, copied):
    """The CPU's picks begin one too early."""
    into.starts[copied] = (into.starts[copied] - 1).clamp_min(0)


def on_no_lane(into, copied):
    """The last expert that is streamed has no picks."""
    into.starts[copied - 1] = into.starts[copied]


@pytest.mark.parametrize("fault", [on_both_lanes, on_no_lane])
def test_a_planted_fault_of_the_picks_shows(paths, fault):
    def changed(route, x, router, scoring, into):
        route(x, router, scoring, into)
        if copied := into.starts.shape[0] - 1 - into.experts:
            fault(into, copied)

    workload = toy_workload(paths["qwen3_moe"], "q8")
    expected = logits_of(paths["qwen3_moe"], on_cpu(workload))
    engine = make_engine(paths["qwen3_moe"], streaming(workload, PROMPTS_ONLY))
    engine.lanes.device.ops = Planted(reference, "route", changed)
    actual = run_logits(engine, TOKENS, PROMPT)
    engine.close()

    assert nmse(actual, expected) > 1e-4 or not actual.isfinite().all()


def test_pieces_are_runs_of_neighbours_that_fit():
    dram = torch.arange(20, dtype=torch.uint8)[:, None].expand(20, 3)
    for seed in range(50):
        draw = Random(seed)
        first, size = draw.randint(0, 5), draw.randint(1, 6)
        ids = sorted(draw.sample(range(first, first + 20), draw.randint(0, 20)))
        pieces = pieces_of(ids, dram, first, size)
        copied = [run[:, 0].tolist() for piece in pieces for run in piece]

        assert [expert + first for run in copied for expert in run] == ids
        assert all(sum(map(len, piece)) == size for piece in pieces[:-1])
        assert all(run == list(range(run[0], run[0] + len(run))) for run in copied)
        assert all(
            before[-1][-1, 0] + 1 < after[0][0, 0]
            for piece in pieces
            for before, after in zip(([run] for run in piece), ([run] for run in piece[1:]), strict=False)
        )
