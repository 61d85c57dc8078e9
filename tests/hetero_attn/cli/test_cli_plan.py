"""`plan` of the shipped checkpoint: table, explanation, pictures, and a policy that gives the plan again."""

import json
from pathlib import Path

import pytest

from tests.support.processes.command import TINY, run


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


@pytest.mark.parametrize("device", ["cpu", pytest.param("emulated", marks=pytest.mark.matrix)])
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
