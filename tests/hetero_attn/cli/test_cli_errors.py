"""What goes wrong with a command: one message, in words of the command line, and the exit code that is listed for it."""

from pathlib import Path

import pytest

import hetero_attn
import hetero_attn.tools
from hetero_attn.cli.errors import exit_code
from hetero_attn.errors import MOST_LINES, CheckpointError, MemoryBudgetError, PromptError
from placement import BudgetError, HardwareProfile
from placement.plan.units import parse_bytes
from tests.support.processes.command import ROOT, TINY, FakeLLM, run


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


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (("plan", TINY, "--dtype", "q5"), 2, "q5"),
        (("plan", TINY, "--device", "gpu"), 2, "gpu"),
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

    # Where no kernels are kept, or a profile of another version is, that is said before; so is a busy machine then.
    before = ("compiling the CPU kernel", "warning: the kept profile", "warning: other programs used")
    said = [line for line in result.stderr.splitlines() if not line.startswith(before)]

    assert (result.exit_code, result.stdout) == (code, "")
    assert said[0].startswith("error: ")
    assert word in result.stderr


def test_a_hundred_problems_are_not_a_hundred_lines(tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    rules = "".join(f"  - {{match: layers.{100 + n}.qkv, gpu: 0}}\n" for n in range(100))
    policy.write_text(f"version: 1\nrules:\n{rules}")
    result = run("plan", TINY, "--policy", str(policy), "--device", "cpu")

    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == MOST_LINES + 1
    assert result.stderr.rstrip().endswith("more problems")


def test_what_one_rule_asks_of_many_shards_in_vain_is_a_line() -> None:
    result = run("plan", TINY, "--policy", "stream_only", "--device", "cpu")

    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 2  # of linears, and of the cache
    assert "layers.0.qkv and 16 more" in result.stderr


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


UNKNOWN = {"--dtype": "q44", "--kv-dtype": "q88", "--device": "gpu", "--policy": "gpu_onyl"}
COMMANDS = {"plan": UNKNOWN | {"--hardware": "rtx4090"}, "generate": UNKNOWN | {"--speculate": "banana"}}


@pytest.mark.parametrize(
    ("command", "option", "value"), [(name, *given) for name, options in COMMANDS.items() for given in options.items()]
)
def test_a_choice_that_does_not_exist_is_a_usage_error(command: str, option: str, value: str) -> None:
    """Some were answered as if the checkpoint were at fault, with 3."""
    result = run(command, TINY, *(("-p", "a") if command == "generate" else ()), option, value)

    assert (result.exit_code, value in result.stderr) == (2, True), result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--gpu-memory", "8GiB", "--device", "cpu"), "gpu_memory 8.00 GiB has no effect"),
        (("--threads", "64", "--hardware", "rtx4090-ddr5"), "64 CPU threads are more than the 16 cores"),
        (("--dtype", "fp16", "--device", "cpu"), "dtype fp16 keeps float16 weights, and this model's files hold none"),
    ],
)
def test_wishes_without_effect_are_warned_of(arguments: tuple[str, ...], words: str) -> None:
    """They were taken without a word."""
    result = run("plan", TINY, "--no-explain", *arguments)

    assert result.exit_code == 0 and words in result.stderr, result.stderr
    assert run("plan", TINY, "--no-explain", "--threads", "2", "--hardware", "rtx4090-ddr5").stderr == ""


@pytest.mark.parametrize(
    ("option", "value", "meant"),
    [("--device", "gpu", "cuda"), ("--dtype", "bfloat16", "bf16"), ("--dtype", "Q8_0", "q8")],
)
def test_what_others_call_a_choice_is_understood(option: str, value: str, meant: str) -> None:
    """`gpu` was taken for a misspelt `cpu`."""
    assert f"did you mean '{meant}'?" in " ".join(run("plan", TINY, option, value).stderr.split())


def test_a_budget_without_its_unit_is_explained() -> None:
    result = run("plan", TINY, "--device", "emulated", "--gpu-memory", "8", "--no-explain")

    assert result.exit_code == 4 and "a number without a unit is bytes" in result.stdout + result.stderr
    assert "less than a byte" in run("plan", TINY, "--gpu-memory", "0.9").stderr
