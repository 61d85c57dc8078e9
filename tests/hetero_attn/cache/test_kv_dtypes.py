"""A cache of another dtype through the whole runtime: sizes, choices, and the same answer on one lane and on three."""

from pathlib import Path

import pytest
import torch

from cpu_kernels.formats import pages as kv_layout
from hetero_attn import LLM, plan_model
from hetero_attn.errors import ArgumentError
from hetero_attn.tools import verify
from placement.policy.policy import Policy
from placement.policy.problems import PolicyError
from tests.support.models.runtime import cpu_plan, make_engine, nmse, run_logits, toy_workload, uniform_plan
from tests.support.models.toy import make_checkpoint

TINY = Path(__file__).resolve().parents[3] / "examples" / "tiny"
# Prefill on the CPU rounds codes to bf16 where the reference does not, and a number at the edge of two codes may fall
# to either side: for q4 that is a fifteenth of its group's range, and later layers' codes follow.
LIMITS = {"bf16": 1e-4, "q8": 1e-3, "q4": 1e-2}


@pytest.mark.table
@pytest.mark.parametrize("kv_dtype", LIMITS)
@pytest.mark.parametrize("options", [{}, {"sliding_window": 11, "num_heads": 8, "num_kv_heads": 4, "hidden": 64}])
def test_three_lanes_agree_with_one(tmp_path, kv_dtype, options):
    """Prefill and decode with heads on both sides, a spilled cache and pages smaller than a chunk."""
    make_checkpoint(tmp_path, "mistral" if options else "llama", **options)
    workload = toy_workload(tmp_path, "fp32", page_size=4, prefill_chunk=8, kv_dtype=kv_dtype)
    token_ids, prompt_tokens = torch.randint(0, 90, (70,), generator=torch.Generator().manual_seed(1)).tolist(), 50
    logits = []
    for plan in (cpu_plan(workload), uniform_plan(workload, gpu=0.3, stream=0.3, gpu_kv_heads=1)):
        engine = make_engine(tmp_path, plan)
        try:
            logits.append(run_logits(engine, token_ids, prompt_tokens))
        finally:
            engine.close()

    assert nmse(logits[1], logits[0]) <= LIMITS[kv_dtype]


def test_bytes_a_token_are_those_of_the_format():
    """The plan, the pages and the format agree."""
    for kv_dtype in kv_layout.KV_DTYPES:
        plan = plan_model(TINY, device="cpu", kv_dtype=kv_dtype)
        shard = plan.workload.kv[0]

        assert shard.bytes_per_token == kv_layout.token_bytes(kv_dtype, plan.workload.head_dim)
        assert f"{kv_dtype} KV" in plan.table()
        assert f"kv_dtype: {kv_dtype}" in plan.to_yaml()


def test_pages_take_the_bytes_that_the_plan_counts(tmp_path):
    make_checkpoint(tmp_path, "llama")
    for kv_dtype in kv_layout.KV_DTYPES:
        workload = toy_workload(tmp_path, "bf16", kv_dtype=kv_dtype)
        engine = make_engine(tmp_path, cpu_plan(workload))
        store = engine.kv_cache.pools[0].host
        sequence = engine.kv_cache.open()
        engine.prefill(sequence, [1, 2, 3])
        page_bytes = store.k[0][0].nbytes + store.v[0][0].nbytes
        engine.close()

        assert page_bytes == workload.page_size * workload.kv[0].bytes_per_token


def test_the_dtype_comes_from_the_argument_then_the_policy_then_the_weights():
    policy = Policy.parse("kv_dtype: q8")

    assert plan_model(TINY, device="cpu", kv_dtype="q4", policy=policy).workload.kv_dtype == "q4"
    assert plan_model(TINY, device="cpu", policy=policy).workload.kv_dtype == "q8"
    assert plan_model(TINY, device="cpu", dtype="fp32").workload.kv_dtype == "fp32"
    assert plan_model(TINY, device="cpu", dtype="q4").workload.kv_dtype == "bf16"


def test_unknown_dtypes_are_refused():
    with pytest.raises(ArgumentError, match="kv_dtype is 'q5'"):
        plan_model(TINY, device="cpu", kv_dtype="q5")
    with pytest.raises(PolicyError, match="kv_dtype: 'q5': must be one of"):
        Policy.parse("kv_dtype: q5")


def test_verify_reports_what_a_quantised_cache_costs():
    with LLM(TINY, device="cpu", kv_dtype="q4", max_context=256, progress=False) as llm:
        report = verify.run(llm, "Once upon a time there was a king who", 4)

    assert report.passed and report.kv_dtype == "q4"
    assert 0 < report.kv_cost.nmse < 0.1 and report.kv_cost.against == "bf16"
    assert "perplexity" in report.table() and "q4 KV" in report.table()
