"""Layers run one at a time give the model's own logits, and what a weight is said to cost is what it costs."""

from pathlib import Path

import pytest
import torch

from cpu_kernels import CpuKernels
from hetero_attn import LLM
from hetero_attn.tools.quantize.encode import encode, held
from hetero_attn.tools.quantize.layer_runs import cut, layer_runs
from hetero_attn.tools.quantize.sensitivity import losses
from tests.support.models.runtime import nmse
from tests.support.models.toy import make_checkpoint, make_family_checkpoint

TINY = Path(__file__).parents[3] / "examples" / "tiny"
TOKENS = 96


@pytest.fixture(scope="module")
def llm():
    options = {"device": "cpu", "dtype": "fp32", "kv_dtype": "fp32", "max_context": TOKENS, "max_batch": 3}
    with LLM(TINY, progress=False, num_threads=2, **options) as model:
        yield model


@pytest.fixture(scope="module")
def tokens(llm):
    return llm.tokenizer.encode((TINY / "heldout.txt").read_text())[: 2 * TOKENS]


def final(runs):
    hidden = runs.embedded()
    for layer in range(runs.layers):
        hidden = runs.after_layer(layer, hidden)
    return hidden


def test_windows_together_are_the_model_alone(llm, tokens):
    with layer_runs(llm.engine, cut(tokens, TOKENS, 2), 2, 2) as runs:
        found = [runs.log_probabilities(window) for window in final(runs)]

    for start, logs in zip((0, TOKENS), found, strict=True):
        assert nmse(logs, torch.log_softmax(llm.logits(tokens[start : start + TOKENS]), -1)) < 1e-9


@pytest.mark.parametrize(
    ("family", "values"),
    [
        ("gemma2", {"sliding_window": 9, "attn_logit_softcapping": 1.5, "final_logit_softcapping": 0.5}),
        ("cohere2", {"sliding_window": 9, "logit_scale": 0.3}),
        ("starcoder2", {"sliding_window": 9}),
    ],
)
def test_families_of_other_layers_are_themselves_too(tmp_path, family, values):
    path, window = make_family_checkpoint(tmp_path, family, **values), cut(list(range(3, 35)), 32, 1)
    options = {"device": "cpu", "dtype": "fp32", "kv_dtype": "fp32", "max_context": 32, "max_batch": 2}
    with LLM(path, progress=False, num_threads=2, **options) as model:
        with layer_runs(model.engine, window, 1, 2) as runs:
            found = runs.log_probabilities(final(runs)[0])
        expected = torch.log_softmax(model.logits(window[0].tolist()), -1)

    assert nmse(found, expected) < 1e-9


def test_a_short_text_is_one_window():
    assert cut(list(range(5)), 8, 3).tolist() == [[0, 1, 2, 3, 4]]
    assert cut(list(range(21)), 8, 3).shape == (2, 8)


def test_a_weight_costs_what_is_said(llm, tokens):
    """Every fifth weight is really rounded to two types, alone, and the divergence measured."""
    ops = CpuKernels(2)
    with layer_runs(llm.engine, cut(tokens, TOKENS, 1), 3, 2) as runs:
        found = losses(runs, {}, ops)
        before = runs.log_probabilities(final(runs)[0])
        said, measured = [], []
        parts = [part for layer in range(runs.layers) for part in runs.parts(layer)][::5]
        for part, rows, _ in parts:
            for name in ("IQ4_NL", "Q5_0"):
                if name not in found[part.tensor].kl:
                    continue
                kept = rows.clone()
                flat = kept.reshape(-1, kept.shape[-1])
                rows.copy_(held(name, encode(name, flat), flat.shape[1], ops).view(rows.shape))
                after = runs.log_probabilities(final(runs)[0])
                rows.copy_(kept)
                said.append(found[part.tensor].kl[name])
                measured.append((before.exp() * (before - after)).sum(-1).mean().item())

    ratios = torch.tensor(said) / torch.tensor(measured)
    assert len(said) >= 8
    assert 1 / 3 < ratios.min() and ratios.max() < 3
    assert 0.8 < sum(said) / sum(measured) < 1.25


def test_the_weights_are_the_same_afterwards_and_an_embedding_of_its_own_is_measured_too(tmp_path):
    path = make_checkpoint(tmp_path, "qwen3", hidden=64, intermediate=100, num_heads=4, num_kv_heads=2)
    options = {"device": "cpu", "dtype": "fp32", "kv_dtype": "fp32", "max_context": 32, "max_batch": 2}
    with LLM(path, progress=False, num_threads=2, **options) as model:
        before = model.logits(list(range(32)))
        with layer_runs(model.engine, cut(list(range(32)), 32, 1), 2, 2) as runs:
            found = losses(runs, {}, CpuKernels(2))
        tied = model.engine.weights.spec.is_tied

        assert torch.equal(model.logits(list(range(32))), before)
    assert ("lm_head.weight" in found) == (not tied)
    assert all(min(loss.kl.values()) >= 0 for loss in found.values())
    assert {name: (loss.rows, loss.in_features) for name, loss in found.items()} == {
        name: shape for name, shape in model.engine.weights.spec.tensors.items() if len(shape) == 2
    }
