"""What each change to how work is queued does to the step of an 8B model on an H100 that is not there: one table.

    python examples/benchmarks/simulated/critical_paths.py

Plans are those of recorded runs, rates those of their machines. Every row takes one change back in the code that is
simulated, so that before and after differ in nothing else.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from hetero_attn.models import block
from hetero_attn.tools.timeline import recording_driver
from hetero_attn.tools.timeline.recording import CPU, GPU, MAIN
from hetero_attn.tools.timeline.recording_driver import RecordingDriver
from hetero_attn.tools.timeline.simulate import Simulation, Timeline
from placement.machine.hardware import HardwareProfile
from placement.plan.plan import Means, build_plan
from tests.support.gpu.older_queueing import request_behind_wait, rounded_apart
from tests.support.planning.recorded_runs import first_run, llama_8b, llama_8b_config, recorded_runs

CONTEXT = 990


@contextmanager
def late_requests() -> Iterator[None]:
    """Requests stand behind waits."""
    with mock.patch.object(block, "linear_add", request_behind_wait):
        yield


@contextmanager
def copied_then_added() -> Iterator[None]:
    """What the CPU lane computed is copied to the GPU, then added."""
    with mock.patch.object(RecordingDriver, "reaches", lambda *arguments: False):
        yield


@contextmanager
def rounded_alone() -> Iterator[None]:
    """What a linear multiplies is rounded by a launch of its own."""
    with mock.patch.object(recording_driver, "RecordedOps", rounded_apart(recording_driver.RecordedOps)):
        yield


CHANGES: dict[str, Callable[[], Any]] = {
    "requests right behind the copy that feeds them": late_requests,
    "added by the kernel that fetches": copied_then_added,
    "rounded by the kernels of norm and activation": rounded_alone,
}


def simulated() -> Timeline:
    """A decode step of the older run's plan."""
    plan, machine, _ = first_run()
    return Simulation(llama_8b_config(), plan, machine).decode(CONTEXT)


def prompt(chunk: int) -> Timeline:
    """A prompt of 4096 tokens by the newer plan at 75 % of the weights, queued as the catalogue's H100 machine does."""
    run, shown = recorded_runs(parts=("after",))[0], HardwareProfile.named("h100-server")
    machine = replace(
        run.profile,
        gpu_layer_overhead_s=shown.gpu_layer_overhead_s,
        gpu_product_overhead_s=shown.gpu_product_overhead_s,
    )
    plan = build_plan(
        llama_8b(chunk), run.plan.linears, run.plan.kv, Means(device="cuda", gpu_memory_bytes=5 << 30, staging_slots=4)
    )
    return Simulation(llama_8b_config(), plan, machine).prompt(4096)


def row(name: str, before: Timeline, after: Timeline) -> str:
    """A line of the table: milliseconds, and those of the critical path on each lane."""
    cells = []
    for timeline in (before, after):
        lanes = {lane: sum(taken for each, _, taken in timeline.path if each == lane) for lane in (CPU, GPU, MAIN)}
        parts = " / ".join(f"{1e3 * seconds:.2f}" for seconds in lanes.values())
        cells.append(f"{1e3 * timeline.seconds:.2f} | {parts}")
    return f"| {name} | {' | '.join(cells)} |"


def rows() -> Iterator[tuple[str, Timeline, Timeline]]:
    """Every change with what was before and what is after it."""
    after = simulated()
    for name, take_back in CHANGES.items():
        with take_back():
            yield f"step: {name}", simulated(), after
    with late_requests(), copied_then_added(), rounded_alone():
        yield "step: all of them", simulated(), after
    yield "prompt of 4096: chunks of 1024, not 512", prompt(512), prompt(1024)


def main() -> None:
    """Print the table."""
    print("| with | without it, ms | CPU lane / GPU / main thread | with it, ms | CPU lane / GPU / main thread |")
    print("|---|---|---|---|---|")
    for change in rows():
        print(row(*change))
    print(f"\nmeasured with the code as it was before all: {1e3 * first_run()[2]:.2f} ms a step")


if __name__ == "__main__":
    main()
