"""What each kind of work of a step costs by itself: operations and copies one at a time, each timed.

Overlapped lanes cannot be told apart from outside. For a few steps the engine therefore takes everything in order on
one thread and wraps the operations of both sides; what they compute, and in which order, stays the same. A recorded
step has
no calls to wrap: it is recorded once more for each kind of work, with that kind's operations alone.
"""

import statistics
import time
from collections.abc import Callable

import torch

from cpu_kernels.contract import Ops
from hetero_attn.devices import Device
from placement.plan.phase import TERMS

ATTENTION = ("decode_attention", "prefill_attention")
REPETITIONS = 5


class Stopwatch:
    """Seconds by term, one of placement.plan.phase.TERMS, over all that was timed."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(TERMS, 0.0)

    def time(self, term: str, work: Callable[[], object]) -> object:
        """Run `work` and count its time as a term's."""
        started = time.perf_counter()
        result = work()
        self.seconds[term] += time.perf_counter() - started
        return result

    def time_queued(self, term: str, work: Callable[[], object], device: Device, stream: object) -> object:
        """Queue `work` on a stream of the device and count the time that the device takes for it.

        The stream is kept busy while the work is queued: a kernel is launched by Python in more time than it runs, and
        a captured step has no launches.
        """
        driver = device.driver
        driver.delay(stream)
        start = driver.mark(stream)
        result = work()
        stop = driver.mark(stream)
        device.synchronize(device.record(stream))
        self.seconds[term] += driver.seconds_between(start, stop)
        return result


class WatchedOps:
    """The operations of one side (cpu | gpu), every call handed to `time(term, work)`."""

    def __init__(self, ops: Ops, side: str, time: Callable[[str, Callable[[], object]], object]) -> None:
        self._ops, self._side, self._time = ops, side, time

    def __getattr__(self, name: str) -> Callable[..., object]:
        op, term = getattr(self._ops, name), term_of(self._side, name)
        return lambda *arguments: self._time(term, lambda: op(*arguments))


class SelectedOps:
    """The CPU operations of one term; calls of all others do nothing. term None: none is selected."""

    def __init__(self, ops: Ops, term: str | None) -> None:
        self._ops, self._term = ops, term

    def __getattr__(self, name: str) -> Callable[..., object]:
        op = getattr(self._ops, name)
        return op if term_of("cpu", name) == self._term else lambda *arguments: None


class WatchedDevice:
    """A device whose operations and copies are timed; all else is the device's own."""

    def __init__(self, device: Device, stopwatch: Stopwatch) -> None:
        self._device, self._stopwatch = device, stopwatch
        self.ops = WatchedOps(device.ops, "gpu", lambda term, work: self._time(term, work, device.compute))

    def __getattr__(self, name: str) -> object:
        return getattr(self._device, name)

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: object) -> None:
        """As the device's own; copies ahead of use and those of activations are different terms."""
        term = "copies" if stream is self._device.copies else "handovers"
        self._time(term, lambda: self._device.copy(target, source, stream), stream)

    def _time(self, term: str, work: Callable[[], object], stream: object) -> object:
        return self._stopwatch.time_queued(term, work, self._device, stream)


def term_of(side: str, name: str) -> str:
    """The term that an operation of a side (cpu | gpu) belongs to."""
    if name in ("linear", "rounded", "expert_linear"):
        return f"{side}_linears"
    return f"{side}_attention" if name in ATTENTION else "small_ops"


def time_recorded(replay_of: Callable[[str | None], Callable[[], None]]) -> dict[str, float]:
    """Seconds of a recorded step by term, medians.

    replay_of(term): records the step with that term's operations alone, or with none, and returns what replays it.
    """
    seconds = {}
    for term in (None, "cpu_linears", "cpu_attention", "small_ops"):
        run, times = replay_of(term), []
        run()
        for _ in range(REPETITIONS):
            started = time.perf_counter()
            run()
            times.append(time.perf_counter() - started)
        seconds[term] = statistics.median(times)
    empty = seconds.pop(None)
    return {term: max(0.0, value - empty) for term, value in seconds.items()}
