"""The committed checkpoint of `examples/tiny` is whole, is what its README says, and can be trained again."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.processes.scripts import run_script

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY = EXAMPLES / "tiny"
FILES = {
    "README.md",
    "config.json",
    "generation_config.json",
    "heldout.txt",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()


def readme_figure(row: str) -> float:
    """The loss (nats per token) of a row of the README's table, by the row's first cell."""
    match = re.search(rf"^\| {re.escape(row)} \| ([0-9.]+) \|", (TINY / "README.md").read_text("utf-8"), re.MULTILINE)
    assert match, f"README.md has no row {row!r}"
    return float(match[1])


def test_the_files_are_there_readable_and_small():
    paths = {path.name: path for path in TINY.iterdir()}
    total_bytes = sum(path.stat().st_size for path in paths.values())

    assert FILES == paths.keys()
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in paths.values())
    assert 8_000_000 < total_bytes < 12_000_000


def test_config_and_weights_agree():
    config = json.loads((TINY / "config.json").read_text())
    with safe_open(TINY / "model.safetensors", "pt") as weights:
        shapes = {
            name: (weights.get_slice(name).get_shape(), weights.get_slice(name).get_dtype()) for name in weights.keys()
        }

    assert config["architectures"] == ["LlamaForCausalLM"] and config["max_position_embeddings"] == 2048
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (8, 4)
    assert {dtype for _, dtype in shapes.values()} == {"BF16"}
    assert shapes["model.embed_tokens.weight"][0] == [config["vocab_size"], config["hidden_size"]]
    assert config["tie_word_embeddings"] == ("lm_head.weight" not in shapes)


def test_the_head_is_tied_as_declared(model):
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight

    assert tied == model.config.tie_word_embeddings


@pytest.mark.parametrize(
    "text",
    [
        "The with statement is used to wrap a block.",
        "def f(x):\n    return x  # two\n\n\ttab",
        "naïve café, Żółć, 漢字, emoji 🙂👩‍👩‍👧, \u202e\x00",
    ],
    ids=["prose", "code", "unicode"],
)
def test_the_tokenizer_gives_text_back(tokenizer, text):
    token_ids = tokenizer(text)["input_ids"]

    assert token_ids[0] == tokenizer.bos_token_id and max(token_ids) < len(tokenizer)
    assert text == tokenizer.decode(token_ids, skip_special_tokens=True)


def test_special_tokens_match_the_config(tokenizer, model):
    generation = json.loads((TINY / "generation_config.json").read_text())

    assert len(tokenizer) == model.config.vocab_size
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(tokenizer, name) == getattr(model.config, name) == generation[name]


def test_the_chat_template_renders(tokenizer):
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": " What is json? "}]

    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    token_ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]

    assert text == "<|begin|><|system|>Be short.<|end|><|user|>What is json?<|end|><|assistant|>"
    assert token_ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert token_ids.count(tokenizer.eos_token_id) == 2
    assert token_ids[-1] == tokenizer.convert_tokens_to_ids("<|assistant|>")


@torch.no_grad()
def test_the_held_out_loss_is_that_of_the_readme(model, tokenizer):
    """All of the held-out text, in the README's windows of 512 tokens."""
    token_ids = tokenizer((TINY / "heldout.txt").read_text("utf-8"))["input_ids"]
    windows = [token_ids[start : start + 513] for start in range(0, len(token_ids) - 1, 512)]
    total = 0.0
    for window in windows:
        ids = torch.tensor([window])
        total += model(input_ids=ids, labels=ids).loss.item() * (len(window) - 1)
    loss = total / (len(token_ids) - 1)

    assert loss == pytest.approx(readme_figure("this model"), rel=0.02)
    assert loss < readme_figure("token frequencies alone") - 1.5


@torch.no_grad()
def test_the_greedy_sample_is_that_of_the_readme(model, tokenizer):
    prompt = "The with statement is used to"
    token_ids = tokenizer(prompt, return_tensors="pt")["input_ids"]

    output = model.generate(token_ids, max_new_tokens=8, do_sample=False)
    text = tokenizer.decode(output[0, token_ids.shape[1] :])

    assert f"{prompt} ->{text}".splitlines()[0] in (TINY / "README.md").read_text("utf-8")


def test_training_runs_on_a_tiny_corpus(tmp_path):
    """A step on three small modules gives a checkpoint that transformers loads."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("alpha", "beta", "gamma"):
        functions = "".join(
            f'def {name}_{index}(x, y={index}):\n    """Return x joined with {name} number {index}."""\n\n'
            for index in range(40)
        )
        (source / f"{name}.py").write_text(f'"""The {name} module: functions that join things."""\n\n{functions}')
    out = tmp_path / "out"

    sizes = ["--steps", "1", "--batch-tokens", "256", "--threads", "1", "--vocab-size", "320"]
    done = run_script(EXAMPLES / "train_tiny.py", *sizes, "--source", source, "--out", out)

    assert done.returncode == 0, done.stderr
    assert "held-out loss" in done.stdout
    assert FILES == {path.name for path in out.iterdir()}
    assert AutoModelForCausalLM.from_pretrained(out).config.vocab_size == 320
