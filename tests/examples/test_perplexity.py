"""What rounding weights, keys and values costs on real text: perplexity of the shipped checkpoint on its held-out
text."""

import json
import math
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hetero_attn import LLM

TINY = Path(__file__).parents[2] / "examples" / "tiny"
WINDOW = 512
WINDOWS = 8


@cache
def perplexity(dtype: str, kv_dtype: str = "auto", model: Path = TINY) -> float:
    with LLM(model, dtype=dtype, kv_dtype=kv_dtype, device="cpu", max_context=WINDOW, progress=False) as llm:
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


def write_outlier_model(folder: Path, size: float, pairs: int = 3) -> None:
    """The shipped checkpoint with `pairs` rotary pairs of every key `size` times as large and those of its queries as
    much smaller: with `size` a power of two it computes what it did, bit for bit in float32."""
    shutil.copytree(TINY, folder, dirs_exist_ok=True)
    config, weights = json.loads((TINY / "config.json").read_text()), load_file(TINY / "model.safetensors")
    groups, head_dim = config["num_key_value_heads"], config["head_dim"]
    generator = torch.Generator().manual_seed(1)
    for layer in range(config["num_hidden_layers"]):
        q, k = (weights[f"model.layers.{layer}.self_attn.{name}_proj.weight"] for name in "qk")
        for queries, key in zip(q.view(groups, -1, head_dim, q.shape[1]), k.view(groups, head_dim, -1), strict=True):
            dims = torch.randperm(head_dim // 2, generator=generator)[:pairs]
            dims = torch.cat((dims, dims + head_dim // 2))
            key[dims] *= size
            queries[:, dims] /= size
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("kv_dtype,limit", [("q8", 1.005), ("q4", 1.12)])
def test_outlier_channels_of_keys_cost_little_perplexity(tmp_path, kv_dtype, limit):
    """Six channels of 32 are 16 times as large; without the Hadamard matrix q4 costs 1.26 times the perplexity."""
    write_outlier_model(tmp_path, 16.0)

    assert perplexity("bf16", kv_dtype, tmp_path) <= limit * perplexity("bf16")


def test_the_shipped_checkpoint_has_learned_something():
    """Far below the 639 of token frequencies alone."""
    assert perplexity("bf16") < 100
