"""The benchmark script of the CPU kernels runs and ends with one JSON line."""

import json
from pathlib import Path

from tests.support.processes.scripts import run_script

SCRIPT = Path(__file__).parents[2] / "examples" / "benchmarks" / "kernels_cpu.py"


def test_quick_run_prints_one_json_line():
    result = run_script(SCRIPT, "--quick", "--json", "--rows", "1,4", "--threads", "1")

    assert result.returncode == 0, result.stderr
    (line,) = result.stdout.splitlines()
    report = json.loads(line)
    measured = {(row["op"], row.get("weight_dtype"), row.get("rows")) for row in report["results"]}
    assert {("linear", name, rows) for name in ("bf16", "q8", "q4") for rows in (1, 4)} <= measured
    assert all(row["ms"] > 0 for row in report["results"]) and report["sweep_gb_per_s"] > 0
