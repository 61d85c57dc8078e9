"""Whole models against transformers in eager float32: logits, and 64 greedy tokens, for every family and rope type."""

import pytest
import torch

from tests.support.models.runtime import cpu_plan, make_engine, nmse, run_logits, toy_workload, uniform_plan
from tests.support.models.toy import ROPES, hf_generate, hf_logits, make_checkpoint

TOKENS = torch.randint(307, (80,), generator=torch.Generator().manual_seed(1)).tolist()

MODELS = {
    "llama": {"family": "llama"},
    "llama-biases": {"family": "llama", "biases": True, "head_dim": 64, "hidden": 102},
    "llama-tied": {"family": "llama", "tied": True, "sharded": True},
    "llama-no-gqa": {"family": "llama", "num_heads": 3, "num_kv_heads": 3, "head_dim": 128},
    "llama-one-kv-head": {
        "family": "llama",
        "num_heads": 5,
        "num_kv_heads": 1,
        "head_dim": 96,
        "hidden": 75,
        "sharded": True,
    },
    "mistral-window": {"family": "mistral", "sliding_window": 9},
    "qwen2": {"family": "qwen2", "head_dim": 64, "hidden": 6 * 64},
    "qwen2-window": {"family": "qwen2", "head_dim": 40, "hidden": 6 * 40, "sliding_window": 17, "tied": True},
    "qwen3": {"family": "qwen3", "head_dim": 128},
    "qwen3-biases": {"family": "qwen3", "biases": True, "sliding_window": 5},
    **{f"llama-{rope}": {"family": "llama", "rope": rope} for rope in ROPES if rope != "default"},
}


@pytest.fixture(scope="module", params=MODELS, ids=str)
def checkpoint(request, tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp(request.param), **MODELS[request.param])


def test_logits_equal_transformers(checkpoint):
    engine = make_engine(checkpoint, cpu_plan(toy_workload(checkpoint)))
    actual = run_logits(engine, TOKENS, prompt_tokens=70)
    engine.close()

    assert nmse(actual, hf_logits(checkpoint, TOKENS)) <= 1e-10


def test_three_lanes_equal_transformers(checkpoint):
    workload = toy_workload(checkpoint)
    groups = workload.kv[0].kv_heads
    engine = make_engine(checkpoint, uniform_plan(workload, gpu=0.4, stream=0.3, gpu_kv_heads=(groups + 1) // 2))
    actual = run_logits(engine, TOKENS, prompt_tokens=70)
    engine.close()

    assert nmse(actual, hf_logits(checkpoint, TOKENS)) <= 1e-10


def test_greedy_tokens_equal_transformers(checkpoint):
    engine = make_engine(checkpoint, cpu_plan(toy_workload(checkpoint)))
    sequence, generated = engine.kv_cache.open(), []
    logits = engine.prefill(sequence, TOKENS[:16])
    while len(generated) < 40:
        generated.append(int(logits.argmax()))
        logits = engine.decode_step([sequence], generated[-1:])[0]
    engine.close()

    assert hf_generate(checkpoint, TOKENS[:16], 40) == generated


@pytest.mark.parametrize("weight_dtype,limit", [("bf16", 2e-3), ("q8", 1e-2), ("q4", 0.3)])
def test_narrow_weights_stay_close_to_float32(tmp_path, weight_dtype, limit):
    """A loose bound on what rounding weights costs this toy: a wrong scale or layout gives an error near 1."""
    path = make_checkpoint(tmp_path, "llama", hidden=132, head_dim=64, intermediate=320)
    engine = make_engine(path, cpu_plan(toy_workload(path, weight_dtype)))
    actual = run_logits(engine, TOKENS, prompt_tokens=70)
    engine.close()

    assert nmse(actual, hf_logits(path, TOKENS)) <= limit


def test_the_oracle_reads_a_model_anew_that_is_written_to_the_same_folder(tmp_path):
    first, second = (hf_logits(make_checkpoint(tmp_path, layers=1, seed=seed), TOKENS[:5]) for seed in (0, 1))

    assert nmse(second, first) > 0.1
