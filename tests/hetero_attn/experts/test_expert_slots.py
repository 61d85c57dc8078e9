"""Expert slots: whatever is in them, whenever it came there, every pick is computed once and a token stays what it was."""

from dataclasses import replace
from random import Random

import pytest
import torch

from cpu_kernels.contract import Routes, Scoring
from gpu_kernels import reference
from gpu_kernels.experts import routing
from hetero_attn import LLM
from hetero_attn.errors import MemoryBudgetError
from hetero_attn.ops.expert_slot_keeper import SlotKeeper
from hetero_attn.ops.expert_slots import NOTED_ROWS
from hetero_attn.tools import bench
from placement import Policy
from placement.plan.heat import ExpertHeat
from placement.plan.memory import KvPlacement, LinearPlacement
from placement.plan.workload import NUM_ROW_TIERS
from tests.support.gpu.fake_engine import fake_engine
from tests.support.gpu.race_checker import RaceError
from tests.support.gpu.simulated_gpu import SimulatedDriver
from tests.support.gpu.simulated_lanes import simulated
from tests.support.models.moe import make_moe
from tests.support.models.runtime import (
    cpu_plan,
    decoded_together,
    emulated_plan,
    make_engine,
    nmse,
    run_logits,
    toy_workload,
)
from tests.support.planning.slot_table import simulate
from tests.support.planted.planted_experts import Planted

TOKENS = torch.randint(307, (40,), generator=torch.Generator().manual_seed(2)).tolist()
PROMPT = 20
NO_STREAM = (0,) * NUM_ROW_TIERS


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    families = "qwen3_moe", "gpt_oss"
    return {family: make_moe(tmp_path_factory.mktemp(family), family, layers=2) for family in families}


def slotted(workload, count, *, gpu=0, stream=NO_STREAM, dense_gpu=True):
    """A plan whose experts are in DRAM but for `gpu` of them, with so many expert slots; dense parts on one side."""
    linears = [
        LinearPlacement(s.name, gpu, stream, s.units, count)
        if s.picks
        else LinearPlacement(s.name, s.units * dense_gpu, NO_STREAM, s.units)
        for s in workload.linears
    ]
    kv = [KvPlacement(s.name, s.kv_heads, workload.layer_tokens(s), s.kv_heads) for s in workload.kv]
    return emulated_plan(workload, linears, kv)


def logits_of(path, plan, tokens=TOKENS):
    engine = make_engine(path, plan)
    try:
        return run_logits(engine, tokens, PROMPT), engine.report.experts
    finally:
        engine.close()


@pytest.mark.parametrize(
    "family,dtype",
    [*(pytest.param("qwen3_moe", dtype, marks=pytest.mark.matrix) for dtype in ("q4", "q8")), ("gpt_oss", "q8")],
)
def test_no_history_of_the_slots_changes_a_bit(paths, family, dtype):
    """Without slots, with some, with many, kept or moved by one or four a step: gpt-oss has a bias for every expert."""
    workload = toy_workload(paths[family], dtype)
    expected, _ = logits_of(paths[family], slotted(workload, 0))
    for count, inserts in ((3, 0), (5, 1), (5, 4), (8, 2)):
        actual, counts = logits_of(paths[family], slotted(replace(workload, inserts=inserts), count))

        assert torch.equal(actual, expected)
        assert counts.hits > 0 and (counts.inserts > 0) == (inserts > 0 and count < workload.linears[2].units)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_experts_of_numbers_keep_the_lane_that_they_were_loaded_with(paths, family):
    """bf16 lanes agree within rounding, so the same prompt twice must find the same experts in slots."""
    workload = replace(toy_workload(paths[family], "bf16"), inserts=4)
    engine = make_engine(paths[family], slotted(workload, 4))
    once, again = (run_logits(engine, TOKENS, PROMPT) for _ in range(2))
    counts = engine.report.experts
    engine.close()

    assert torch.equal(once, again) and counts.inserts == 0 and counts.hits > 0
    assert nmse(once, logits_of(paths[family], cpu_plan(workload))[0]) < 1e-3


def drawn_plans(path, dtype, seed):
    """Experts cut over the lanes by tier with any number of slots beside them, some chunk, batch and cap; and the plan
    of the same steps with all experts on the CPU."""
    draw = Random(seed)
    chunk, batch = draw.choice([1, 7, 16]), draw.randint(1, 3)
    workload = toy_workload(path, dtype, prefill_chunk=chunk, max_batch=batch)
    workload = replace(workload, inserts=draw.randint(0, 4), elastic=draw.random() < 0.5)
    experts = next(s.units for s in workload.linears if s.picks)
    gpu = draw.randint(0, experts - 1)
    stream = tuple(draw.randint(0, experts - gpu) for _ in range(NUM_ROW_TIERS))
    return slotted(workload, draw.randint(1, experts - gpu), gpu=gpu, stream=stream), slotted(workload, 0)


