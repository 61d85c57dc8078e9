"""`policy`: lint, show, diff and schema."""

import json
from pathlib import Path

from tests.support.processes.command import run


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


def test_keys_of_a_policy_are_called_as_the_file_has_to_have_them(tmp_path: Path) -> None:
    """Names of arguments are said as options, but `--gpu-memory` is no key."""
    file = tmp_path / "own.yaml"
    file.write_text("gpu_memroy: 8GiB\n")
    result = run("policy", "show", str(file))

    assert result.exit_code == 2 and "--" not in result.stderr
    assert "gpu_memroy: unknown key; did you mean 'gpu_memory'?" in result.stderr
