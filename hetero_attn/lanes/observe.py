"""Other operations in the place of the lanes' own for some steps: timed ones, traced ones, the reference's, none.

What the steps compute, and in which order, stays the same but where somebody else's operations compute it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hetero_attn.lanes.handover import InOrder
from hetero_attn.lanes.lanes import Lanes
from hetero_attn.lanes.stopwatch import SelectedOps, Stopwatch, WatchedDevice, WatchedOps
from hetero_attn.lanes.traced import TracedDevice, TracedOps


@contextmanager
def watched(lanes: Lanes, stopwatch: Stopwatch) -> Iterator[None]:
    """Run the enclosed steps in order on the calling thread, every operation and copy timed."""
    lanes.join()
    device, ops = lanes.device, WatchedOps(lanes.host_ops, "cpu", stopwatch.time)
    watched_device = None if device is None else WatchedDevice(device, stopwatch)
    with lanes.using(ops, watched_device, InOrder(device)):
        yield


@contextmanager
def traced(lanes: Lanes, trace: Any) -> Iterator[None]:
    """Run the enclosed steps with every operation and copy in the trace; when it ends the device has finished."""
    ops = TracedOps(lanes.host_ops, "CPU lane", trace, lambda name, work: _timed(trace, name, work))
    device = None if lanes.device is None else TracedDevice(lanes.device, trace)
    try:
        with lanes.using(ops, device, lanes.handover, can_replay=False):
            yield
    finally:
        lanes.finish()


@contextmanager
def computing_by(lanes: Lanes, ops: Any) -> Iterator[None]:
    """Within this, `ops` computes on both sides, in order on the calling thread. Not for a real GPU."""
    lanes.join()
    device = lanes.device
    kept = None if device is None else device.ops
    with lanes.using(ops, device, InOrder(device)):
        if device is not None:
            device.ops = ops
        try:
            yield
        finally:
            if device is not None:
                device.ops = kept


@contextmanager
def only(lanes: Lanes, term: str | None) -> Iterator[None]:
    """Within this, CPU operations of other terms (placement.plan.phase.TERMS) do nothing; for recording a step."""
    with lanes.using(SelectedOps(lanes.host_ops, term), lanes.device, lanes.handover):
        yield


def _timed(trace: Any, name: str, work: Callable[[], object]) -> None:
    with trace.span("CPU lane", name):
        work()
