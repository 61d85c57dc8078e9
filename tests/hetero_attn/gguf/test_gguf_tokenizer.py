"""Tokenizers from a GGUF file's metadata: merges in SentencePiece's order, what is special, templates, bad lists."""

import random
import subprocess
import sys

import numpy as np
import pytest

from hetero_attn.checkpoints import template_time
from hetero_attn.checkpoints.gguf import tokenizer as gguf
from hetero_attn.checkpoints.gguf.fields import GgufFields
from hetero_attn.errors import ConfigError, PromptError
from hetero_attn.serving.defaults import default_params
from hetero_attn.serving.text.plain_tokenizer import PlainTokenizer
from hetero_attn.serving.text.tokenizer import Tokenizer
from tests.support.models.gguf_models import make_gguf

MESSAGES = [{"role": "user", "content": "a"}]


def slow_merges(vocab, scores):
    """As described: by score of what is joined, then rank among its pairs by their ids, then the joined token."""
    found = []
    for token, index in vocab.items():
        pairs = [(token[:at], token[at:]) for at in range(1, len(token))]
        here = sorted((pair for pair in pairs if set(pair) <= vocab.keys()), key=lambda p: (vocab[p[0]], vocab[p[1]]))
        found += [(-float(scores[index]), rank, index, pair) for rank, pair in enumerate(here)]
    return [pair for *_, pair in sorted(found)]


@pytest.mark.parametrize("seed", range(3))
def test_merges_come_in_sentencepieces_order(seed):
    """Words of three letters, many of one score, in any order of ids."""
    draw = random.Random(seed)
    words = list({"".join(draw.choices("abc", k=draw.randint(1, 5))) for _ in range(200)} | set("abc"))
    draw.shuffle(words)
    vocab = {word: index for index, word in enumerate(words)}
    scores = np.array([draw.choice([0.0, -1.5, -2.0, float(-i)]) for i in range(len(words))], np.float32)

    assert gguf._merges(vocab, scores) == slow_merges(vocab, scores)


def fields(tmp_path, **values):
    """Metadata of a tokenizer of four tokens."""
    found = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "a", "b"],
        "tokenizer.ggml.scores": np.zeros(4, np.float32),
        "tokenizer.ggml.token_type": np.array([2, 3, 1, 1], np.int32),
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
    }
    return GgufFields(tmp_path / "m.gguf", found | {f"tokenizer.ggml.{key}": value for key, value in values.items()})


def test_a_token_with_a_part_is_special_whatever_its_type(tmp_path):
    found = gguf.gguf_tokenizer(fields(tmp_path))
    added = found.backend.get_added_tokens_decoder()

    assert found.named == {"bos_token": "<s>", "unk_token": "<unk>"}
    assert {index: token.special for index, token in added.items()} == {0: True, 1: True}


def test_a_merge_of_no_two_tokens_is_named(tmp_path):
    changed = {"model": "gpt2", "pre": "gpt-2", "merges": ["a b", "a c"], "tokens": ["<unk>", "<s>", "a", "b"]}

    with pytest.raises(ConfigError, match=r"merges is \('a', 'b'\), expected two tokens whose join is one too"):
        gguf.gguf_tokenizer(fields(tmp_path, **changed))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"tokens": ["a", "a", "b", "c"]}, "4 tokens, 3 different"),
        ({"scores": np.zeros(3, np.float32)}, "expected 4 numbers"),
        ({"token_type": np.zeros(5, np.int32)}, "expected 4 numbers"),
        ({"bos_token_id": 4}, "bos_token_id is 4"),
        ({"tokens": ["a" * 40_000, "<s>", "a", "b"]}, "of 40005 characters.*tokens of a few characters"),
    ],
)
def test_lists_that_do_not_belong_together_are_named(tmp_path, changed, words):
    with pytest.raises(ConfigError, match=words):
        gguf.gguf_tokenizer(fields(tmp_path, **changed))


