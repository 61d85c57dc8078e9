"""The command line: what it passes on, what it prints where, and with which code it leaves.

The first part runs every subcommand against a stand-in for the Python API, so that each option is seen to arrive. The
second runs the real thing on the shipped checkpoint.
"""

import io
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

import hetero_attn
import hetero_attn.tools
from cpu_kernels.team.cgroups import cpu_quota, memory_limit_bytes
from hetero_attn import SamplingParams
from hetero_attn.cli import app
from hetero_attn.cli.errors import exit_code
from hetero_attn.cli.talk import line_editor
from hetero_attn.cli.talk.line_editor import EditedLines, line_source
from hetero_attn.cli.talk.word_wrap import WordWrap
from hetero_attn.errors import MOST_LINES, CheckpointError, MemoryBudgetError, PromptError
from hetero_attn.serving.request import Metrics, Piece, RequestOutput
from hetero_attn.tools import doctor
from placement import BudgetError, HardwareProfile
from placement.plan.units import parse_bytes

ROOT = Path(__file__).resolve().parents[2]
TINY = str(ROOT / "examples" / "tiny")
METRICS = Metrics(prompt_tokens=3, generated_tokens=5, prefill_s=0.5, decode_s=2.0)
WORDS = ("Once", " upon", " a time")


class FakeLLM:
    """Remembers how it was made and asked; answers `WORDS`, or ends as `ending` says."""

    made: list["FakeLLM"] = []
    ending: str | type[BaseException] = "stop"
    context = 1000

    def __init__(self, model: str, **options: Any) -> None:
        self.model, self.options, self.asked, self.closed = model, options, [], False
        self.plan = SimpleNamespace(
            model=model,
            max_context=self.context,
            device="cpu",
            num_threads=2,
            predicted=None,
            table=lambda width: "the plan",
            workload=SimpleNamespace(weight_dtype="bf16", kv_dtype="bf16"),
        )
        # Every word is a token, and so is every role.
        self.tokenizer = SimpleNamespace(
            chat_template="{{ enable_thinking }}",
            encode_chat=lambda messages, template_variables: [
                0 for m in messages for _ in (m["role"], *m["content"].split())
            ],
        )
        FakeLLM.made.append(self)

    def __enter__(self) -> "FakeLLM":
        return self

    def __exit__(self, *error: object) -> None:
        self.closed = True

    def generate(self, prompts: list[str], params: Any) -> list[RequestOutput]:
        self.asked.append((prompts, params))
        return [RequestOutput("".join(WORDS), (1, 2, 3), self.ending, (7, 8), None, METRICS)]

    def stream(self, prompt: str, params: Any) -> Generator[Piece]:
        self.asked.append((prompt, params))
        for token_id, word in enumerate(WORDS):
            yield Piece(word, (token_id,))
        if not isinstance(self.ending, str):
            raise self.ending
        yield Piece("", (), self.ending, METRICS)

    def stream_chat(
        self, messages: list[dict[str, str]], params: Any, template_variables: Any = None
    ) -> Generator[Piece]:
        self.variables = template_variables
        return self.stream([dict(message) for message in messages], params)

    def chat(self, messages: list[dict[str, str]], params: Any) -> RequestOutput:
        return self.generate([messages], params)[0]

    @staticmethod
    def default_params(**given: Any) -> SamplingParams:
        return SamplingParams(**given)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeLLM]:
    """Puts `FakeLLM` in the place of `hetero_attn.LLM`."""
    monkeypatch.setattr(FakeLLM, "made", [])
    monkeypatch.setattr(FakeLLM, "ending", "stop")
    monkeypatch.setattr(FakeLLM, "context", 1000)
    monkeypatch.setitem(vars(hetero_attn), "LLM", FakeLLM)
    return FakeLLM


def run(*arguments: str, typed: str | None = None) -> Result:
    """Call the command in this process."""
    return CliRunner().invoke(app, list(arguments), input=typed)


def test_generate_streams_text_to_stdout_and_speed_to_stderr(fake: type[FakeLLM]) -> None:
    result = run("generate", "some/model", "-p", "Tell")

    assert (result.exit_code, result.stdout) == (0, "Once upon a time\n")
    assert result.stderr == "prefill 3 tokens, 6.0 tokens/s; decode 5 tokens, 2.0 tokens/s\n"
    assert fake.made[0].closed


