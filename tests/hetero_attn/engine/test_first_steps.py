"""The steps that a GPU's kernels are compiled by while a model loads: after them nothing is new, and nothing is left."""

import torch

from hetero_attn.engine.ahead.warm_up import PROMPT_ROWS, make_first_steps
from placement.plan.workload import row_tier
from tests.support.gpu.fake_engine import fake_engine
from tests.support.models.runtime import nmse, one_device_run, run_logits, toy_workload, uniform_plan
from tests.support.models.toy import make_checkpoint


def test_first_steps_take_every_path_once_and_leave_no_trace(tmp_path):
    run = one_device_run(make_checkpoint(tmp_path, "llama"), "fp32", tokens=40, prompt_tokens=34)
    workload = toy_workload(run.path, page_size=4, prefill_chunk=96, max_batch=1)
    said = []
    with fake_engine(run.path, uniform_plan(workload, 0.3, 0.4, 1), handover="graph") as engine:
        free = [pool.free_pages for pool in engine.kv_cache.pools]
        make_first_steps(engine, said.append)

        assert engine.forward.replay._captured and all(engine.forward.replay._captured.values())
        assert [pool.free_pages for pool in engine.kv_cache.pools] == free
        assert engine.report.tiers == {} and engine.report.phases["prefill"].steps == 0
        assert len(said) == len(PROMPT_ROWS) + 1 and "single" in said[-1]
        actual = run_logits(engine, run.token_ids, run.prompt_tokens)

    assert nmse(actual, run.logits) <= 1e-11
    assert {row_tier(rows) for rows in PROMPT_ROWS} == {1, 2, 3, 4}, "decode steps take the first tier"


def test_a_context_that_holds_few_tokens_has_shorter_first_steps(tmp_path):
    path = make_checkpoint(tmp_path, "llama")
    workload = toy_workload(path, max_context=16, page_size=4, prefill_chunk=8, max_batch=1)
    said = []
    with fake_engine(path, uniform_plan(workload, 0.5, 0.0, 1), handover="graph") as engine:
        make_first_steps(engine, said.append)
        assert torch.isfinite(engine.prefill(engine.kv_cache.open(), [1, 2, 3])).all()

    assert said == ["GPU kernels for prompts of 2 tokens", "GPU kernels for single tokens"]
