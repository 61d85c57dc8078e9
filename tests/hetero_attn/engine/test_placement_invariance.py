"""Placement never changes the answer: any valid plan gives the logits of the one-device run.

Hypothesis draws cuts, head owners, segment boundaries, page and chunk sizes. Planted bugs show that the property has
teeth.
"""

import pytest
import torch
from hypothesis import strategies as st

from tests.support.models.runtime import (
    cpu_plan,
    make_engine,
    nmse,
    one_device_run,
    plans,
    run_logits,
    toy_workload,
    uniform_plan,
)
from tests.support.models.toy import make_checkpoint
from tests.support.planted.placement_bugs import PLANTED
from tests.support.suite.few_examples import drawn

# Lanes add in different orders, so an activation at the edge between two int8 values may round the other way: one such
# step moves a 72-wide row of these toys by 1e-5, and later layers by more.
LIMITS = {"fp32": 1e-11, "bf16": 1e-4, "q8": 1e-3, "q4": 1e-3}


class Runs(dict):
    """The one-device run of each weight dtype, made when first asked for."""

    def __init__(self, tmp_path_factory):
        super().__init__()
        self._paths = tmp_path_factory

    def __missing__(self, weight_dtype):
        path = self._paths.mktemp(weight_dtype)
        if weight_dtype == "fp32":
            make_checkpoint(path, "mistral", sliding_window=11, num_heads=8, num_kv_heads=4, hidden=64)
        else:
            make_checkpoint(path, "llama", biases=True)
        self[weight_dtype] = one_device_run(path, weight_dtype)
        return self[weight_dtype]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory)


@pytest.mark.parametrize("weight_dtype", LIMITS)
@drawn(few=3, many=12, data=st.data())
def test_any_plan_gives_the_same_logits(runs, weight_dtype, data):
    run = runs[weight_dtype]
    plan = data.draw(plans(run.path, weight_dtype))
    engine = make_engine(run.path, plan, overlap=data.draw(st.booleans()))
    try:
        actual = run_logits(engine, run.token_ids, run.prompt_tokens)
        used = engine.lanes.device.arena.peak_bytes
    finally:
        engine.close()

    assert nmse(actual, run.logits) <= LIMITS[weight_dtype]
    assert used <= plan.gpu_memory_bytes


def test_sequences_of_different_lengths_decode_together(runs):
    """Three prompts prefilled one by one, decoded as one batch, against each alone."""
    run = runs["fp32"]
    workload = toy_workload(run.path, max_batch=3)
    engine = make_engine(run.path, uniform_plan(workload, gpu=0.3, stream=0.3, gpu_kv_heads=2))
    prompts = [run.token_ids[:7], run.token_ids[10:11], run.token_ids[20:58]]
    sequences = [engine.kv_cache.open() for _ in prompts]
    for sequence, prompt in zip(sequences, prompts, strict=True):
        for start in range(0, len(prompt), engine.prefill_chunk):
            engine.prefill(sequence, prompt[start : start + engine.prefill_chunk])
    together = [engine.decode_step(sequences, [step, step + 1, step + 2]) for step in range(30)]
    engine.close()

    single = make_engine(run.path, cpu_plan(toy_workload(run.path)))
    for index, prompt in enumerate(prompts):
        alone = run_logits(single, [*prompt, *(step + index for step in range(30))], len(prompt))[len(prompt) :]
        assert nmse(torch.stack([rows[index] for rows in together]), alone) <= 1e-11
    single.close()


def test_a_replayed_decode_step_is_bit_equal_to_the_plain_one(runs):
    """Batches of one and three, joining and leaving, with recorded steps and without."""
    run = runs["q4"]

    def generated(overlap):
        engine = make_engine(run.path, cpu_plan(toy_workload(run.path, "q4", max_batch=3)), overlap=overlap)
        sequences = [engine.kv_cache.open() for _ in range(3)]
        for sequence, start in zip(sequences, (0, 9, 20), strict=True):
            engine.prefill(sequence, run.token_ids[start : start + 5 + start // 2])
        rows = [engine.decode_step(sequences, [1, 2, 3]) for _ in range(6)]
        rows += [engine.decode_step([sequences[1]], [step]) for step in range(6)]
        engine.kv_cache.close(sequences[0])
        rows += [engine.decode_step(sequences[1:], [step, 5]) for step in range(6)]
        engine.close()
        return rows

    for replayed, plain in zip(generated(True), generated(False), strict=True):
        assert torch.equal(replayed, plain)


def test_a_rerun_is_bit_equal(runs):
    run = runs["bf16"]
    engine = make_engine(run.path, uniform_plan(toy_workload(run.path, "bf16"), gpu=0.3, stream=0.3, gpu_kv_heads=1))
    first = run_logits(engine, run.token_ids, run.prompt_tokens)
    second = run_logits(engine, run.token_ids, run.prompt_tokens)
    engine.close()

    assert torch.equal(first, second)


def _spilling_error(run) -> float:
    """How far a bf16 plan with all three lanes and a spilled cache is from the one-device run."""
    workload = toy_workload(run.path, "bf16", page_size=4, prefill_chunk=8)
    engine = make_engine(run.path, uniform_plan(workload, gpu=0.3, stream=0.4, gpu_kv_heads=1))
    try:
        return nmse(run_logits(engine, run.token_ids, run.prompt_tokens), run.logits)
    finally:
        engine.close()


def test_without_a_planted_bug_the_spilling_plan_is_right(runs):
    assert _spilling_error(runs["bf16"]) <= LIMITS["bf16"]


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_caught(runs, monkeypatch, bug):
    PLANTED[bug](monkeypatch)

    assert _spilling_error(runs["bf16"]) > 10 * LIMITS["bf16"]
