"""What rounding weights, keys and values costs on real text: perplexity of the shipped checkpoint on its held-out text."""

import math
from functools import cache
from pathlib import Path

import pytest
import torch

from hetero_attn import LLM

TINY = Path(__file__).parent.parent / "examples" / "tiny"
WINDOW = 512
WINDOWS = 8


@cache
def perplexity(dtype: str, kv_dtype: str = "auto") -> float:
    with LLM(TINY, dtype=dtype, kv_dtype=kv_dtype, device="cpu", max_context=WINDOW, progress=False) as llm:
        ids = llm.tokenizer.encode((TINY / "heldout.txt").read_text())
        losses = []
        for start in range(0, WINDOWS * WINDOW, WINDOW):
            window = ids[start : start + WINDOW]
            scores = torch.log_softmax(llm.logits(window)[:-1], -1)
            losses.append(-scores[torch.arange(len(window) - 1), torch.tensor(window[1:])].mean().item())
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize("dtype,limit", [("q8", 1.005), ("q4", 1.05)])
def test_quantised_weights_cost_little_perplexity(dtype, limit):
    assert perplexity(dtype) <= limit * perplexity("bf16")


@pytest.mark.parametrize("kv_dtype,limit", [("q8", 1.005), ("q4", 1.05)])
def test_a_quantised_cache_costs_little_perplexity(kv_dtype, limit):
    assert perplexity("bf16", kv_dtype) <= limit * perplexity("bf16")


def test_the_shipped_checkpoint_has_learned_something():
    """Far below the 639 of token frequencies alone."""
    assert perplexity("bf16") < 100
