"""One run of `gpu_offload.py` in its process: what it writes, what it knows, and its parts one after another."""

import json
import platform
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

RESULTS_FILE = "results.jsonl"
RUNNING_FILE = "running.json"  # names the part that is under way
START = "start"
BROKEN = 17  # exit code: the GPU answers everything with an error that an earlier part left


@dataclass(frozen=True, slots=True)
class Run:
    """What a part is told. device: cuda[:N] or emulated. quick: toy shapes and few repetitions. deadline: by
    `time.time`; no part starts after it. only: beginnings of the names of the parts to run, empty for all. idle_bytes: of
    the GPU in use before this process used it, what its driver keeps for itself included."""

    out: Path
    work_dir: Path
    device: str
    quick: bool
    deadline: float
    llama_bench: Path | None
    only: tuple[str, ...] = ()
    idle_bytes: int = 0

    @property
    def time_left_s(self) -> float:
        """Seconds until no further part may start."""
        return self.deadline - time.time()

    def wants(self, name: str) -> bool:
        """Whether a part is asked for."""
        return not self.only or name.startswith(self.only)

    def done(self) -> set[str]:
        """Names of the parts that ran in any run and did not fail, or that ran at all since the last start."""
        path = self.out / RESULTS_FILE
        done: set[str] = set()
        failed: set[str] = set()
        for line in map(json.loads, path.read_text().splitlines() if path.exists() else ()):
            if line["name"] == START:
                failed.clear()
            (failed if "error" in line else done).add(line["name"])
        return done | failed

    @property
    def used_bytes(self) -> int:
        """GPU memory that this process has now by the driver's count, its context included; 0 without a GPU."""
        return gpu_used_bytes(self.device) - self.idle_bytes

    def write(self, name: str, **values: Any) -> None:
        """Append one result and show it."""
        write_result(self.out, name, **values)


Part = tuple[str, Callable[[Run], dict[str, Any]]]


def gpu_used_bytes(device: str) -> int:
    """GPU memory in use by anybody; asked of NVML by index, which makes no CUDA context."""
    return torch.cuda.device_memory_used(int(device.partition(":")[2] or 0)) if device.startswith("cuda") else 0


def write_result(out: Path, name: str, **values: Any) -> None:
    """Append one line to the results in `out`, and show its beginning."""
    line = json.dumps({"name": name, "at": datetime.now(UTC).isoformat(timespec="seconds"), **values})
    with (out / RESULTS_FILE).open("a") as file:
        file.write(line + "\n")
    print(line if len(line) < 400 else line[:400] + " ...", flush=True)


def run_parts(run: Run) -> int:
    """Every wanted part that is not done yet and begins in time; a failure is a result like any other."""
    from gpu_parts import parts

    done = run.done()
    run.write("machine", **machine(run))
    for name, measure in parts(run):
        if name in done or not run.wants(name):
            continue
        if run.time_left_s <= 0:
            run.write("end", reason=f"the time was up before {name!r}")
            return 0
        run_part(run, name, measure)
        if is_broken(run):
            return BROKEN
    run.write("end", reason="every part ran")
    return 0


def run_part(run: Run, name: str, measure: Callable[[Run], dict[str, Any]]) -> None:
    """One part, its name in RUNNING_FILE meanwhile."""
    started, running = time.monotonic(), run.out / RUNNING_FILE
    running.write_text(json.dumps({"name": name}))
    try:
        values = measure(run)
    except Exception as error:  # whatever it is, the next part may still work
        values = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()[-4000:]}
    run.write(name, took_s=round(time.monotonic() - started, 1), **values)
    running.unlink()


def is_broken(run: Run) -> bool:
    """Whether the GPU answers with the error of an earlier call, as it does after a fault until the process ends."""
    if not run.device.startswith("cuda"):
        return False
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device=run.device)
    except RuntimeError:
        return True
    return False


def machine(run: Run) -> dict[str, Any]:
    """What the figures were measured on."""
    gpu = torch.cuda.get_device_name() if run.device.startswith("cuda") else "none (emulated: no figure counts)"
    from cpu_kernels.topology import physical_cpus
    from placement.fingerprint import cpu_name

    return {
        "gpu": gpu,
        "cpu": f"{len(physical_cpus())} cores of {cpu_name()}",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }
