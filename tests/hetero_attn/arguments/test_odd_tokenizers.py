"""Tokenizers that cannot be opened, or do not fit the model: they block what needs them and nothing else."""

import json
from concurrent.futures import Future, wait

import pytest
from typer.testing import CliRunner

from hetero_attn import LLM, SamplingParams
from hetero_attn.cli import app
from hetero_attn.engine.build import build_engine
from hetero_attn.errors import ConfigError, PromptError, SamplingError
from hetero_attn.serving.text.opening import open_beside, watch_opening
from hetero_attn.serving.text.tokenizer import Tokenizer
from tests.support.models.toy import make_checkpoint
from tests.support.planning.wishes import GREEDY, OPTIONS


def add_token(path, content):
    """Give a tokenizer a token more, of the id behind its last."""
    values = json.loads((path / "tokenizer.json").read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    values["added_tokens"].append({"id": 260, "content": content, "special": True, **flags})
    (path / "tokenizer.json").write_text(json.dumps(values))


def spoil_too_large_id(path):
    """An added token whose id is vocab_size, which transformers loads too."""
    add_token(path, "[PAD]")


def spoil_damaged(path):
    (path / "tokenizer.json").write_text("{")


def spoil_only_sentencepiece(path):
    (path / "tokenizer.json").unlink()
    (path / "tokenizer_config.json").unlink()
    (path / "tokenizer.model").write_bytes(b"\x0a\x05model")


@pytest.mark.parametrize("spoil", [spoil_damaged, spoil_only_sentencepiece], ids=lambda spoil: spoil.__name__)
def test_a_tokenizer_that_cannot_be_opened_blocks_text_alone(tmp_path, spoil):
    """Prompts given as ids failed as well, and only after the weights were loaded."""
    path = make_checkpoint(tmp_path, "llama", layers=1)
    with LLM(path, progress=False, **OPTIONS) as sound:
        expected = sound.generate([5, 6], GREEDY)[0].token_ids
    spoil(path)
    with pytest.warns(UserWarning, match="answers have no text"):
        llm = LLM(path, progress=False, **OPTIONS)
        (output,) = llm.generate([5, 6], GREEDY)
    with llm:
        assert (output.token_ids, output.text) == (expected, "")
        with pytest.raises(ConfigError, match="tokenizer"):
            llm.generate("text", GREEDY)
        assert llm.generate([5, 6], GREEDY)[0].token_ids == expected


@pytest.mark.parametrize("spoil", [spoil_damaged, spoil_only_sentencepiece], ids=lambda spoil: spoil.__name__)
def test_a_tokenizer_that_is_needed_is_refused_before_the_weights_are_read(tmp_path, monkeypatch, spoil):
    """On the command line a text was refused only after minutes of loading."""
    path = make_checkpoint(tmp_path, "llama", layers=1)
    spoil(path)

    def opened(*arguments):
        wait([opening := open_beside(*arguments)])
        return opening

    monkeypatch.setattr("hetero_attn.serving.loading.open_beside", opened)
    monkeypatch.setattr("hetero_attn.serving.loading.build_engine", lambda *arguments: pytest.fail("loading has begun"))
    with pytest.raises(ConfigError, match="the tokenizer cannot be loaded"):
        LLM(path, progress=False, needs_text=True, **OPTIONS)
    for command in (["generate", str(path), "-p", "x"], ["chat", str(path)]):
        result = CliRunner().invoke(app, [*command, "--device", "cpu", "--context", "64"], input="x\n")
        assert result.exit_code == 3 and "the tokenizer cannot be loaded" in result.stderr
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        (path / name).unlink(missing_ok=True)
    with pytest.raises(PromptError, match="has no tokenizer files"):
        LLM(path, progress=False, needs_text=True, **OPTIONS)


def test_a_tokenizer_that_fails_in_the_middle_of_a_load_ends_it():
    opening, placed = Future(), []
    needed, unneeded = (watch_opening(opening, "m", needs_text, placed.append) for needs_text in (True, False))
    needed(1)
    unneeded(2)
    opening.set_exception(ConfigError("damaged"))

    with pytest.raises(ConfigError, match="damaged"):
        needed(3)
    with pytest.warns(UserWarning, match="answers have no text, only token ids: damaged"):
        unneeded(4)
    unneeded(5)
    assert placed == [1, 2, 4, 5]


def test_a_tokenizer_that_fails_after_the_weights_are_read_is_told_by_the_load(tmp_path, monkeypatch):
    """The load succeeded, and the first prompt failed."""
    path = make_checkpoint(tmp_path, "llama", layers=1)
    opening, built = Future(), []

    def build_and_fail(*arguments):
        built.append(build_engine(*arguments))
        monkeypatch.setattr(built[0], "close", lambda close=built[0].close: (close(), built.append("closed")))
        opening.set_exception(ConfigError("damaged"))
        return built[0]

    monkeypatch.setattr("hetero_attn.serving.loading.open_beside", lambda *arguments: opening)
    monkeypatch.setattr("hetero_attn.serving.loading.build_engine", build_and_fail)
    with pytest.raises(ConfigError, match="damaged"):
        LLM(path, progress=False, needs_text=True, **OPTIONS)

    assert built[1:] == ["closed"]


@pytest.mark.parametrize("more", [[], ["--chat"]], ids=["text", "chat"])
def test_a_prompt_of_the_command_line_is_encoded_once(tmp_path, monkeypatch, more):
    path, encoded = make_checkpoint(tmp_path, "llama", layers=1), []
    for name in ("encode", "encode_chat"):
        encode = getattr(Tokenizer, name)
        monkeypatch.setattr(Tokenizer, name, lambda *given, encode=encode: encoded.append(given[1]) or encode(*given))
    command = ["generate", str(path), "-p", "some words", "-n", "2", "--device", "cpu", "--context", "256", *more]

    assert CliRunner().invoke(app, command).exit_code == 0
    assert encoded == [[{"role": "user", "content": "some words"}] if more else "some words"]


def test_a_token_beyond_the_vocabulary_refuses_only_prompts_that_hold_it(tmp_path):
    path = make_checkpoint(tmp_path, "llama", layers=1, vocab=260)
    spoil_too_large_id(path)
    with LLM(path, progress=False, **OPTIONS) as llm:
        with pytest.warns(UserWarning, match=r"\[PAD\].* has id 260"):
            assert len(llm.generate(["plain text"], GREEDY)[0].token_ids) == 3
        with pytest.raises(PromptError, match="token 260 at position"):
            llm.generate(["with [PAD]"], GREEDY)


def test_a_prompt_that_no_context_holds_is_refused_before_the_weights_are_read(tmp_path, monkeypatch):
    """Here with a profile that is right: it was told after the weights were loaded."""
    path = make_checkpoint(tmp_path, "llama", layers=1)

    def opened(*arguments):
        wait([opening := open_beside(*arguments)])
        return opening

    monkeypatch.setattr("hetero_attn.serving.loading.open_beside", opened)
    monkeypatch.setattr("hetero_attn.serving.loading.build_engine", lambda *arguments: pytest.fail("loading has begun"))
    for more in ([], ["--chat"]):
        command = ["generate", str(path), "-p", "x " * 300, "--device", "cpu", "--context", "64", *more]
        result = CliRunner().invoke(app, command)

        assert result.exit_code == PromptError.exit_code
        assert "the context of this plan holds 64 including the answer" in " ".join(result.stderr.split())


@pytest.fixture
def panicking(tmp_path):
    """A model whose tokenizer's code in Rust panics: at a text of many x, and at the single token `a`."""
    path = make_checkpoint(tmp_path, "llama", layers=1)
    values = json.loads((path / "tokenizer.json").read_text())
    costly = {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False}
    values["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [costly, values["pre_tokenizer"]]}
    values["decoder"] = {"type": "Strip", "content": "a", "start": 1, "stop": 1}
    (path / "tokenizer.json").write_text(json.dumps(values))
    with LLM(path, progress=False, **OPTIONS) as llm:
        yield llm


def test_a_text_that_a_tokenizer_gives_up_is_a_fault_of_the_prompt(panicking):
    """Python takes a panic for the end of the program, so nothing that catches errors caught it."""
    text = "x" * 60
    for ask in (lambda: panicking.generate(text, GREEDY), lambda: panicking.chat([{"role": "user", "content": text}])):
        with pytest.raises(PromptError, match="retry-limit"):
            ask()

    assert panicking.generate([5, 6], GREEDY)[0].finish_reason == "length"


def test_a_token_that_a_tokenizer_cannot_write_ends_the_requests_that_drew_it(panicking):
    """It ended the step, again and again, and with it a server's model for everybody."""
    ids = panicking.tokenizer._tokenizer.get_vocab()
    params = [SamplingParams(temperature=0.0, max_tokens=3, logit_bias={ids[letter]: 100}) for letter in "ac"]
    failing, sound = (panicking.add([5, 6], each) for each in params)
    while panicking.step():
        pass

    assert (sound.finish_reason, sound.text) == ("length", "ccc")
    assert failing.finish_reason == "abort"
    with pytest.raises(ConfigError, match="cannot write these tokens"):
        failing.output()
    with pytest.raises(ConfigError, match="cannot write these tokens"):
        panicking.generate([5, 6], params[0])


def test_a_tokenizer_that_no_grammar_can_hold_is_told(tmp_path):
    """A token of thousands of characters, at which llguidance panics."""
    path = make_checkpoint(tmp_path, "llama", layers=1)
    add_token(path, "0" * 5000)
    with LLM(path, progress=False, **OPTIONS) as llm:
        with pytest.raises(SamplingError, match="cannot follow a grammar"):
            llm.generate([5, 6], SamplingParams(regex="[a-z]+", max_tokens=3))
        assert llm.generate("a", GREEDY)[0].finish_reason == "length"