@pytest.mark.parametrize("seed", [*range(2), *(pytest.param(seed, marks=pytest.mark.matrix) for seed in range(2, 8))])
def test_drawn_plans_give_the_same_bits(paths, seed):
    path = paths[("qwen3_moe", "gpt_oss")[seed % 2]]
    actual, expected = (logits_of(path, plan, TOKENS[:30])[0] for plan in drawn_plans(path, "q8", seed))

    assert torch.equal(actual, expected)


def test_sequences_of_a_batch_share_the_slots(paths):
    """Two prompts of other lengths decoded together: the same bits as without slots."""
    workload = replace(toy_workload(paths["qwen3_moe"], "q8"), inserts=2)
    found = []
    for count in (0, 4):
        engine = make_engine(paths["qwen3_moe"], slotted(workload, count))
        _, rows = decoded_together(engine, (TOKENS[:9], TOKENS[20:31]), TOKENS[10:18])
        found.append(torch.cat([torch.stack(each) for each in rows]))
        engine.close()

    assert torch.equal(*found)


@pytest.mark.parametrize("handover", ["events", "flags"])
def test_copies_into_slots_race_with_nothing(paths, handover):
    """Everything happens as late as it may, and every access that nothing orders is found."""
    workload = replace(toy_workload(paths["gpt_oss"], "q8", prefill_chunk=8, max_batch=1), inserts=2)
    plan = slotted(workload, 3, stream=(0, 0, 0, 3, 3))
    expected, _ = logits_of(paths["gpt_oss"], slotted(workload, 0), TOKENS[:26])
    with simulated(paths["gpt_oss"], plan, handover) as engine:
        actual = run_logits(engine, TOKENS[:26], PROMPT)
        inserts = engine.report.experts.inserts

    assert torch.equal(actual, expected) and inserts > 0


@pytest.mark.parametrize("slots,inserts", [(5, 1), (6, 4), pytest.param(3, 2, marks=pytest.mark.matrix)])
def test_hits_are_those_of_a_simulated_table(paths, slots, inserts):
    """Every decode step of a run, its routes as they were noted: the same hits and the same experts at the end."""
    workload = replace(toy_workload(paths["qwen3_moe"], "q8"), inserts=inserts)
    engine = make_engine(paths["qwen3_moe"], slotted(workload, slots))
    keeper, noted = engine._expert_slots, []
    sequence = engine.kv_cache.open()
    for token in TOKENS:
        engine.decode_step([sequence], [token])
        noted.append(keeper._chosen[:, 0].tolist())
    hits = engine.report.experts.hits
    keeper.settle()
    contents = [set(layer.slots.held.tolist()) for layer in keeper._layers]
    engine.close()
    found = [simulate([step[layer] for step in noted], slots, inserts, list(range(12))) for layer in range(2)]

    assert hits == sum(each for each, _ in found)
    assert contents == [each for _, each in found]


def planted(engine, change):
    """What the engine then says, its note of a step followed by `change(keeper)`."""
    note = engine._expert_slots.note

    def changed(rows):
        found = note(rows)
        change(engine._expert_slots)
        return found

    engine._expert_slots.note = changed
    try:
        return run_logits(engine, TOKENS, PROMPT)
    finally:
        engine.close()


def stale(keeper):
    """The table goes on naming an expert that has left."""
    for table in keeper._table:
        table[(table < 0).nonzero()[:1]] = 0
    keeper._is_changed = True


def wrong_id(keeper):
    """Two experts of the table exchanged."""
    for table in keeper._table:
        inside = (table >= 0).nonzero()[:2].flatten()
        table[inside] = table[inside.flip(0)]
    keeper._is_changed = True


def evicted_in_use(keeper):
    """A slot is written while the table names it."""
    for table, layer in zip(keeper._table, keeper._layers, strict=True):
        out, slot = int((table < 0).nonzero()[-1]), int(table.max())
        layer.copy_in(keeper._lanes, slot, out, keeper._lanes.device.copies)


@pytest.mark.parametrize(
    "fault", [stale, *(pytest.param(fault, marks=pytest.mark.matrix) for fault in (wrong_id, evicted_in_use))]
)
def test_a_planted_fault_of_the_table_shows(paths, fault):
    workload = replace(toy_workload(paths["qwen3_moe"], "q8"), inserts=1)
    expected, _ = logits_of(paths["qwen3_moe"], slotted(workload, 5))
    actual = planted(make_engine(paths["qwen3_moe"], slotted(workload, 5)), fault)

    assert nmse(actual, expected) > 1e-4