def test_generate_passes_every_option_on(fake: type[FakeLLM]) -> None:
    result = run(
        "generate",
        "some/model",
        "-p",
        "Tell",
        "--policy",
        "cpu_only",
        "--gpu-memory",
        "2GiB",
        "--dtype",
        "q4",
        "--kv-dtype",
        "q8",
        "--device",
        "emulated",
        "--context",
        "77",
        "--threads",
        "2",
        "--seed",
        "9",
        "--max-tokens",
        "4",
        "--temperature",
        "0.5",
        "--top-p",
        "0.9",
        "--top-k",
        "3",
        "--min-p",
        "0.1",
        "--repetition-penalty",
        "1.2",
        "--stop",
        "a",
        "--stop",
        "b",
        "--ignore-eos",
    )
    (llm,) = fake.made
    ((prompt, params),) = llm.asked

    assert (result.exit_code, llm.model, prompt) == (0, "some/model", "Tell")
    assert llm.options == {
        "needs_text": True,
        "speculate": "off",
        "policy": "cpu_only",
        "gpu_memory": "2GiB",
        "dtype": "q4",
        "device": "emulated",
        "max_context": 77,
        "num_threads": 2,
        "kv_dtype": "q8",
        "seed": 9,
        "progress": True,
        "max_batch": None,
    }
    assert (params.max_tokens, params.temperature, params.top_p, params.top_k) == (4, 0.5, 0.9, 3)
    assert (params.min_p, params.repetition_penalty, params.stop, params.ignore_eos) == (0.1, 1.2, ("a", "b"), True)


def test_generate_json_is_one_object(fake: type[FakeLLM]) -> None:
    answer = json.loads(run("generate", "some/model", "-p", "Tell", "--json").stdout)

    assert answer["text"] == "Once upon a time"
    assert answer["metrics"]["decode_tokens_per_s"] == 2.0


def test_generate_reads_the_prompt_from_stdin(fake: type[FakeLLM]) -> None:
    run("generate", "some/model", "-p", "-", typed="from a pipe")

    assert fake.made[0].asked[0][0] == "from a pipe"


@pytest.mark.parametrize("ending", ["abort", KeyboardInterrupt])
def test_interrupted_generation_keeps_its_text_and_exits_130(fake: type[FakeLLM], ending: Any) -> None:
    fake.ending = ending
    result = run("generate", "some/model", "-p", "Tell")

    assert (result.exit_code, result.stdout) == (130, "Once upon a time\n")
    assert fake.made[0].closed


def test_chat_remembers_the_conversation_until_exit(fake: type[FakeLLM]) -> None:
    result = run("chat", "some/model", "--system", "Be brief.", typed="Hello\nAgain\n/reset\nNew\n/exit\nignored\n")
    conversations = [[message["content"] for message in messages] for messages, _ in fake.made[0].asked]

    assert result.exit_code == 0
    assert conversations == [
        ["Be brief.", "Hello"],
        ["Be brief.", "Hello", "Once upon a time", "Again"],
        ["Be brief.", "New"],
    ]


def test_chat_survives_an_interrupted_answer(fake: type[FakeLLM]) -> None:
    fake.ending = KeyboardInterrupt
    result = run("chat", "some/model", typed="Hello\nAgain\n")

    assert result.exit_code == 0
    assert [message["content"] for message in fake.made[0].asked[1][0]] == ["Hello", "Once upon a time", "Again"]


def test_chat_forgets_a_question_whose_answer_never_began(fake: type[FakeLLM], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "WORDS", ())
    fake.ending = KeyboardInterrupt
    run("chat", "some/model", typed="Hello\nAgain\n")

    assert [message["content"] for message in fake.made[0].asked[1][0]] == ["Again"]


