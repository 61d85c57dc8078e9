"""One run of `gpu_offload.py` in its process: what it writes, what it knows, and its parts one after another."""

import gc
import json
import os
import platform
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

RESULTS_FILE = "results.jsonl"
RUNNING_FILE = "running.json"  # names the part that is under way and says how long it may take
START = "start"
BROKEN = 17  # exit code: the GPU answers everything with an error that an earlier part left
LONGEST = 2.5  # times the seconds that a part states it may take before it is ended
LEAST_S = 30.0  # a first use compiles


@dataclass(frozen=True, slots=True)
class Run:
    """What a part is told. device: cuda[:N] or emulated. quick: toy shapes and few repetitions. deadline: by
    `time.time`; no part starts that would end after it. only, skip: beginnings of the names of the parts to run, empty
    for all, and to leave out. idle_bytes: of the GPU in use before this process used it, what its driver keeps for
    itself included."""

    out: Path
    work_dir: Path
    device: str
    quick: bool
    deadline: float
    llama_bench: Path | None
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    idle_bytes: int = 0

    @property
    def has_gpu(self) -> bool:
        """Whether there is a GPU, whose figures count."""
        return self.device.startswith("cuda")

    @property
    def time_left_s(self) -> float:
        """Seconds until everything must have ended."""
        return self.deadline - time.time()

    def wants(self, name: str) -> bool:
        """Whether a part is asked for."""
        return (not self.only or name.startswith(self.only)) and not (self.skip and name.startswith(self.skip))

    def done(self) -> set[str]:
        """Names of the parts that ran in any run and did not fail, or that ran at all since the last start."""
        path = self.out / RESULTS_FILE
        done: set[str] = set()
        failed: set[str] = set()
        for line in map(json.loads, path.read_text().splitlines() if path.exists() else ()):
            if line["name"] == START:
                failed.clear()
            elif "left_s" not in line:
                (failed if "error" in line else done).add(line["name"])
        return done | failed

    @property
    def used_bytes(self) -> int:
        """GPU memory that this process has now by the driver's count, its context included; 0 without a GPU."""
        return gpu_used_bytes(self.device) - self.idle_bytes

    def write(self, name: str, **values: Any) -> None:
        """Append one result and show it."""
        write_result(self.out, name, **values)


@dataclass(frozen=True, slots=True)
class Part:
    """One measurement. seconds: what it takes on an H100 machine; it is skipped where less is left."""

    name: str
    seconds: float
    measure: Callable[[Run], dict[str, Any]]

    @property
    def limit_s(self) -> float:
        """Seconds after which it is ended."""
        return max(LEAST_S, LONGEST * self.seconds)


def gpu_used_bytes(device: str) -> int:
    """GPU memory in use by anybody; asked of NVML by index, which makes no CUDA context. 0 where nothing answers."""
    with suppress(Exception):  # without nvidia-ml-py, or in a container that hides NVML: each has an error of its own
        return torch.cuda.device_memory_used(int(device.partition(":")[2] or 0)) if device.startswith("cuda") else 0
    return 0


def write_result(out: Path, name: str, **values: Any) -> None:
    """Append one line to the results in `out`, and show its beginning."""
    line = json.dumps({"name": name, "at": datetime.now(UTC).isoformat(timespec="seconds"), **values})
    with (out / RESULTS_FILE).open("a") as file:
        file.write(line + "\n")
    print(line if len(line) < 600 else line[:600] + " ...", flush=True)


def run_parts(run: Run) -> int:
    """Every wanted part that is not done yet and has the time it states; a failure is a result like any other."""
    from .parts import parts

    done = run.done()
    run.write("machine", **machine(run))
    for part in parts(run):
        if part.name in done or not run.wants(part.name):
            continue
        if part.seconds > run.time_left_s:
            left = round(max(0.0, run.time_left_s), 1)
            run.write(part.name, skipped=f"takes {part.seconds:g} s, and {left:g} s are left", left_s=left)
            continue
        run_part(run, part)
        if is_broken(run):
            return BROKEN
    run.write("end", reason="no part is left")
    return 0


def run_part(run: Run, part: Part) -> None:
    """One part, its name in RUNNING_FILE meanwhile; memory that it left is given back."""
    started, running = time.monotonic(), run.out / RUNNING_FILE
    running.write_text(json.dumps({"name": part.name, "limit_s": part.limit_s}))
    before = clocks(run)
    try:
        values = part.measure(run)
    except Exception as error:  # whatever it is, the next part may still work
        values = {"error": f"{type(error).__name__}: {error}"[:1500], "trace": traceback.format_exc()[-4000:]}
    gpu = {"clocks": [before, clocks(run)]} if run.has_gpu else {}
    run.write(part.name, took_s=round(time.monotonic() - started, 1), planned_s=part.seconds, **values, **gpu)
    running.unlink()
    gc.collect()
    if run.has_gpu:
        with suppress(RuntimeError):  # a GPU that met a fault answers everything with it
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(1.0)  # a device that was not closed leaves its limit behind


def is_broken(run: Run) -> bool:
    """Whether the GPU answers with the error of an earlier call, as it does after a fault until the process ends."""
    if not run.has_gpu:
        return False
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device=run.device)
    except RuntimeError:
        return True
    return False


def clocks(run: Run) -> dict[str, int]:
    """MHz, degrees and milliwatts of the GPU now; what NVML does not tell is left out."""
    asked = {"mhz": torch.cuda.clock_rate, "celsius": torch.cuda.temperature, "mw": torch.cuda.power_draw}
    found: dict[str, int] = {}
    for name, ask in asked.items() if run.has_gpu else ():
        with suppress(Exception):  # NVML's own types of error, or a missing nvidia-ml-py
            found[name] = int(ask())
    return found


def machine(run: Run) -> dict[str, Any]:
    """What the figures were measured on."""
    import psutil

    from cpu_kernels.team.topology import physical_cpus
    from placement.machine.fingerprint import cpu_name

    return {
        "gpu": torch.cuda.get_device_name() if run.has_gpu else "none (emulated: no figure counts)",
        "capability": list(torch.cuda.get_device_capability()) if run.has_gpu else None,
        "cpu": f"{len(physical_cpus())} cores of {cpu_name()}",
        "memory_bytes": psutil.virtual_memory().available,
        "disk_bytes": psutil.disk_usage(str(run.work_dir if run.work_dir.exists() else run.out)).free,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "numba": _version("numba"),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "pid": os.getpid(),
    }


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None
