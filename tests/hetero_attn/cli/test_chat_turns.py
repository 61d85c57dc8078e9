"""What a conversation of `chat` keeps where a question, a command or a file cannot be had."""

import json
from pathlib import Path

import pytest

from hetero_attn import SamplingParams
from hetero_attn.cli.chat import answer, take
from hetero_attn.cli.talk.conversation import Conversation
from hetero_attn.errors import PromptError
from tests.support.processes.command import FakeLLM, FakeTokenizer, contents, run


def test_a_question_that_is_too_long_costs_no_earlier_turn(
    fake: type[FakeLLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every turn was dropped to make room for it, without a word, before it was refused."""
    monkeypatch.setattr(FakeLLM, "context", 24)
    result = run("chat", "m", typed="one\n" + "long " * 30 + "\n/stats\ntwo\n")

    assert contents(fake.made[0]) == [["one"], ["one", "Once upon a time", "two"]]
    assert "the prompt has 31 tokens" in result.stderr and "messages dropped: 0" in result.stderr


def test_an_answer_that_cannot_be_had_anew_stays(fake: type[FakeLLM], monkeypatch: pytest.MonkeyPatch) -> None:
    """/regen lost question and answer where it failed, or was interrupted before the first word."""

    def refuse(*_: object, **__: object) -> None:
        raise PromptError("no")

    talk = Conversation(FakeLLM("m"), SamplingParams())
    answer(talk, "Hello")
    asked = list(talk.turns)
    with monkeypatch.context() as patched, pytest.raises(PromptError):
        patched.setattr(FakeLLM, "stream_chat", refuse)
        take(talk, "/regen")
    talk.forget_question()
    after_refusal = list(talk.turns)
    monkeypatch.setattr("tests.support.processes.command.WORDS", ())
    fake.ending = KeyboardInterrupt
    take(talk, "/regen")

    assert [message["role"] for message in asked] == ["user", "assistant"]
    assert after_refusal == talk.turns == asked


def test_a_conversation_may_end_with_a_question(fake: type[FakeLLM], tmp_path: Path) -> None:
    """A command that failed, and Ctrl-C at the prompt, took it out."""
    saved = tmp_path / "talk.json"
    saved.write_text(json.dumps({"messages": [{"role": "user", "content": "What?"}]}))
    run("chat", "m", typed=f"/load {saved}\n/nonsense\n/regen\n")

    assert contents(fake.made[0]) == [["What?"]]


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"messages": [{"role": "user", "content": "\\ud800"}]}',
        '{"messages": [{"role": 5, "content": ""}]}',
    ],
    ids=["nested", "surrogate", "role"],
)
def test_a_file_that_holds_no_conversation_is_refused(fake: type[FakeLLM], tmp_path: Path, text: str) -> None:
    """The first ended the program with a traceback, the second was taken and made every later question fail."""
    (file := tmp_path / "talk.json").write_text(text)
    result = run("chat", "m", typed=f"/load {file}\nHello\n")

    assert result.exit_code == 0 and "holds no conversation" in result.stderr
    assert contents(fake.made[0]) == [["Hello"]]


def test_a_template_that_wants_a_question_takes_a_system_message_before_it(
    fake: type[FakeLLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """/system and /stats were refused until something had been asked."""
    plain = FakeTokenizer.encode_chat

    def strict(self: FakeTokenizer, messages: list[dict[str, str]], **more: object) -> list[int]:
        if all(message["role"] != "user" for message in messages):
            raise PromptError("No user query found in messages.")
        return plain(self, messages, **more)

    monkeypatch.setattr(FakeTokenizer, "encode_chat", strict)
    result = run("chat", "m", typed="/system Be brief.\n/stats\nHello\n")

    assert contents(fake.made[0]) == [["Be brief.", "Hello"]]
    assert "No user query" not in result.stderr and "context: 4 of" in result.stderr


def test_what_is_text_may_look_like_a_number(fake: type[FakeLLM]) -> None:
    """/set stop 5 was refused: "stop must be a list, got 5"."""
    run("chat", "m", typed="/set stop 5\n/set regex 12\nHello\n/set stop none\nHello\n")
    first, second = (params for _, params in fake.made[0].asked)

    assert (first.stop, first.regex, second.stop) == (("5",), "12", ())