def contents(llm: FakeLLM) -> list[list[str]]:
    """What each question was asked with."""
    return [[message["content"] for message in messages] for messages, _ in llm.asked]


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
    assert (llm.asked[0][1].temperature, llm.asked[1][1].temperature) == (1.0, 0.25)
    assert "temperature is 0.25" in result.stderr and "the conversation is forgotten" in result.stderr
    assert llm.variables == {"enable_thinking": False}
    assert "the plan" in result.stderr and "of 1000 tokens" in result.stderr and "did you mean /exit" in result.stderr
    assert json.loads(saved.read_text())["messages"][0] == {"role": "user", "content": "Hello"}


def test_three_quotes_hold_several_lines_and_a_pipe_sees_answers_alone(fake: type[FakeLLM]) -> None:
    result = run("chat", "m", typed='"""one\n\n  two"""\n')

    assert contents(fake.made[0]) == [["one\n\n  two"]]
    assert result.stdout == "Once upon a time\n"


def test_a_cut_answer_is_marked(fake: type[FakeLLM]) -> None:
    fake.ending = "length"

    assert "cut after 5 tokens" in run("chat", "m", typed="Hello\n").stderr


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


def test_generate_takes_a_file_a_template_and_the_usual_short_names(fake: type[FakeLLM], tmp_path: Path) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("from a file", encoding="utf-8")
    result = run(
        "generate",
        "m",
        "-f",
        str(prompt),
        "--chat",
        "--system",
        "Be brief.",
        "-n",
        "-1",
        "-c",
        "64",
        "-t",
        "2",
        "-np",
        "3",
    )
    (llm,) = fake.made

    assert result.exit_code == 0
    assert contents(llm) == [["Be brief.", "from a file"]]
    assert llm.asked[0][1].max_tokens is None
    assert (llm.options["max_context"], llm.options["num_threads"], llm.options["max_batch"]) == (64, 2, 3)
    for arguments in ([], ["-p", "a", "-f", str(prompt)], ["-p", "a", "--system", "b"], ["-p", "a", "-n", "0"]):
        assert run("generate", "m", *arguments).exit_code == 2
    refused = run("generate", "m", "-p", "a", "-ngl", "20")
    assert refused.exit_code == 2 and "--gpu-memory" in refused.stderr


def test_messages_name_options(fake: type[FakeLLM]) -> None:
    fake.ending = PromptError("load with a larger max_context, or lower max_tokens; see max_context.py and `top_k:`")
    result = run("generate", "m", "-p", "a")

    assert "a larger --context, or lower --max-tokens; see max_context.py and `top_k:`" in result.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (PromptError("empty prompt"), 2),
        (CheckpointError("shard.safetensors: cut short"), 3),
        (MemoryBudgetError("needs 6 GiB, budget 4 GiB"), 4),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
def test_errors_of_ours_are_one_message_and_a_code(fake: type[FakeLLM], error: Exception, code: int) -> None:
    fake.ending = error
    result = run("generate", "some/model", "-p", "Tell")

    assert (result.exit_code, result.stderr) == (code, f"error: {error}\n")


def test_a_budget_that_no_plan_meets_exits_4(fake: type[FakeLLM]) -> None:
    fake.ending = BudgetError("needs 6 GiB, the budget is 4 GiB", 6, 4)

    assert run("generate", "some/model", "-p", "Tell").exit_code == 4


def test_plain_value_errors_of_our_code_are_usage_errors_and_those_of_others_are_not() -> None:
    codes = []
    for offend in (lambda: parse_bytes("much"), lambda: int("much")):
        with pytest.raises(ValueError) as caught:
            offend()
        codes.append(exit_code(caught.value))

    assert codes == [2, None]


def test_errors_of_others_keep_their_traceback(fake: type[FakeLLM]) -> None:
    fake.ending = ZeroDivisionError
    result = run("generate", "some/model", "-p", "Tell")

    assert isinstance(result.exception, ZeroDivisionError)
    assert exit_code(ZeroDivisionError()) is None


def test_sampling_values_out_of_range_are_refused_before_the_model_loads(fake: type[FakeLLM]) -> None:
    result = run("generate", "some/model", "-p", "Tell", "--top-p", "1.5")

    assert (result.exit_code, fake.made) == (2, [])
    assert "--top-p" in result.stderr


