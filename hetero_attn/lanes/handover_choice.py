"""Which hand-over a device gets: the one that was asked for, or for `auto` the fastest that passes a test at the start.

events   always there; the caller waits for the CPU lane within a step
flags    the caller queues a whole step ahead
graph    flags, and decode steps captured and replayed
"""

import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from typing import Any

import torch

from cpu_kernels import CpuKernels
from hetero_attn.devices import Device
from hetero_attn.errors import ArgumentError, HeteroError, UnsupportedModelError, nearest
from hetero_attn.lanes.flag_handover import FlagHandover
from hetero_attn.lanes.handover import EventHandover
from hetero_attn.lanes.handover_names import HANDOVERS
from hetero_attn.lanes.tables import StepTables

ROUNDS = 3
MEASURED_ROUNDS = 200
# Of 20 hand-overs 19 take no longer where nothing else is wrong: 15 us by graph on an H100, some 100 by events. A card
# that shares its time with a display may look at a waiting stream in its own slice only, milliseconds apart.
PROMPT_S = 1e-3


def choose_handover(wish: str, device: Device, worker: Executor, host_ops: CpuKernels, tables: StepTables) -> Any:
    """The hand-over for `wish`, one of HANDOVERS; warns where `auto` has to leave one out.

    `auto` takes the first that works and is prompt, by p95 of 200 hand-overs; else the one with the least p95. Raises
    ArgumentError for an unknown wish and UnsupportedModelError for one that does not work here.
    """
    if wish not in HANDOVERS:
        raise ArgumentError(f"handover is {wish!r}; it must be one of {', '.join(HANDOVERS)}{nearest(wish, HANDOVERS)}")
    slow: list[tuple[float, Any]] = []
    for name in _candidates(wish, device):
        if name == "events" and not slow:
            return EventHandover(device, worker)
        handover = _made(name, device, worker, host_ops)
        measures = wish == "auto" and device.kind == "cuda"
        failure, seconds = _tried(handover, device, tables, MEASURED_ROUNDS if measures else ROUNDS)
        if failure is not None and wish != "auto":
            raise UnsupportedModelError(f"handover={wish!r} does not work on this device: {failure}; use 'auto'")
        if failure is not None:
            warnings.warn(
                f"hand-over by {name} does not work on this device ({failure}): trying the next", stacklevel=2
            )
            continue
        p50, p95 = percentiles(seconds)
        if not measures or p95 <= PROMPT_S:
            return handover
        warnings.warn(
            f"hand-over by {name} is slow on this device, p50 {1e6 * p50:.0f} us and p95 {1e6 * p95:.0f} us: trying "
            "the next; a display on the same GPU, or other programs, may take its time",
            stacklevel=2,
        )
        slow.append((p95, handover))
    return min(slow, key=lambda tried: tried[0])[1]


def percentiles(seconds: Sequence[float]) -> tuple[float, float]:
    """(p50, p95) of the times of hand-overs."""
    ordered = sorted(seconds)
    return ordered[len(ordered) // 2], ordered[min(len(ordered) - 1, len(ordered) * 95 // 100)]


def _candidates(wish: str, device: Device) -> Iterator[str]:
    if wish != "auto":
        yield wish
        return
    if device.kind == "cuda":
        yield from ("graph", "flags")
    yield "events"


def _made(name: str, device: Device, worker: Executor, host_ops: CpuKernels) -> FlagHandover | EventHandover:
    if name == "events":
        return EventHandover(device, worker)
    return FlagHandover(device, worker, host_ops, captures=name == "graph")


def _tried(
    handover: FlagHandover | EventHandover, device: Device, tables: StepTables, rounds: int
) -> tuple[str | None, list[float]]:
    """What goes wrong when numbers go to the host, are added to there and come back, some times over; and the times."""
    host, on_device = (buffer[:192].view(torch.float32) for buffer in tables.buffers)
    host[:16] = torch.arange(16, dtype=torch.float32, device="cpu")
    seconds: list[float] = []

    def round_trip() -> None:
        device.copy(host[16:32], on_device[:16], device.compute)
        handover.submit(lambda: torch.add(host[16:32], 1, out=host[32:48]), True)
        handover.order_device()
        device.copy(on_device[:16], host[32:48], device.compute)

    try:
        with device.current():
            device.copy(on_device[:16], host[:16], device.compute)
            device.synchronize(device.record(device.compute))
            if handover.captures:
                with handover.record() as jobs, device.capture() as graph:
                    round_trip()
            for _ in range(rounds):
                started = time.perf_counter()
                if handover.captures:
                    handover.replay(jobs)
                    graph.replay()
                else:
                    round_trip()
                handover.join()
                device.synchronize(device.record(device.compute))
                seconds.append(time.perf_counter() - started)
            if handover.captures:
                handover.forget(jobs)
            device.copy(host[:16], on_device[:16], device.compute)
            device.synchronize(device.record(device.compute))
    except (HeteroError, RuntimeError, NotImplementedError) as error:
        return str(error), seconds
    right = torch.equal(host[:16], torch.arange(16, dtype=torch.float32, device="cpu") + rounds)
    return (None if right else f"numbers came back wrong: {host[:3].tolist()}"), seconds