def twice_and_never(into):
    """A row's second pick counts in the place of its first one, too."""
    into.places[:, 0] = into.places[:, 1]


def on_no_lane(into):
    """The last pick of the slots is nobody's."""
    count = into.starts.shape[0] - 1 - into.experts
    into.starts[count // 2 : count] = into.starts[count // 2]


def on_two_lanes(into):
    """The CPU's picks begin one too early."""
    count = into.starts.shape[0] - 1 - into.experts
    into.starts[count] = (into.starts[count] - 1).clamp_min(0)


@pytest.mark.parametrize(
    "fault", [twice_and_never, *(pytest.param(fault, marks=pytest.mark.matrix) for fault in (on_no_lane, on_two_lanes))]
)
def test_a_planted_fault_of_the_picks_shows(paths, fault):
    def changed(route, x, router, scoring, into):
        route(x, router, scoring, into)
        fault(into)

    workload = toy_workload(paths["qwen3_moe"], "q8")
    expected, _ = logits_of(paths["qwen3_moe"], slotted(workload, 5))
    engine = make_engine(paths["qwen3_moe"], slotted(workload, 5))
    engine.lanes.device.ops = Planted(reference, "route", changed)
    actual = run_logits(engine, TOKENS, PROMPT)
    engine.close()

    assert nmse(actual, expected) > 1e-4 or not actual.isfinite().all()


def test_a_planted_insert_that_is_named_too_early_is_a_race(paths, monkeypatch):
    """A table that names a slot as soon as its copy is queued."""
    monkeypatch.setattr(SimulatedDriver, "is_reached", lambda driver, event: True)
    workload = replace(toy_workload(paths["qwen3_moe"], "q8", prefill_chunk=8, max_batch=1), inserts=2)

    with pytest.raises(RaceError, match="copies: copy"), simulated(paths["qwen3_moe"], slotted(workload, 4)) as engine:
        run_logits(engine, TOKENS[:26], PROMPT)


def test_a_planted_copy_into_a_slot_that_is_named_is_a_race(paths, monkeypatch):
    workload = replace(toy_workload(paths["qwen3_moe"], "q8", prefill_chunk=8, max_batch=1), inserts=2)
    monkeypatch.setattr(SimulatedDriver, "is_reached", lambda driver, event: False)

    with pytest.raises(RaceError, match="copies: copy"), simulated(paths["qwen3_moe"], slotted(workload, 4)) as engine:
        planted(engine, evicted_in_use)


def picked(ids, table, slots):
    """(places, sources, starts) by the definition: picks sorted by slot, then by expert, then by row."""
    keys = [[int(table[e]) if table[e] >= 0 else slots + e for e in row] for row in ids.tolist()]
    picks = sorted((key, row) for row, each in enumerate(keys) for key in each)
    places = [[picks.index((key, row)) for key in each] for row, each in enumerate(keys)]
    starts = [sum(key < bound for key, _ in picks) for bound in range(slots + len(table) + 1)]
    return places, [row for _, row in picks], starts


@pytest.mark.parametrize("ops", [reference, routing], ids=["reference", "torch"])
@pytest.mark.parametrize("rows", [1, 6])
def test_picks_are_sorted_by_slot_and_by_expert(ops, rows):
    experts, k, slots = 11, 3, 4
    generator = torch.Generator().manual_seed(rows)
    table = torch.full((experts,), -1, dtype=torch.int32)
    table[torch.randperm(experts, generator=generator)[:slots]] = torch.arange(slots, dtype=torch.int32)
    x, router = torch.randn(rows, 16, generator=generator), torch.randn(16, 16, generator=generator)
    ids, places = torch.empty(rows, k, dtype=torch.int32), torch.empty(rows, k, dtype=torch.int32)
    sources, starts = torch.empty(rows * k, dtype=torch.int32), torch.empty(slots + experts + 1, dtype=torch.int32)
    router[experts:] = 0
    ops.route(x, router, Scoring(), Routes(ids, places, sources, starts, torch.empty(rows, k + 1), table))

    assert torch.equal(ids.sort(-1).values, ids)
    assert (places.tolist(), sources.tolist(), starts.tolist()) == picked(ids, table, slots)


def test_the_experts_of_a_profile_are_there_from_the_start(paths):
    """The most popular first; those at home on the GPU need no slot."""
    workload = toy_workload(paths["qwen3_moe"], "bf16")
    heat = ExpertHeat((0.0,) * 13, (0.0,) * 13, (7, 0, 9, 3, 11, 1, 2, 4, 5, 6, 8, 10))
    linears = tuple(replace(s, heat=heat) if s.picks else s for s in workload.linears)
    engine = make_engine(paths["qwen3_moe"], slotted(replace(workload, linears=linears), 3, gpu=2))
    held = [layer.slots.held.tolist() for layer in engine._expert_slots._layers]
    engine.close()

    assert held == [[7, 9, 3]] * 2


def test_a_smaller_budget_takes_slots_back_at_once_and_keeps_the_latest(paths):
    workload = replace(toy_workload(paths["qwen3_moe"], "q8"), inserts=4, elastic=True)
    expected, _ = logits_of(paths["qwen3_moe"], slotted(workload, 0))
    large, small, none = (slotted(workload, count) for count in (6, 3, 0))
    engine = make_engine(paths["qwen3_moe"], large)
    sequence, rows, device = engine.kv_cache.open(), [], engine.lanes.device
    for start in range(0, PROMPT, engine.prefill_chunk):
        rows.append(engine.prefill_logits(sequence, TOKENS[start : min(PROMPT, start + engine.prefill_chunk)]))
    for index, token in enumerate(TOKENS[PROMPT:]):
        latest = engine._expert_slots._last.clone() if index else None
        engine.move((small, large, none, large)[index % 4])
        wanted = engine.plan.memory.gpu.get("expert_slots", 0)
        assert (
            device.arena.used_bytes.get("expert_slots", 0) == wanted
            and device.arena.budget_bytes == engine.plan.gpu_memory_bytes
        )
        if engine.plan is small and latest is not None:
            held = [set(layer.slots.held.tolist()) for layer in engine._expert_slots._layers]
            assert held == [set(row.topk(3).indices.tolist()) for row in latest]
        rows.append(engine.decode_step([sequence], [token]).clone())
    engine.close()

    assert torch.equal(torch.cat(rows), expected)


def test_a_move_that_finds_no_memory_is_undone(paths, monkeypatch):
    workload = replace(toy_workload(paths["qwen3_moe"], "q8"), inserts=1, elastic=True)
    large, small = slotted(workload, 6), slotted(workload, 3)
    expected, _ = logits_of(paths["qwen3_moe"], slotted(workload, 0))
    engine = make_engine(paths["qwen3_moe"], large)
    opened = SlotKeeper.open

    def failing(keeper, linears, plan):
        if plan is small:
            raise MemoryBudgetError("none left")
        opened(keeper, linears, plan)

    monkeypatch.setattr(SlotKeeper, "open", failing)
    with pytest.raises(MemoryBudgetError, match="none left"):
        engine.move(small)
    actual, plan = run_logits(engine, TOKENS, PROMPT), engine.plan
    engine.close()

    assert plan is large and torch.equal(actual, expected)


def test_a_long_chunk_notes_its_last_rows(paths):
    workload = replace(toy_workload(paths["qwen3_moe"], "q8", prefill_chunk=100), inserts=1)
    engine = make_engine(paths["qwen3_moe"], slotted(workload, 4))
    engine.prefill(engine.kv_cache.open(), (TOKENS * 3)[:100])
    picks = engine.report.experts.picks
    engine.close()

    assert picks == 2 * 4 * NOTED_ROWS


def test_bench_puts_the_hits_beside_those_predicted(paths):
    wishes = Policy.parse("version: 1\ninserts: 4\nrules:\n  - {match: layers.*.experts, expert_slots: 9}\n")
    with LLM(paths["qwen3_moe"], policy=wishes, dtype="q8", device="emulated", max_context=64, progress=False) as llm:
        report = bench.run(llm, 8, 12, repetitions=1)
        shown = llm.report().table()
    predicted, measured = report.rows[-1].expert_hits

    assert 0 < measured <= 1 and predicted == 0.75  # 9 of 12 experts, assumed
    assert f"{measured:.0%} of the picks in expert slots, predicted 75%" in report.table(80)
    assert "of the picks in expert slots" in shown and "copied a step" in shown


@pytest.mark.parametrize("handover", ["flags", "graph"])
def test_captured_steps_follow_a_table_that_changes(paths, handover):
    """The CUDA driver over its stand-ins: a step of one row is captured once, whatever is in the slots."""
    workload = replace(toy_workload(paths["gpt_oss"], "q8"), inserts=2)
    expected, _ = logits_of(paths["gpt_oss"], slotted(workload, 0))
    with fake_engine(paths["gpt_oss"], slotted(workload, 4), handover=handover, slack_bytes=1 << 18) as engine:
        actual = run_logits(engine, TOKENS, PROMPT)
        inserts, replay = engine.report.experts.inserts, engine.forward.replay
        captured = None if replay is None else len(replay._captured)

    assert torch.equal(actual, expected) and inserts > 5
    assert captured == {"flags": None, "graph": 1}[handover]