@pytest.mark.parametrize(
    "arguments", [["generate"], ["plna", "m"], ["plan", "m", "--colour"], ["bench", "m", "-d", "0,-1"]]
)
def test_usage_errors_exit_2(arguments: list[str]) -> None:
    assert run(*arguments).exit_code == 2


def test_bench_asks_for_the_context_that_it_measures(fake: type[FakeLLM], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def measure(llm: FakeLLM, **options: Any) -> SimpleNamespace:
        asked.update(options)
        return SimpleNamespace(table=lambda: "the table", to_dict=lambda: {"rows": []})

    monkeypatch.setitem(vars(hetero_attn.tools), "bench", SimpleNamespace(run=measure))
    result = run("bench", "some/model", "-p", "64", "-n", "16", "-d", "0,128", "-d", "256", "-r", "5")

    assert (result.exit_code, result.stdout) == (0, "the table\n")
    assert asked == {"prompt_tokens": 64, "gen_tokens": 16, "depths": (0, 128, 256), "repetitions": 5}
    assert fake.made[0].options["max_context"] == 320
    assert json.loads(run("bench", "some/model", "--json").stdout) == {"rows": []}


@pytest.mark.parametrize("command", ["bench", "verify"])
@pytest.mark.parametrize("option", ["--batch", "-np"])
def test_bench_and_verify_plan_for_as_many_sequences_as_they_are_told(
    fake: type[FakeLLM], monkeypatch: pytest.MonkeyPatch, command: str, option: str
) -> None:
    report = SimpleNamespace(table=lambda: "", to_dict=dict, passed=True)
    monkeypatch.setitem(vars(hetero_attn.tools), command, SimpleNamespace(run=lambda *llm, **options: report))

    assert [run(command, "some/model", *wish).exit_code for wish in ((option, "3"), ())] == [0, 0]
    assert [llm.options["max_batch"] for llm in fake.made] == [3, None]


@pytest.mark.parametrize(("passed", "code"), [(True, 0), (False, 5)])
def test_verify_fails_where_the_answers_differ(
    fake: type[FakeLLM], monkeypatch: pytest.MonkeyPatch, passed: bool, code: int
) -> None:
    report = SimpleNamespace(table=lambda: "max error 0", to_dict=lambda: {"passed": passed}, passed=passed)
    monkeypatch.setitem(vars(hetero_attn.tools), "verify", SimpleNamespace(run=lambda llm, prompt: report))

    assert run("verify", "some/model").exit_code == code
    assert "exit 5" in run("verify", "--help").stdout
    assert json.loads(run("verify", "some/model", "--json").stdout) == {"passed": passed}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> HardwareProfile:
    """Puts a machine with a GPU in the place of the measurement."""
    base = HardwareProfile.named("emulated").to_dict() | {"name": "imagined", "source": "measured"}
    imagined = HardwareProfile.from_dict(base)
    monkeypatch.setitem(vars(hetero_attn), "profile_machine", lambda **_: imagined)
    return imagined


def test_profile_prints_rates_with_units(measured: HardwareProfile) -> None:
    result = run("profile")
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]

    assert (result.exit_code, lines[0]) == (0, "imagined (measured)")
    assert f"copy to the GPU {measured.h2d_bytes_per_s / 1e9:.1f} GB/s" in lines


def test_profile_without_a_gpu_has_no_gpu_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    profile = HardwareProfile.named("generic-cpu")
    monkeypatch.setitem(vars(hetero_attn), "profile_machine", lambda **_: profile)
    lines = run("profile").stdout.splitlines()

    assert lines[-1] == "no GPU was found: the plan uses the CPU lane only"
    assert not any("GPU" in line for line in lines[:-1])


def test_saved_profile_is_a_machine_to_plan_for(measured: HardwareProfile, tmp_path: Path) -> None:
    file, picture = tmp_path / "machine.json", tmp_path / "machine.png"
    result = run("profile", "--save", str(file), "--plot", str(picture), "--json")
    wishes = ("--device", "emulated", "--gpu-memory", "12MiB", "--no-explain", "--json")
    planned = run("plan", TINY, "--hardware", str(file), *wishes)

    assert HardwareProfile.from_dict(json.loads(result.stdout)) == measured
    assert json.loads(planned.stdout)["predicted"]["hardware"] == "imagined"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_file_that_is_no_profile_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "machine.json").write_text("rates: 3")
    result = run("plan", TINY, "--hardware", str(tmp_path / "machine.json"))

    assert result.exit_code == 2
    assert "hetero-attn profile --save" in " ".join(result.stderr.replace("│", " ").split())


