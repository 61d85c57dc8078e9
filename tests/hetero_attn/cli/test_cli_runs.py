"""Commands that run the shipped checkpoint: generate, verify and bench as they are, and Ctrl-C."""

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from hetero_attn.serving.request import Piece
from hetero_attn.serving.stream import Stream
from tests.support.processes.command import ROOT, TINY, run
from tests.support.processes.quick_python import quick_python


def start(*arguments: str) -> subprocess.Popen[str]:
    """Start the command in a process of its own, with pipes for everything."""
    command = quick_python("-m", "hetero_attn", *arguments)
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def flowing(boxed: str) -> str:
    """Help or an error without the lines around it and between its words."""
    return " ".join(boxed.replace("\u2502", " ").split())


def test_generate_runs_the_shipped_model() -> None:
    result = run("generate", TINY, "-p", "A list is", "-n", "12", "--context", "256", "--device", "cpu", "--json")
    answer = json.loads(result.stdout)

    assert (answer["finish_reason"], len(answer["token_ids"])) == ("length", 12)
    assert answer["metrics"]["generated_tokens"] == 12


def test_a_seed_of_minus_one_is_a_fresh_one() -> None:
    """It was refused, where SamplingParams and llama.cpp take it."""
    drawn = (
        "generate",
        TINY,
        "-p",
        "A",
        "-n",
        "8",
        "--temperature",
        "9",
        "--context",
        "64",
        "--device",
        "cpu",
        "--json",
    )
    results = [run(*drawn, "--seed", "-1") for _ in range(2)]
    first, second = (json.loads(result.stdout)["token_ids"] for result in results)

    assert [result.exit_code for result in results] == [0, 0] and first != second


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


def test_bench_says_that_it_measures_one_sequence_of_a_batch() -> None:
    table = run("bench", TINY, "--device", "cpu", "-p", "0", "-n", "2", "-r", "1", "--batch", "3").stdout

    assert "one sequence was measured, with the plan for 3 together" in table


def test_bench_measures_drafts_beside_plain_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    few = ("bench", TINY, "--device", "cpu", "-p", "0", "-n", "8", "-r", "1")
    result = run(*few, "--speculate", "oracle:1", "--speculate", "ngram")

    assert result.exit_code == 0, result.stderr
    assert result.stdout.index("ceiling of the gain") < result.stdout.index("oracle:1")
    assert max(map(len, result.stdout.splitlines())) <= 80 and "\u2026" not in result.stdout
    for wrong in (["oracle:2"], ["oracle:x"], ["off"], ["banana"], ["a/b", "c/d"]):
        wishes = [word for wish in wrong for word in ("--speculate", wish)]
        refused = run(*few, *wishes)
        assert refused.exit_code == 2
        assert wrong[0] not in ("off", "a/b") or "EAGLE-3 head" in flowing(refused.stderr)
    assert run(*few, "-n", "1", "--speculate", "ngram").exit_code == 2
    simulated = run(*few, "--simulate", "rtx4090-ddr5", "--speculate", "ngram")
    assert simulated.exit_code == 2 and "--simulate" in simulated.stderr, "it was ignored"


@pytest.mark.parametrize("command", ["generate", "chat", "serve", "plan", "bench"])
def test_each_help_says_all_that_speculate_takes(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    told = flowing(run(command, "--help").stdout)

    assert all(word in told for word in ("--speculate", "ngram", "auto", "small model", "EAGLE-3"))


@pytest.mark.parametrize("device", [["cpu"], ["emulated", "--gpu-memory", "8960KiB"]])
def test_bench_writes_a_trace_whatever_the_sizes(tmp_path: Path, device: list[str]) -> None:
    """The trace needs a few tokens more than the rows: with the context of the rows it failed after measuring."""
    trace = tmp_path / "new" / "t.json"
    result = run("bench", TINY, "-p", "64", "-n", "4", "-r", "1", "--trace", str(trace), "--device", *device)

    assert result.exit_code == 0, result.stderr
    assert "pp64" in result.stdout
    assert any("layers.3.qkv" in event["name"] for event in json.loads(trace.read_text())["traceEvents"])


def test_bench_writes_no_trace_into_a_file_called_minus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("bench", TINY, "-p", "8", "-n", "2", "-r", "1", "--device", "cpu", "--trace", "-")

    assert result.exit_code == 2 and "name a file" in flowing(result.stderr)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "sizes",
    [["-p", "5000"], ["--depth", "0,9999"], ["-n", "2048", "--simulate", "rtx4090-ddr5"], ["-p", "99999999"]],
)
def test_bench_names_its_own_sizes_where_the_model_has_no_such_context(sizes: list[str]) -> None:
    """It spoke of --context, which nobody had given."""
    result = run("bench", TINY, *sizes)
    limit = "more than 33554432" if "99999999" in sizes else "2048 positions"

    assert result.exit_code == 2
    assert limit in flowing(result.stderr) and "--depth" in result.stderr and "--context" not in result.stderr


def test_ctrl_c_ends_a_generation_with_130_and_no_traceback() -> None:
    with start("generate", TINY, "-p", "A list is", "-n", "2000", "--ignore-eos", "--device", "cpu") as process:
        first = process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()

    assert (len(first), process.returncode) == (1, 130)
    assert "Traceback" not in errors


INTERRUPTED_IMPORT = """
import sys

class Interrupted:
    def find_spec(self, name, path=None, target=None):
        if name == "numpy":
            sys.meta_path.remove(self)
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupted())
from hetero_attn.cli import main
main()
"""


def test_ctrl_c_while_numpy_is_imported_ends_the_command() -> None:
    """Torch imports it in C code, which took the interruption for a numpy that is missing: the model was loaded, and a
    chat waited for its first question."""
    command = [sys.executable, "-c", INTERRUPTED_IMPORT, "chat", TINY, "--device", "cpu"]
    ended = subprocess.run(command, cwd=ROOT, input="", capture_output=True, text=True, check=False)

    assert (ended.returncode, ended.stderr) == (130, "interrupted\n")


@pytest.mark.parametrize("drafts", [(), ("--speculate", "ngram")])
def test_ctrl_c_leaves_the_json_of_what_was_generated(monkeypatch: pytest.MonkeyPatch, drafts: tuple[str, ...]) -> None:
    """It was lost: nothing came on stdout."""
    taken, take = [], Stream._take

    def interrupted(stream: Stream) -> Piece | None:
        taken.append(stream)
        if len(taken) == 6:
            signal.raise_signal(signal.SIGINT)
        return take(stream)

    monkeypatch.setattr(Stream, "_take", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    command = ("generate", TINY, "-p", "A list is", "-n", "200", "--ignore-eos", "--device", "cpu", "--context", "256")
    try:
        result = run(*command, "--json", *drafts)
    finally:
        signal.signal(signal.SIGINT, before)
    answer = json.loads(result.stdout)

    assert (result.exit_code, answer["finish_reason"]) == (130, "abort")
    assert answer["text"] and 0 < len(answer["token_ids"]) == answer["metrics"]["generated_tokens"] < 200


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
