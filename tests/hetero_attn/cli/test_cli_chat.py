"""`chat`: the conversation, its commands, what is read from where, the editor and the wrapping of lines."""

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
from typer.testing import CliRunner

from hetero_attn.cli import app
from hetero_attn.cli.chat import banner
from hetero_attn.cli.talk import line_editor
from hetero_attn.cli.talk.line_editor import EditedLines, line_source
from hetero_attn.cli.talk.word_wrap import WordWrap
from hetero_attn.errors import PromptError
from tests.support.processes.command import FakeLLM, FakeTokenizer, contents, run


def test_chat_remembers_the_conversation_until_exit(fake: type[FakeLLM]) -> None:
    result = run("chat", "some/model", "--system", "Be brief.", typed="Hello\nAgain\n/reset\nNew\n/exit\nignored\n")
    conversations = [[message["content"] for message in messages] for messages, _ in fake.made[0].asked]

    assert result.exit_code == 0
    assert conversations == [
        ["Be brief.", "Hello"],
        ["Be brief.", "Hello", "Once upon a time", "Again"],
        ["Be brief.", "New"],
    ]


def test_a_model_without_a_chat_template_is_refused_before_a_question(
    fake: type[FakeLLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every message was answered by the same error, and the exit code was 0."""
    monkeypatch.setattr(FakeTokenizer, "chat_template", None)
    result = run("chat", "some/model", typed="Hello\n")

    assert result.exit_code == PromptError.exit_code
    assert "no chat template" in result.stderr
    assert fake.made == []


def test_chat_survives_an_interrupted_answer(fake: type[FakeLLM]) -> None:
    fake.ending = KeyboardInterrupt
    result = run("chat", "some/model", typed="Hello\nAgain\n")

    assert result.exit_code == 0
    assert [message["content"] for message in fake.made[0].asked[1][0]] == ["Hello", "Once upon a time", "Again"]


def test_chat_forgets_a_question_whose_answer_never_began(fake: type[FakeLLM], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.support.processes.command.WORDS", ())
    fake.ending = KeyboardInterrupt
    run("chat", "some/model", typed="Hello\nAgain\n")

    assert [message["content"] for message in fake.made[0].asked[1][0]] == ["Again"]


def test_a_full_context_drops_the_oldest_turns_with_a_note(
    fake: type[FakeLLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ended the program, and the conversation was lost."""
    monkeypatch.setattr(FakeLLM, "context", 24)  # of these, 6 are kept for the answer
    result = run("chat", "m", "--system", "Be brief.", typed="one two three\n" * 4)

    assert result.exit_code == 0
    assert contents(fake.made[0])[-1] == ["Be brief.", "one two three", "Once upon a time", "one two three"]
    assert "oldest messages were dropped" in result.stderr


def test_lines_that_cannot_be_read_are_reported_and_the_session_goes_on(fake: type[FakeLLM]) -> None:
    result = CliRunner().invoke(app, ["chat", "m"], input=b"good\n\xff\xfe bad\nlast\n")

    assert result.exit_code == 0
    assert [each[-1] for each in contents(fake.made[0])] == ["good", "last"]
    assert "no UTF-8" in result.stderr


def piped(monkeypatch: pytest.MonkeyPatch, data: bytes, encoding: str) -> tuple[list[str], list[str]]:
    """(lines read, lines said) of a pipe in an encoding."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding))
    said: list[str] = []
    source, lines = line_source(said.append, ()), []
    with pytest.raises(EOFError):
        while True:
            lines.append(source.line(""))
    return lines, said


def test_lines_are_utf8_or_what_the_terminal_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accents typed in a terminal of latin-1 were left out."""
    assert piped(monkeypatch, b"h\xe9llo\n", "latin-1") == (["h\u00e9llo"], [])
    assert piped(monkeypatch, "h\u00e9llo\n".encode(), "latin-1") == (["h\u00e9llo"], [])
    assert piped(monkeypatch, "h\u00e9llo\n".encode(), "ascii") == (["h\u00e9llo"], [])
    lines, said = piped(monkeypatch, b"h\xe9llo\nnext\n", "ascii")
    assert lines == ["next"] and "no UTF-8" in said[0]


def test_a_line_that_never_ends_ends_the_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line_editor, "MOST_LINE_BYTES", 100)
    lines, said = piped(monkeypatch, b"first\n" + bytes(1000), "utf-8")

    assert lines == ["first"] and len(said) == 1 and "over 100 bytes" in said[0]


def test_a_chat_without_stdin_says_so(fake: type[FakeLLM], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)

    with pytest.raises(typer.BadParameter, match="stdin is closed"):
        line_source(print, ())


def test_an_error_that_a_person_can_mend_does_not_end_the_session(fake: type[FakeLLM]) -> None:
    fake.ending = PromptError("the chat template refuses these messages")
    result = run("chat", "m", "--system", "no", typed="Hello\n/system -\n/set temprature 1\n/load absent\nAgain\n")

    assert result.exit_code == 0
    assert contents(fake.made[0]) == [["no", "Hello"], ["Again"]]
    assert "refuses" in result.stderr and "did you mean temperature" in result.stderr and "absent" in result.stderr


def test_chat_commands(fake: type[FakeLLM], tmp_path: Path) -> None:
    saved = tmp_path / "talk.json"
    result = run(
        "chat",
        "m",
        "--template-var",
        "enable_thinking=true",
        typed=f"Hello\n/set --temperature 0.25\n/set enable_thinking off\n/regen\n/save {saved}\n/reset\n/load {saved}\n"
        "/plan\n/stats\n/help\n/etc/hosts is what?\n/exti\n/no_think now\n",
    )
    (llm,) = fake.made

    assert result.exit_code == 0
    assert contents(llm) == [
        ["Hello"],
        ["Hello"],
        ["Hello", "Once upon a time", "/etc/hosts is what?"],
        ["Hello", "Once upon a time", "/etc/hosts is what?", "Once upon a time", "/no_think now"],
    ]
    assert (llm.asked[0][1].temperature, llm.asked[1][1].temperature) == (0.7, 0.25)
    assert "temperature is 0.25" in result.stderr and "the conversation is forgotten" in result.stderr
    assert llm.variables == {"enable_thinking": False}
    assert "the plan" in result.stderr and "of 1000 tokens" in result.stderr and "did you mean /exit" in result.stderr
    assert json.loads(saved.read_text())["messages"][0] == {"role": "user", "content": "Hello"}


def test_an_unknown_command_is_no_question_and_a_message_may_begin_with_a_slash(fake: type[FakeLLM]) -> None:
    """A misspelt command went to the model and into the history without a word."""
    refused = ("/nosuch", "/sytem be brief", "/hepl", "/")
    sent = ("/etc/passwd is what?", "/etc/passwd", "/no_think now", " /nosuch", '"""/nosuch"""')
    result = run("chat", "m", typed="\n".join([*refused, *sent, "/help"]) + "\n")
    asked = [messages[-1]["content"] for messages, _ in fake.made[0].asked]

    assert asked == [*sent[:3], "/nosuch", "/nosuch"]
    assert [f"error: {line.split()[0]} is no command" in result.stderr for line in refused] == [True] * len(refused)
    assert "/sytem is no command; did you mean /system?" in result.stderr
    assert "a space before /word makes a message of it" in result.stderr


def test_three_quotes_hold_several_lines_and_a_pipe_sees_answers_alone(fake: type[FakeLLM]) -> None:
    result = run("chat", "m", typed='"""one\n\n  two"""\n')

    assert contents(fake.made[0]) == [["one\n\n  two"]]
    assert result.stdout == "Once upon a time\n"


def test_a_cut_answer_is_marked(fake: type[FakeLLM]) -> None:
    fake.ending = "length"

    limits = ([], ["-n", "5"])
    ends = [run("chat", "m", *limit, typed="Hello\n").stderr for limit in limits]

    assert "[cut after 5 tokens: the end of the context]" in ends[0]
    assert "[cut after 5 tokens: the limit of --max-tokens]" in ends[1]


def test_a_banner_says_what_answers(fake: type[FakeLLM]) -> None:
    banner = run("chat", "some/model", typed="").stderr

    assert "bf16 weights" in banner and "context 1000" in banner and "/help" in banner


def test_the_editor_keeps_history_and_takes_several_lines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from prompt_toolkit.application import create_app_session
    from prompt_toolkit.input import create_pipe_input
    from prompt_toolkit.output import DummyOutput

    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        keys.send_text("first\x1b\rsecond\r")
        assert EditedLines(("/help",)).line("> ") == "first\nsecond"
        keys.send_text("\x1b[A\r")  # another session: Up brings the last message back
        assert EditedLines(("/help",)).line("> ") == "first\nsecond"
    assert (tmp_path / "hetero_attn" / "chat_history").stat().st_mode & 0o77 == 0


@pytest.mark.parametrize(
    "pieces", [["one two three four"], ["on", "e two th", "ree", " four"], list("one two three four")]
)
def test_words_wrap_at_the_edge(pieces: list[str]) -> None:
    out: list[str] = []
    wrap = WordWrap(out.append, 9)
    for piece in pieces:
        wrap.push(piece)
    wrap.finish()

    assert "".join(out) == "one two\nthree\nfour"


def test_wrapping_keeps_line_ends_indents_and_long_words() -> None:
    out: list[str] = []
    wrap = WordWrap(out.append, 6)
    wrap.push("a\n\n  b\nabcdefghij k")
    wrap.finish()

    assert "".join(out) == "a\n\n  b\nabcdefghij\nk"


@pytest.mark.parametrize(
    ("device", "speed", "said"),
    [
        ("cpu", 1651.63, "2 CPU threads, about 1,650 tokens/s expected\n"),
        ("cuda", 0.9123, "2 CPU threads, about 0.912 tokens/s expected\n"),
        ("emulated", 1651.63, "2 CPU threads\n"),
    ],
)
def test_the_speed_that_is_expected_is_written_out(device: str, speed: float, said: str) -> None:
    """It was 1.65e+03, and of an emulated GPU it was one of invented rates."""
    predicted = SimpleNamespace(decode=SimpleNamespace(tokens_per_s=speed))
    workload = SimpleNamespace(weight_dtype="q8", kv_dtype="bf16")
    plan = SimpleNamespace(
        model="tiny", workload=workload, max_context=512, device=device, num_threads=2, predicted=predicted
    )

    assert said in banner(SimpleNamespace(plan=plan))
