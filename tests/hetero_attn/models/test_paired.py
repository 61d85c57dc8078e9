"""Paired cuts: each side goes on with the heads and neurons that it computed, and one partial sum is added a block."""

from dataclasses import replace

import pytest
import torch
from hypothesis import strategies as st

from hetero_attn.lanes.lanes import Lanes
from hetero_attn.models.decoder import decoder
from hetero_attn.spec.config import ModelConfig
from placement.plan.memory import KvPlacement, LinearPlacement
from placement.plan.plan import Means, build_plan
from placement.plan.workload import NUM_ROW_TIERS
from tests.support.models.runtime import (
    cpu_plan,
    emulated_plan,
    make_engine,
    nmse,
    one_device_run,
    run_logits,
    toy_workload,
)
from tests.support.models.toy import FAMILIES, make_checkpoint
from tests.support.suite.few_examples import drawn

LIMITS = {"fp32": 1e-11, "bf16": 1e-4, "q8": 1e-3, "q4": 1e-3}
SHAPE = {"layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32, "hidden": 72, "intermediate": 192}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The one-device run of a family and dtype, made when first asked for."""
    made = {}

    def run(family, weight_dtype):
        if (family, weight_dtype) not in made:
            path = make_checkpoint(tmp_path_factory.mktemp(family), family, biases=True, sliding_window=11, **SHAPE)
            made[family, weight_dtype] = one_device_run(path, weight_dtype, tokens=24, prompt_tokens=20)
        return made[family, weight_dtype]

    return run


@st.composite
def paired_plans(draw, path, weight_dtype):
    """Any valid plan whose o and down are cut by rows: their boundary beside that of qkv and gate_up, or elsewhere."""
    workload = toy_workload(path, weight_dtype, page_size=draw(st.sampled_from([3, 16])), prefill_chunk=8, paired=True)
    linears = []
    for shard in workload.linears:
        home = draw(st.integers(0, shard.units))
        amounts = st.sampled_from([0, shard.units - home]) if shard.row_cut else st.integers(0, shard.units - home)
        linears.append(LinearPlacement(shard.name, home, draw(st.tuples(*[amounts] * NUM_ROW_TIERS)), shard.units))
    groups = [draw(st.integers(0, shard.kv_heads)) for shard in workload.kv]
    kv = [
        KvPlacement(shard.name, owned, workload.min_gpu_tokens if owned else 0, shard.kv_heads)
        for shard, owned in zip(workload.kv, groups, strict=True)
    ]
    return emulated_plan(workload, linears, kv)


def aligned_plan(path, paired):
    """Half of the heads and neurons on the GPU, the other half on the CPU; o and down follow."""
    workload = toy_workload(path, paired=paired)
    linears = []
    for shard in workload.linears:
        home = (
            0
            if shard.kind == "head"
            else shard.units * 2 // 3
            if shard.kind in ("gate_up", "down")
            else shard.units // 2
        )
        linears.append(LinearPlacement(shard.name, home, (0,) * NUM_ROW_TIERS, shard.units))
    kv = [KvPlacement(shard.name, 1, workload.full_tokens, shard.kv_heads) for shard in workload.kv]
    return emulated_plan(workload, linears, kv)


@pytest.mark.parametrize(
    "family,weight_dtype", [*((family, "fp32") for family in FAMILIES), *(("llama", d) for d in LIMITS)]
)
@drawn(few=2, many=10, data=st.data())
def test_any_paired_plan_gives_the_one_device_logits(runs, family, weight_dtype, data):
    run = runs(family, weight_dtype)
    plan = data.draw(paired_plans(run.path, weight_dtype))
    engine = make_engine(run.path, plan, overlap=data.draw(st.booleans()))
    try:
        actual = run_logits(engine, run.token_ids, run.prompt_tokens)
        peak = engine.lanes.device.arena.peak_bytes
    finally:
        engine.close()

    assert nmse(actual, run.logits) <= LIMITS[weight_dtype]
    assert peak <= plan.gpu_memory_bytes


@pytest.mark.parametrize("weight_dtype", LIMITS)
def test_row_units_take_the_bytes_of_the_whole_linear(runs, weight_dtype):
    """Cut by rows or by columns, every linear has the same bytes; on the CPU alone it gives the same logits."""
    run = runs("llama", weight_dtype)
    columns, paired = (toy_workload(run.path, weight_dtype, paired=paired) for paired in (False, True))
    engine = make_engine(run.path, cpu_plan(paired))
    logits = run_logits(engine, run.token_ids, run.prompt_tokens)
    engine.close()

    assert [s.total_bytes for s in paired.linears] == [s.total_bytes for s in columns.linears]
    assert {s.kind for s in paired.linears if s.row_cut} == {"o", "down"}
    assert torch.equal(logits, run.logits)


def test_a_paired_layer_hands_over_twice_and_a_column_layer_four_times(runs, monkeypatch):
    """Counted as the waits of the GPU for the CPU and of the CPU for the GPU, in one decode step."""
    run, copies = runs("llama", "fp32"), []
    original = Lanes.copy
    monkeypatch.setattr(Lanes, "copy", lambda *arguments: (copies.append(1), original(*arguments))[1])

    def copies_of_a_step(paired):
        engine = make_engine(run.path, aligned_plan(run.path, paired))
        sequence = engine.kv_cache.open()
        engine.decode_step([sequence], [5])
        copies.clear()
        engine.decode_step([sequence], [6])
        engine.close()
        return len(copies)

    paired, columns = copies_of_a_step(True), copies_of_a_step(False)
    shared = 2  # the embedding, and the normalised rows of the head

    assert paired - shared == 2 * 2 * SHAPE["layers"], "rows in and a sum back, for attention and MLP"
    assert columns > paired


def test_a_linear_whose_runs_split_a_quantisation_group_stays_a_column_cut(tmp_path):
    path = make_checkpoint(tmp_path, "llama", layers=1)  # heads of 40, 150 neurons
    spec = decoder(ModelConfig.from_dir(path))

    assert [linear.name for linear in spec.linears if linear.by_rows] == []


def test_a_row_cut_streams_as_a_whole(runs):
    plan = aligned_plan(runs("llama", "fp32").path, True)
    placements = [
        replace(p, stream_units=(1,) * NUM_ROW_TIERS) if p.name == "layers.0.down" else p for p in plan.linears
    ]
    half = [replace(p, gpu_units=p.units - 2) if p.name == "layers.0.down" else p for p in placements]
    with pytest.raises(ValueError, match="layers.0.down.*stream together"):
        build_plan(plan.workload, half, plan.kv, Means(device="emulated"))
