"""Which hand-over a device gets: the one that was asked for, or for `auto` the fastest that passes a test at the start.

events   always there; the caller waits for the CPU lane within a step
flags    the caller queues a whole step ahead
graph    flags, and decode steps captured and replayed
"""

import warnings
from collections.abc import Iterator
from concurrent.futures import Executor
from typing import Any

import torch

from cpu_kernels import CpuKernels
from hetero_attn.devices import Device
from hetero_attn.errors import HeteroError, UnsupportedModelError, nearest
from hetero_attn.lanes.flag_handover import FlagHandover
from hetero_attn.lanes.handover import EventHandover
from hetero_attn.lanes.tables import StepTables

HANDOVERS = ("auto", "events", "flags", "graph")
ROUNDS = 3


def choose_handover(wish: str, device: Device, worker: Executor, host_ops: CpuKernels, tables: StepTables) -> Any:
    """The hand-over for `wish`, one of HANDOVERS; warns where `auto` has to leave one out.

    Raises UnsupportedModelError for an unknown wish and for one that does not work here.
    """
    if wish not in HANDOVERS:
        raise UnsupportedModelError(
            f"handover is {wish!r}; it must be one of {', '.join(HANDOVERS)}{nearest(wish, HANDOVERS)}"
        )
    for name in _candidates(wish, device):
        if name == "events":
            return EventHandover(device, worker)
        handover = FlagHandover(device, worker, host_ops, captures=name == "graph")
        failure = _failure(handover, device, tables)
        if failure is None:
            return handover
        if wish != "auto":
            raise UnsupportedModelError(f"handover={wish!r} does not work on this device: {failure}; use 'auto'")
        warnings.warn(f"hand-over by {name} does not work on this device ({failure}): trying the next", stacklevel=2)
    raise AssertionError("events are always a candidate of auto")


def _candidates(wish: str, device: Device) -> Iterator[str]:
    if wish != "auto":
        yield wish
        return
    if device.kind == "cuda":
        yield from ("graph", "flags")
    yield "events"


def _failure(handover: FlagHandover, device: Device, tables: StepTables) -> str | None:
    """What goes wrong when numbers go to the host, are added to there and come back, some times over."""
    host, on_device = (buffer[:192].view(torch.float32) for buffer in tables.buffers)
    host[:16] = torch.arange(16, dtype=torch.float32, device="cpu")

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
            for _ in range(ROUNDS):
                if handover.captures:
                    handover.replay(jobs)
                    graph.replay()
                else:
                    round_trip()
                handover.join()
                device.synchronize(device.record(device.compute))
            if handover.captures:
                handover.forget(jobs)
            device.copy(host[:16], on_device[:16], device.compute)
            device.synchronize(device.record(device.compute))
    except (HeteroError, RuntimeError, NotImplementedError) as error:
        return str(error)
    right = torch.equal(host[:16], torch.arange(16, dtype=torch.float32, device="cpu") + ROUNDS)
    return None if right else f"numbers came back wrong: {host[:3].tolist()}"