def test_chats_are_those_of_transformers_with_the_same_vocabulary(tmp_path):
    from transformers import PreTrainedTokenizerFast

    template = (
        "{{ bos_token }}{% for m in messages %}{{ m.content }}<s>{% endfor %}{% if add_generation_prompt %}b{% endif %}"
    )
    found = gguf.gguf_tokenizer(fields(tmp_path, add_space_prefix=False))
    ours = Tokenizer(tmp_path / "m.gguf", PlainTokenizer(found.backend, found.named, template))
    theirs = PreTrainedTokenizerFast(tokenizer_object=found.backend, chat_template=template, **found.named)
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}

    assert ours.encode_chat(MESSAGES) == theirs.apply_chat_template(MESSAGES, **options) == [1, 2, 1, 3]


def test_a_template_beside_the_file_is_its_own(tmp_path):
    gguf_file, _ = make_gguf(tmp_path, {}, layers=1, hidden=64, intermediate=64, num_heads=1, num_kv_heads=1)
    written = Tokenizer.open(gguf_file).chat_template
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}!")

    opened = Tokenizer.open(gguf_file)

    assert written != opened.chat_template
    assert opened.decode(opened.encode_chat(MESSAGES)) == "a!"
    (tmp_path / "chat_template.jinja").write_bytes(b" " * ((1 << 20) + 1))
    with pytest.raises(ConfigError, match="at most 1048576"):
        Tokenizer.open(gguf_file)


def test_what_is_suggested_beside_the_file_is_taken(tmp_path):
    """It is fetched with the file from a repository."""
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.25}')

    assert default_params(tmp_path / "m.gguf").temperature == default_params(tmp_path).temperature == 0.25


def test_a_file_without_template_says_what_to_do(tmp_path):
    found = gguf.gguf_tokenizer(fields(tmp_path))
    opened = Tokenizer(tmp_path / "m.gguf", PlainTokenizer(found.backend, found.named, None))

    with pytest.raises(PromptError, match=r"base models have none; use generate.*chat_template.jinja"):
        opened.encode_chat(MESSAGES)


def test_opening_needs_no_transformers(tmp_path):
    """Its import takes a second of every start; only a chat needs it."""
    gguf_file, _ = make_gguf(tmp_path, {}, layers=1, hidden=64, intermediate=64, num_heads=1, num_kv_heads=1)
    code = (
        "import sys; from hetero_attn.serving.text.tokenizer import Tokenizer\n"
        "tokenizer = Tokenizer.open(sys.argv[1]); tokenizer.decode(tokenizer.encode('a b'))\n"
        "print('transformers' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code, str(gguf_file)], capture_output=True, text=True, check=False)

    assert (run.stderr, run.stdout) == ("", "False\n")


@pytest.mark.parametrize(
    "template",
    [
        "{% set x = range(99999) | list %}{% for a in x %}{% for b in x %}{% endfor %}{% endfor %}",
        "{% macro again(n) %}{% for a in range(99999) %}{{ a }}{% endfor %}{% endmacro %}{% for a in range(99999) %}{{ again(a) }}{% endfor %}",
    ],
)
def test_a_template_that_does_not_end_is_stopped(tmp_path, monkeypatch, template):
    monkeypatch.setattr(template_time, "MOST_SECONDS", 0.2)
    found = gguf.gguf_tokenizer(fields(tmp_path))
    opened = Tokenizer(tmp_path / "m.gguf", PlainTokenizer(found.backend, found.named, template))

    with pytest.raises(PromptError, match="has run for 0.2 s and has not ended"):
        opened.encode_chat(MESSAGES)
    assert sys.gettrace() is None


def test_code_of_a_stranger_reaches_nothing(tmp_path):
    """What was executed by programs that render templates without a sandbox."""
    found = gguf.gguf_tokenizer(fields(tmp_path))
    template = "{{ messages.__class__.__mro__[-1].__subclasses__() }}"
    opened = Tokenizer(tmp_path / "m.gguf", PlainTokenizer(found.backend, found.named, template))

    with pytest.raises(PromptError, match="SecurityError"):
        opened.encode_chat(MESSAGES)