def test_policy_lint_reports_every_problem_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("version: 1\ngpu_memoy: 2GiB\nrules:\n  - match: layers.*\n    gpu: 1.5\n")
    result = run("policy", "lint", str(file))
    machine = json.loads(run("policy", "lint", str(file), "--json").stdout)

    assert result.exit_code == 2
    assert [f"{file}:2:" in result.stderr, f"{file}:5:" in result.stderr] == [True, True]
    assert (machine["valid"], len(machine["problems"])) == (False, 2)


def test_policy_schema_is_json_that_knows_every_key() -> None:
    schema = json.loads(run("policy", "schema").stdout)

    assert {"objective", "gpu_memory", "rebalance", "shape", "rules"} <= set(schema["properties"])


def test_policy_show_prints_what_lint_accepts(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("gpu_memory: 2GiB\nrules:\n  - match: layers.*.qkv\n    gpu: 0.5\n    cpu: 0.5\n")
    shown = run("policy", "show", str(file))
    (tmp_path / "shown.yaml").write_text(shown.stdout)

    assert shown.exit_code == 0
    assert run("policy", "lint", str(tmp_path / "shown.yaml")).exit_code == 0
    assert run("policy", "diff", str(file), str(tmp_path / "shown.yaml")).exit_code == 0


def test_policy_diff_names_what_differs(tmp_path: Path) -> None:
    for name, size in (("left", "2GiB"), ("right", "3GiB")):
        (tmp_path / f"{name}.yaml").write_text(f"gpu_memory: {size}\n")
    result = run("policy", "diff", str(tmp_path / "left.yaml"), str(tmp_path / "right.yaml"))

    assert result.exit_code == 1
    assert "gpu_memory" in result.stdout


def test_missing_policy_is_one_message_and_exit_2() -> None:
    result = run("policy", "show", "no_such_policy")

    assert result.exit_code == 2
    assert result.stderr.startswith("error: unknown policy 'no_such_policy'")


def test_doctor_is_ready_here_and_says_so_twice() -> None:
    table, machine = run("doctor"), json.loads(run("doctor", "--json").stdout)

    assert (table.exit_code, machine["usable"]) == (0, True)
    assert "verdict: ready" in table.stdout
    assert set(machine["sections"]) == {"versions", "cpu", "memory", "gpu", "settings", "caches", "threads"}


def test_doctor_says_what_to_do_about_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "REQUIRED", ("a-package-that-nobody-wrote",))
    result = run("doctor")

    assert result.exit_code == 5
    assert "verdict: not ready, 1 problem(s)" in result.stdout
    assert "pip install a-package-that-nobody-wrote" in result.stdout


