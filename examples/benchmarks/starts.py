"""How long a user waits before anything happens: help, the first token of a small model, the first start, a profile.

    python examples/benchmarks/starts.py [MODEL] [--repetitions 5] [--first 1] [--parts help start] [--out FILE]

MODEL is a directory or a GGUF file, SmolLM2-135M-Instruct (92 MB, fetched once) where none is given. Every run is a
process of its own, the command as a user types it. What counts is the wall clock from the start of the process to the
first byte that it writes: the help, or the first token; of a profile to its end. Beside it stands the CPU time of the
process and of those that it starts until it ends.

`import torch` alone is the floor of a start and is measured in turns with it: a start cannot be shorter. One run of
each goes before those that count, so that files are in the system's memory, but for first starts and profiles: each
has an empty folder for compiled kernels and for profiles, `profile again` one that has the kernels.

On a machine that does other things wall clock says little: the load before each run is in the result, and a line says
so where any was above half of the CPUs.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from smollm2 import default_folder, smollm2

from placement.machine.fingerprint import cpu_name

OURS = (sys.executable, "-m", "hetero_attn")
PROMPT = "The capital of France is"


class Part(NamedTuple):
    """What is measured. target_s: what is wanted of it, None for a floor; is_first: whether nothing is compiled or
    profiled before; to_the_end: whether it is waited for, not for its first byte."""

    name: str
    command: tuple[str, ...]
    target_s: float | None = None
    is_first: bool = False
    to_the_end: bool = False


def parts(model: str) -> list[Part]:
    """Everything that is measured, in the order in which it is."""
    start = (*OURS, "generate", model, "-p", PROMPT, "-n", "1", "--device", "cpu")
    profile = (*OURS, "profile", "--keep", "--json")
    return [
        Part("help", (*OURS, "--help"), 0.3),
        Part("import torch", (sys.executable, "-c", "import torch"), to_the_end=True),
        Part("start", start, 2.5),
        Part("first start", start, 20.0, is_first=True),
        Part("profile", profile, 60.0, is_first=True, to_the_end=True),
        Part("profile again", profile, 60.0, to_the_end=True),
    ]


def measured(part: Part, cache: Path) -> dict[str, float]:
    """Seconds of one run, wall clock and CPU, and the load of the machine before it. cache: where it keeps kernels and
    profiles."""
    found = {"load": os.getloadavg()[0]}
    began = time.perf_counter()
    environment = os.environ | {"XDG_CACHE_HOME": str(cache)}
    with subprocess.Popen(
        part.command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
    ) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        found["wall_s"] = time.perf_counter() - began
        process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if part.to_the_end:
        found["wall_s"] = time.perf_counter() - began
    if process.returncode:
        raise SystemExit(f"`{' '.join(part.command)}` ended with exit code {process.returncode}")
    return found | {"cpu_s": used.ru_utime + used.ru_stime}


def in_turns(chosen: list[Part], repetitions: int, kept: Path) -> Iterator[tuple[str, dict[str, float]]]:
    """Runs of the parts, one of each after the other, those of a warm-up left out. kept: where kernels and profiles are
    kept from run to run."""
    for part in chosen:
        measured(part, kept)
    for _ in range(repetitions):
        for part in chosen:
            yield part.name, measured(part, kept)


def first_runs(chosen: list[Part], repetitions: int) -> Iterator[tuple[str, dict[str, float]]]:
    """Runs of the parts, each with nothing kept."""
    for _ in range(repetitions):
        for part in chosen:
            with tempfile.TemporaryDirectory(prefix="starts-") as empty:
                yield part.name, measured(part, Path(empty))


def row(part: Part, runs: list[dict[str, float]]) -> dict[str, Any]:
    """Medians of the runs of a part, and the runs."""
    medians = {key: statistics.median(run[key] for run in runs) for key in ("wall_s", "cpu_s", "load")}
    return {"name": part.name, "target_s": part.target_s, **medians, "runs": runs}


def line(row: dict[str, Any]) -> str:
    """A row for people."""
    target = f"{row['target_s']:>8.1f}" if row["target_s"] else f"{'-':>8}"
    walls = [run["wall_s"] for run in row["runs"]]
    spread = f"{min(walls):.2f} to {max(walls):.2f}"
    return f"{row['name']:<16}{target}{row['wall_s']:>9.2f}  {spread:<16}{row['cpu_s']:>7.2f}{row['load']:>6.1f}"


def main() -> None:
    """Measure what was asked for and print a line for it, then all of it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a directory or GGUF file; SmolLM2 where none is given")
    parser.add_argument("--repetitions", type=int, default=5, help="of what starts warm")
    parser.add_argument("--first", type=int, default=1, help="repetitions with nothing compiled, a minute each")
    parser.add_argument("--parts", nargs="+", help="only those whose names are given")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    options = parser.parse_args()
    model = options.model or smollm2(default_folder())
    if model is None:
        raise SystemExit("no model: give a directory or GGUF file")
    chosen = [part for part in parts(str(model)) if not options.parts or part.name in options.parts]
    print("targets: " + ", ".join(f"{part.name} {part.target_s:g} s" for part in chosen if part.target_s), flush=True)
    runs: dict[str, list[dict[str, float]]] = {part.name: [] for part in chosen}
    with tempfile.TemporaryDirectory(prefix="starts-") as kept:
        first, warm = ([part for part in chosen if part.is_first is is_first] for is_first in (True, False))
        for name, run in (*in_turns(warm, options.repetitions, Path(kept)), *first_runs(first, options.first)):
            runs[name].append(run)
    rows = [row(part, runs[part.name]) for part in chosen if runs[part.name]]
    print(f"{'seconds':<16}{'target':>8}{'wall':>9}  {'least to most':<16}{'CPU':>7}{'load':>6}")
    print("\n".join(map(line, rows)))
    cpus = len(os.sched_getaffinity(0))
    if any(run["load"] > cpus / 2 for each in rows for run in each["runs"]):
        print("The machine did other things meanwhile: wall clock is no result.")
    machine = {"cpu": cpu_name(), "usable_cpus": cpus, "system": platform.platform(), "python": sys.version.split()[0]}
    result = json.dumps({"machine": machine, "model": Path(model).name, "rows": rows})
    if options.out:
        options.out.write_text(result + "\n")
    print(result)


if __name__ == "__main__":
    main()
