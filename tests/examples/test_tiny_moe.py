"""The committed mixture of experts of `examples/tiny-moe` is whole, is what its README says, and can be trained again."""

import importlib
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.processes.scripts import run_script

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY, MOE = EXAMPLES / "tiny", EXAMPLES / "tiny-moe"
FILES = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture
def training(monkeypatch):
    """The module of the loop."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield importlib.import_module("tiny_training")
    del sys.modules["tiny_training"]


def readme_loss(row: str) -> float:
    """The loss (nats per token) of a row of the README's table, by the row's first cell."""
    match = re.search(rf"^\| {re.escape(row)} \| ([0-9.]+) \|", (MOE / "README.md").read_text("utf-8"), re.MULTILINE)
    assert match, f"README.md has no row {row!r}"
    return float(match[1])


def test_the_files_are_there_readable_and_small():
    paths = {path.name: path for path in MOE.iterdir()}

    assert FILES == paths.keys()
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in paths.values())
    assert 9_000_000 < sum(path.stat().st_size for path in paths.values()) < 12_000_000


def test_the_tokenizer_is_that_of_the_dense_model():
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (TINY / name).read_bytes() == (MOE / name).read_bytes()


def test_config_and_weights_agree():
    config = json.loads((MOE / "config.json").read_text())
    with safe_open(MOE / "model.safetensors", "pt") as weights:
        slices = {name: weights.get_slice(name) for name in weights.keys()}
        shapes = {name: (each.get_shape(), each.get_dtype()) for name, each in slices.items()}
    names = (f"model.layers.{layer}.mlp.experts.{n}.down_proj.weight" for layer in range(4) for n in range(32))

    assert config["architectures"] == ["Qwen3MoeForCausalLM"]
    assert (config["num_experts"], config["num_experts_per_tok"], config["num_hidden_layers"]) == (32, 4, 4)
    assert {dtype for _, dtype in shapes.values()} == {"BF16"}
    assert {tuple(shapes[name][0]) for name in names} == {(config["hidden_size"], config["moe_intermediate_size"])}
    assert config["tie_word_embeddings"] and "lm_head.weight" not in shapes


@torch.no_grad()
def test_the_held_out_loss_is_that_of_the_readme_and_near_the_dense_one():
    """All of the held-out text, in the README's windows of 512 tokens."""
    model = AutoModelForCausalLM.from_pretrained(MOE, dtype=torch.float32).eval()
    token_ids = AutoTokenizer.from_pretrained(MOE)((TINY / "heldout.txt").read_text("utf-8"))["input_ids"]
    total = 0.0
    for start in range(0, len(token_ids) - 1, 512):
        ids = torch.tensor([token_ids[start : start + 513]])
        total += model(input_ids=ids, labels=ids, output_router_logits=False).loss.item() * (ids.shape[1] - 1)
    loss = total / (len(token_ids) - 1)

    assert loss == pytest.approx(readme_loss("this model"), rel=0.002)
    assert loss < readme_loss("`examples/tiny`, dense") + 0.25
    assert loss < readme_loss("token frequencies alone") - 1.5


class Toy(torch.nn.Module):
    """A model of one matrix, called as those of transformers are."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.embedding = torch.nn.Embedding(11, 8)

    def forward(self, input_ids, use_cache):
        hidden = self.embedding(input_ids)
        return type("Output", (), {"logits": hidden @ self.embedding.weight.T})


def test_a_run_that_is_taken_up_again_ends_where_one_of_a_piece_does(training, tmp_path):
    streams = torch.randint(11, (2, 400), generator=torch.Generator().manual_seed(2)).unbind()
    options = training.TrainingOptions(steps=6, batch_tokens=32, short_context=16, long_context=32)
    whole = training.Run(Toy(), streams, options, training.token_losses)
    first = training.Run(Toy(), streams, options, training.token_losses)
    for run, steps in ((whole, 6), (first, 3)):
        for _ in range(steps):
            run.advance()
    first.write(tmp_path / "state.pt")
    kept = replace(options, state=tmp_path / "state.pt")
    model = Toy()
    done = training.train(model, streams, kept)

    assert done["steps"] == 6 and done["cpu_minutes"] > 0
    assert torch.equal(model.embedding.weight, whole.model.embedding.weight)
    assert not torch.equal(model.embedding.weight, first.model.embedding.weight)


def test_each_stream_is_trained_on_in_turn(training):
    seen, streams = [], [torch.full((40,), token) for token in (3, 5, 7)]

    def loss_of(model, tokens):
        seen.append(tokens.unique().tolist())
        return training.token_losses(model, tokens)

    training.train(Toy(), streams, training.TrainingOptions(steps=4, batch_tokens=32, short_context=16), loss_of)

    assert seen == [[3], [5], [7], [3]]


@pytest.mark.parametrize("decays_vectors", [False, True])
def test_vectors_decay_where_that_is_asked_for(training, decays_vectors):
    model = torch.nn.Linear(2, 2)
    optimizer = training.make_optimizer(model, training.TrainingOptions(decays_vectors=decays_vectors))
    before = [each.detach().clone() for each in model.parameters()]
    for each in model.parameters():
        each.grad = torch.zeros_like(each)
    optimizer.step()

    assert [bool((new != old).any()) for new, old in zip(model.parameters(), before)] == [True, decays_vectors]


@pytest.mark.matrix
def test_training_runs_on_a_tiny_corpus(tmp_path):
    """Two steps on two small modules, in a process of its own, give a checkpoint that transformers loads."""
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    for name in ("alpha", "beta"):
        text = "".join(f'def {name}_{n}(x):\n    """Return x joined with {n}."""\n\n' for n in range(40))
        (source / f"{name}.py").write_text(f'"""The {name} module."""\n\n{text}')

    sizes = ("--steps", 2, "--batch-tokens", 256, "--threads", 1)
    done = run_script(EXAMPLES / "train_moe.py", *sizes, "--source", source, "--out", out)

    assert done.returncode == 0, done.stderr
    assert "held-out loss" in done.stdout and "the dense model" in done.stdout
    assert FILES == {path.name for path in out.iterdir()}
    assert AutoModelForCausalLM.from_pretrained(out).config.num_local_experts == 32
