"""The benchmark script of the CPU kernels runs and ends with one JSON line."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "examples" / "benchmarks" / "kernels_cpu.py"


def test_quick_run_prints_one_json_line():
    command = [sys.executable, SCRIPT]
    options = ["--quick", "--json", "--rows", "1,4", "--threads", "1"]

    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[2])}
    result = subprocess.run(
        [*command, *options], capture_output=True, text=True, timeout=200, check=True, env=environment
    )

    (line,) = result.stdout.splitlines()
    report = json.loads(line)
    measured = {(row["op"], row.get("weight_dtype"), row.get("rows")) for row in report["results"]}
    assert {("linear", name, rows) for name in ("bf16", "q8", "q4") for rows in (1, 4)} <= measured
    assert all(row["ms"] > 0 for row in report["results"]) and report["sweep_gb_per_s"] > 0