def test_doctor_reports_a_gpu_with_half_of_its_link(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = SimpleNamespace(
        NVMLError=RuntimeError,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: 1,
        nvmlSystemGetDriverVersion=lambda: "600.1",
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetName=lambda handle: "Imagined GPU",
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(free=6 * 2**30, total=8 * 2**30),
        nvmlDeviceGetMaxPcieLinkGeneration=lambda handle: 4,
        nvmlDeviceGetCurrPcieLinkWidth=lambda handle: 8,
        nvmlDeviceGetMaxPcieLinkWidth=lambda handle: 16,
    )
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    card, torch_build = doctor.gpus()

    assert card.value == "Imagined GPU, 6.0 GiB free of 8.0 GiB, driver 600.1, PCIe 4.0 x8"
    assert (card.verdict, "x8 of x16" in card.advice) == ("note", True)
    assert torch_build.name == "torch"


def machine_with(root: Path, files: dict[str, str]) -> Path:
    """Lay out files of /proc and /sys below `root`."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_limits_of_cgroup_version_2_count_from_the_group_and_its_parents(tmp_path: Path) -> None:
    root = machine_with(
        tmp_path,
        {
            "proc/self/cgroup": "0::/pod/container\n",
            "sys/fs/cgroup/pod/container/memory.max": "max\n",
            "sys/fs/cgroup/pod/memory.max": "4294967296\n",
            "sys/fs/cgroup/pod/container/cpu.max": "150000 100000\n",
        },
    )

    assert (memory_limit_bytes(root), cpu_quota(root)) == (4 * 2**30, 1.5)


def test_limits_of_cgroup_version_1_ignore_the_number_for_none(tmp_path: Path) -> None:
    root = machine_with(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/job\n2:cpu,cpuacct:/job\n1:name=systemd:/job\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "1073741824\n",
            "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us": "100000\n",
        },
    )

    assert (memory_limit_bytes(root), cpu_quota(root)) == (2**30, None)


def test_doctor_reads_limits_and_huge_pages_of_the_machine(tmp_path: Path) -> None:
    root = machine_with(
        tmp_path,
        {
            "proc/self/cgroup": "0::/\n",
            "proc/cpuinfo": "processor : 0\nmodel name : Imagined CPU\n",
            "sys/fs/cgroup/memory.max": str(2**29),
            "sys/fs/cgroup/cpu.max": "50000 100000",
            "sys/kernel/mm/transparent_hugepage/enabled": "always madvise [never]",
        },
    )
    notes = {item.name: item for item in doctor.examine(root).findings if item.verdict == "note"}

    assert {"cgroup limit", "cgroup quota", "transparent huge pages"} <= set(notes)
    assert notes["cgroup limit"].value == "0.5 GiB"
    assert doctor.examine(tmp_path / "nothing").usable


def start(*arguments: str) -> subprocess.Popen[str]:
    """Start the command in a process of its own, with pipes for everything."""
    command = [sys.executable, "-m", "hetero_attn", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def test_plan_as_yaml_is_a_policy_that_gives_the_plan_again(tmp_path: Path) -> None:
    wishes = ("plan", TINY, "--device", "emulated", "--gpu-memory", "12MiB", "--no-explain")
    first = json.loads(run(*wishes, "--yaml", str(tmp_path / "plan.yaml"), "--json").stdout)
    again = json.loads(run(*wishes, "--policy", str(tmp_path / "plan.yaml"), "--json").stdout)

    assert first["linears"] == again["linears"]
    assert first["kv"] == again["kv"]
    assert run("plan", TINY, "--device", "cpu", "--yaml", "-").stdout.startswith("# The plan of tiny")


@pytest.mark.parametrize(("ending", "first_bytes"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_plan_is_drawn_into_the_format_of_the_file(tmp_path: Path, ending: str, first_bytes: bytes) -> None:
    file = tmp_path / f"plan.{ending}"
    wishes = ("--device", "emulated", "--gpu-memory", "12MiB", "--context", "256", "--no-explain")
    result = run("plan", TINY, *wishes, "--plot", str(file), "--plot-points", "2")

    assert result.exit_code == 0
    assert "layers.0" in result.stdout
    assert file.read_bytes().startswith(first_bytes)


def test_explanation_says_what_limits_and_what_would_help() -> None:
    wishes = ("plan", TINY, "--device", "emulated", "--gpu-memory", "12MiB", "--context", "256")
    text, machine = run(*wishes).stdout, json.loads(run(*wishes, "--json").stdout)

    assert "Decoding is bound by" in text
    assert "1 GiB more GPU memory" in text
    assert {"linears", "predicted", "bottleneck", "gains", "alternatives"} <= set(machine)
    assert "Decoding is bound by" not in run(*wishes, "--no-explain").stdout


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_speed_over_gpu_memory_and_context_is_drawn(tmp_path: Path, device: str) -> None:
    file = tmp_path / "curve.png"
    wishes = ("--device", "emulated", "--gpu-memory", "12MiB") if device == "emulated" else ("--device", "cpu")
    few = ("--context", "256", "--no-explain", "--plot-points", "3")
    result = run("plan", TINY, *wishes, *few, "--plot", str(file))

    assert result.exit_code == 0
    assert file.read_bytes().startswith(b"\x89PNG")


def test_plot_into_an_unknown_format_is_a_usage_error(tmp_path: Path) -> None:
    assert run("plan", TINY, "--device", "cpu", "--plot", str(tmp_path / "plan.docx")).exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (("plan", TINY, "--dtype", "q5"), 3, "q5"),
        (("plan", TINY, "--device", "gpu"), 3, "gpu"),
        (("plan", TINY, "--gpu-memory", "lots", "--device", "emulated"), 2, "lots"),
        (("plan", TINY, "--gpu-memory", "1KiB", "--device", "emulated"), 4, "gpu_memory"),
        (("plan", TINY, "--policy", "no_such_policy"), 2, "no_such_policy"),
        (("plan", TINY, "--hardware", "no_such_machine"), 2, "no_such_machine"),
        (("plan", TINY, "--context", "4000000"), 3, "4000000"),
        (("plan", str(ROOT / "no" / "such" / "folder")), 3, "no such directory"),
        (("plan", str(ROOT / "tests")), 3, "config.json"),
        (("generate", TINY, "-p", "word " * 90, "--device", "cpu", "--context", "64"), 2, "holds 64"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else str(value),
)
def test_bad_wishes_are_one_message_and_a_code(arguments: tuple[str, ...], code: int, word: str) -> None:
    result = run(*arguments)

    # On a machine whose kernel cache is empty, that is said before.
    said = [line for line in result.stderr.splitlines() if not line.startswith("compiling the CPU kernel")]

    assert (result.exit_code, result.stdout) == (code, "")
    assert said[0].startswith("error: ")
    assert word in result.stderr


def test_generate_runs_the_shipped_model() -> None:
    result = run("generate", TINY, "-p", "A list is", "-n", "12", "--context", "256", "--device", "cpu", "--json")
    answer = json.loads(result.stdout)

    assert (answer["finish_reason"], len(answer["token_ids"])) == ("length", 12)
    assert answer["metrics"]["generated_tokens"] == 12


def test_a_hundred_problems_are_not_a_hundred_lines() -> None:
    result = run("plan", TINY, "--policy", "stream_only", "--device", "cpu")

    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == MOST_LINES + 1
    assert result.stderr.rstrip().endswith("more problems")


def test_verify_passes_on_a_split_model() -> None:
    result = run("verify", TINY, "--device", "emulated", "--gpu-memory", "12MiB", "--context", "256", "--json")

    assert result.exit_code == 0
    assert json.loads(result.stdout)["passed"] is True


def test_verify_takes_a_text_file(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("A list holds numbers. " * 3, encoding="utf-8")
    result = run("verify", TINY, "--file", str(text), "--device", "cpu", "--context", "256", "--json")

    assert (result.exit_code, json.loads(result.stdout)["passed"]) == (0, True)

    text.write_bytes(b"\xff\xfe")
    result = run("verify", TINY, "--file", str(text))

    assert result.exit_code == 2 and "UTF-8" in result.stderr
    assert run("verify", TINY, "--file", str(tmp_path / "absent")).exit_code == 2


def test_bench_has_a_row_for_each_phase_and_depth() -> None:
    result = run("bench", TINY, "--device", "cpu", "-p", "16", "-n", "4", "-d", "0,32", "-r", "1", "--json")
    names = [row["name"] for row in json.loads(result.stdout)["rows"]]

    assert names == ["pp16", "tg4", "pp16 @ d32", "tg4 @ d32"]


@pytest.mark.parametrize("device", [["cpu"], ["emulated", "--gpu-memory", "8960KiB"]])
def test_bench_writes_a_trace_whatever_the_sizes(tmp_path: Path, device: list[str]) -> None:
    """The trace needs a few tokens more than the rows: with the context of the rows it failed after measuring."""
    trace = tmp_path / "new" / "t.json"
    result = run("bench", TINY, "-p", "64", "-n", "4", "-r", "1", "--trace", str(trace), "--device", *device)

    assert result.exit_code == 0, result.stderr
    assert "pp64" in result.stdout
    assert any("layers.3.qkv" in event["name"] for event in json.loads(trace.read_text())["traceEvents"])


def test_outputs_that_cannot_be_written_are_refused_before_the_work(
    fake: type[FakeLLM], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """They were found out after it, and what was measured was lost."""
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setattr(hetero_attn, "profile_machine", lambda **_: pytest.fail("the machine was measured"))

    for command in (
        ["bench", "m", "--trace"],
        ["profile", "--save"],
        ["profile", "--plot"],
        ["plan", "m", "--plot"],
        ["plan", "m", "--yaml"],
    ):
        result = run(*command, str(blocked / "out.json"))

        assert (result.exit_code, fake.made) == (2, []), command
        assert "cannot write" in result.stderr
    assert not (tmp_path / "out.json").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
def test_a_result_is_printed_before_a_file_that_turns_out_to_be_full(measured: HardwareProfile) -> None:
    """Minutes of measuring were lost with the trace, the copy or the picture that had no room."""
    small = ["--device", "cpu", "--context", "64", "--threads", "1"]
    for command, shown in (
        (["bench", TINY, *small, "-p", "8", "-n", "2", "-r", "1", "--trace"], "pp8"),
        (["profile", "--save"], "GB/s"),
        (["profile", "--plot"], "GB/s"),
        (["plan", TINY, "--device", "cpu", "--no-explain", "--plot"], "speed: about"),
        (["plan", TINY, "--device", "cpu", "--no-explain", "--yaml"], "speed: about"),
    ):
        result = run(*command, "/dev/full")

        assert result.exit_code == 2 and shown in result.stdout, (command, result.stdout)
        assert "No space left on device" in " ".join(result.stderr.replace("│", "").split()), command


def test_bench_says_what_context_it_needs(fake: type[FakeLLM], tmp_path: Path) -> None:
    result = run("bench", "m", "-p", "64", "-n", "4", "--trace", str(tmp_path / "t.json"), "--context", "65")

    assert (result.exit_code, fake.made) == (2, [])
    assert "68" in result.stderr and "--context" in result.stderr


def test_ctrl_c_ends_a_generation_with_130_and_no_traceback() -> None:
    with start("generate", TINY, "-p", "A list is", "-n", "2000", "--ignore-eos", "--device", "cpu") as process:
        first = process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()

    assert (len(first), process.returncode) == (1, 130)
    assert "Traceback" not in errors


def settled(seen: list[str]) -> int:
    """How many characters have come, once no more do."""
    count = -1
    while count != len(seen):
        count = len(seen)
        time.sleep(0.5)
    return count


def test_ctrl_c_ends_an_answer_of_the_chat_and_the_next_one_comes() -> None:
    # So hot that every token is as likely as another: an answer goes on until somebody stops it.
    with start("chat", TINY, "-n", "1500", "--temperature", "50", "--top-p", "1", "--device", "cpu") as process:
        seen: list[str] = []
        reader = threading.Thread(target=lambda: seen.extend(iter(lambda: process.stdout.read(1), "")))
        reader.start()
        for question in ("What is a list?", "What is a dictionary?"):
            before = settled(seen)
            process.stdin.write(question + "\n")
            process.stdin.flush()
            while len(seen) == before:
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
            while "[interrupted]" not in (line := process.stderr.readline()):
                assert line, "the chat ended"
        process.stdin.write("/exit\n")
        process.stdin.close()
        errors = process.stderr.read()
        reader.join()
        process.wait()

    assert process.returncode == 0
    assert "Traceback" not in errors
    assert "tokens/s" not in errors, "an answer reached its end, so nothing was interrupted"


@pytest.mark.parametrize(
    "arguments", [["--device", "cpu"], ["--device", "emulated", "--gpu-memory", "9MiB", "--context", "256"]]
)
def test_a_plan_opens_with_four_lines_and_fits_eighty_columns(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    """It drew 100 columns, whatever the terminal had, and rows broke."""
    monkeypatch.setenv("COLUMNS", "80")
    lines = run("plan", TINY, *arguments).stdout.splitlines()

    assert [line.partition(":")[0] for line in lines[:4]] == ["fits", "speed", "where", "to change it"]
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines)
