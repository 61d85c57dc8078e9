"""generate, bench and verify against a stand-in for the Python API: each option is seen to arrive, and what is printed where."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import ANY

import pytest

import hetero_attn
import hetero_attn.tools
from hetero_attn.serving.request import Metrics
from tests.support.processes.command import FakeLLM, contents, run


def test_generate_streams_text_to_stdout_and_speed_to_stderr(fake: type[FakeLLM]) -> None:
    result = run("generate", "some/model", "-p", "Tell")

    assert (result.exit_code, result.stdout) == (0, "Once upon a time\n")
    assert result.stderr == "prefill 3 tokens, 6.0 tokens/s; decode 5 tokens, 2.0 tokens/s\n"
    assert fake.made[0].closed


def test_an_answer_of_one_token_has_no_speed_of_decoding(fake: type[FakeLLM], monkeypatch: pytest.MonkeyPatch) -> None:
    """It was told as 0.0 tokens/s."""
    one = Metrics(prompt_tokens=3, generated_tokens=1, prefill_s=0.5, decode_s=0.0)
    monkeypatch.setattr("tests.support.processes.command.METRICS", one)

    assert run("generate", "m", "-p", "Tell").stderr == "prefill 3 tokens, 6.0 tokens/s; decode 1 tokens\n"


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
        "--gguf",
        "Q4_K_M",
        "--tokenizer",
        "another/model",
    )
    (llm,) = fake.made
    ((prompt, params),) = llm.asked

    assert (result.exit_code, llm.model, prompt) == (0, "some/model", "Tell")
    assert callable(llm.options["needs_text"])
    assert llm.options == {
        "needs_text": ANY,
        "speculate": None,
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
        "file": "Q4_K_M",
        "tokenizer": "another/model",
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
    for how in ((), ("--chat",)):
        result = run("generate", "some/model", "-p", "Tell", "--json", *how)
        answer = json.loads(result.stdout)
        assert (result.exit_code, answer["text"], answer["finish_reason"]) == (130, "Once upon a time", "abort")
        assert answer["token_ids"] == [0, 1, 2] and answer["metrics"]["generated_tokens"] == 5


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


def test_bench_asks_for_the_context_that_it_measures(fake: type[FakeLLM], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def measure(llm: FakeLLM, **options: Any) -> SimpleNamespace:
        asked.update(options)
        return SimpleNamespace(table=lambda width: "the table", to_dict=lambda: {"rows": []})

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
    report = SimpleNamespace(table=lambda *width: "", to_dict=dict, passed=True)
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


def test_bench_says_what_context_it_needs(fake: type[FakeLLM], tmp_path: Path) -> None:
    result = run("bench", "m", "-p", "64", "-n", "4", "--trace", str(tmp_path / "t.json"), "--context", "65")

    assert (result.exit_code, fake.made) == (2, [])
    assert "68" in result.stderr and "--context" in result.stderr
