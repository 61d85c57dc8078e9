"""Tokenizers that cannot be opened, or do not fit the model: they block what needs them and nothing else."""

import json
from concurrent.futures import Future, wait

import pytest
from typer.testing import CliRunner

from hetero_attn import LLM
from hetero_attn.cli import app
from hetero_attn.engine.build import build_engine
from hetero_attn.errors import ConfigError, PromptError
from hetero_attn.serving.text.opening import open_beside, watch_opening
from hetero_attn.serving.text.tokenizer import Tokenizer
from tests.support.models.toy import make_checkpoint
from tests.support.planning.wishes import GREEDY, OPTIONS


def spoil_too_large_id(path):
    """An added token whose id is vocab_size, which transformers loads too."""
    values = json.loads((path / "tokenizer.json").read_text())
    values["added_tokens"].append(
        {
            "id": 260,
            "content": "[PAD]",
            "special": True,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
    )
    (path / "tokenizer.json").write_text(json.dumps(values))


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
