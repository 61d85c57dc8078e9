"""What a conversation of `chat` keeps where a question, a command or a file cannot be had."""

import errno
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer

from hetero_attn import SamplingParams
from hetero_attn.cli.chat import answer, converse, take
from hetero_attn.cli.talk.conversation import Conversation
from hetero_attn.cli.talk.line_editor import line_source
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


def test_names_of_no_file_are_refused_and_the_conversation_goes_on(fake: type[FakeLLM], tmp_path: Path) -> None:
    """They ended it with a traceback."""
    (tmp_path / "ring").symlink_to("ring")
    names = ("~nobody-of-that-name/talk", "a\0b", str(tmp_path / "ring"))
    result = run("chat", "m", typed="".join(f"/save {name}\n/load {name}\n" for name in names) + "Hello\n")

    assert result.exit_code == 0 and contents(fake.made[0]) == [["Hello"]]
    assert result.stderr.count("error: ") == 2 * len(names)


def test_only_parameters_and_variables_are_set(fake: type[FakeLLM]) -> None:
    """Any part of the template's text was taken for a variable, and -1, the default of --max-tokens, was refused."""
    result = run("chat", "m", typed="/set think 3\n/set max_tokens -1\n/set enable_thinkin off\nHello\n")
    (_, params), *_ = fake.made[0].asked

    assert params.max_tokens is None and "max_tokens is None" in result.stderr
    assert result.stderr.count("is neither") == 2 and "did you mean enable_thinking" in result.stderr


def test_a_variable_that_the_template_does_not_read_is_told(fake: type[FakeLLM]) -> None:
    """A misspelt one was taken without a word."""
    given = ("--template-var", "enable_thinkng=false", "--template-var", "enable_thinking=true")
    said = run("chat", "m", *given, typed="Hello\n").stderr

    assert "does not read enable_thinkng, so" in said


def test_a_second_ctrl_c_does_not_end_the_conversation(fake: type[FakeLLM], monkeypatch: pytest.MonkeyPatch) -> None:
    """It did, where the first one was still being answered."""
    lines = iter([KeyboardInterrupt(), "Hello", "/exit"])
    said = []

    def line(prompt: str) -> str:
        if isinstance(found := next(lines), BaseException):
            raise found
        return found

    def note(text: str) -> None:
        said.append(text)
        if len(said) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr("hetero_attn.cli.chat.note", note)
    llm = FakeLLM("m")
    converse(Conversation(llm, SamplingParams()), SimpleNamespace(line=line))

    assert contents(llm) == [["Hello"]]


def test_a_stdout_that_is_gone_ends_the_conversation(fake: type[FakeLLM], monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind `| head -1` every message that was left was answered for nobody, and the code was 0."""

    class Gone:
        def push(self, text: str) -> None:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

        def finish(self) -> None:
            pass

    monkeypatch.setattr("hetero_attn.cli.chat.screen", Gone)
    llm, lines = FakeLLM("m"), iter(["Hello", "Again"])
    with pytest.raises(BrokenPipeError):
        converse(Conversation(llm, SamplingParams()), SimpleNamespace(line=lambda prompt: next(lines)))

    assert contents(llm) == [["Hello"]]


def test_a_stdin_that_cannot_be_read_ends_the_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same error was said for ever."""

    def fail(most: int) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    buffer = SimpleNamespace(readline=fail)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=buffer, isatty=lambda: False))

    with pytest.raises(typer.BadParameter, match="stdin cannot be read: Input/output error"):
        line_source(print, ()).line("")


@pytest.mark.parametrize("is_read", [False, True], ids=["written", "read"])
def test_a_history_that_cannot_be_kept_costs_no_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_read: bool
) -> None:
    """A full disk put a traceback and "Press ENTER" before every answer."""
    from hetero_attn.cli.talk.history import open_history

    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    history = open_history()
    Path(history.filename).unlink()
    Path(history.filename).mkdir()  # for root, too, what no file can be written to or read from

    if is_read:
        assert list(history.load_history_strings()) == []
    history.append_string("Hello")
    assert history.get_strings() == ["Hello"]
