"""How host jobs and GPU work wait for each other: the one host worker, and three orders between it and the device.

`Handover` is what every order offers. `InOrder` is the plain path: jobs run on the calling thread. `EventHandover` runs
them on one worker thread and blocks the caller wherever GPU work has to see their results.
"""

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any, Protocol

from hetero_attn.devices import Device

Job = Callable[[], None]


class Handover(Protocol):
    """An order between jobs of the host worker and work that is queued for the GPU.

    given: how many jobs were given so far. overhead_s: seconds that the hand-over itself took so far, waking the worker
    and noticing its end. worked_s, parked_s: seconds for which programs of recorded jobs computed, and waited for the
    GPU.
    captures: whether a step can be captured in a graph, jobs included.
    """

    name: str
    captures: bool
    given: int
    overhead_s: float
    worked_s: float
    parked_s: float

    def submit(self, job: Job, after_device: bool) -> None:
        """Run `job` on the host after the jobs before it and, if asked, after the GPU work queued so far."""

    def order_device(self, given: int | None = None) -> None:
        """GPU work queued from now on sees what the first `given` jobs wrote; None: all of them."""

    def join(self, given: int | None = None) -> None:
        """The calling thread sees it; raises what the first failed job raised."""

    def begin_layer(self) -> None:
        """The caller is about to queue a layer; it waits where it is too far ahead of the jobs."""

    def give_up(self) -> None:
        """Let every job end and forget failures; for a step that is abandoned half-way."""

    def close(self) -> None:
        """Finish the jobs and stop the worker; idempotent."""


class InOrder:
    """Every job runs when it is given. device: None without a GPU."""

    name = "in order"
    captures = False
    given = 0
    overhead_s = 0.0
    worked_s = parked_s = 0.0

    def __init__(self, device: Device | None) -> None:
        self._device = device

    def submit(self, job: Job, after_device: bool) -> None:
        """Run the job now; what it raises is raised here."""
        if after_device and self._device is not None:
            self._device.synchronize(self._device.record(self._device.compute))
        job()

    def order_device(self, given: int | None = None) -> None:
        pass

    def join(self, given: int | None = None) -> None:
        pass

    def begin_layer(self) -> None:
        pass

    def give_up(self) -> None:
        pass

    def close(self) -> None:
        pass


class EventHandover:
    """Jobs run one after another on the only thread of `worker`, each after the event that it waits for."""

    name = "events"
    captures = False
    worked_s = parked_s = 0.0

    def __init__(self, device: Device, worker: Executor) -> None:
        self._device = device
        self._worker = worker
        self._jobs: deque[tuple[int, Future]] = deque()
        self._idle_since = 0.0
        self.given = 0
        self.overhead_s = 0.0

    def submit(self, job: Job, after_device: bool) -> None:
        """Queue the job."""
        event = self._device.record(self._device.compute) if after_device else None
        self.given += 1
        self._jobs.append((self.given, self._worker.submit(self._run, event, job, time.perf_counter())))

    def order_device(self, given: int | None = None) -> None:
        """Block the caller until those jobs have ended, so that whatever it queues next comes after them."""
        self.join(given)

    def join(self, given: int | None = None) -> None:
        """Block the caller until those jobs have ended, the failed ones too."""
        started, failures, waited = time.perf_counter(), [], False
        while self._jobs and (given is None or self._jobs[0][0] <= given):
            failures.append(self._jobs[0][1].exception())
            self._jobs.popleft()
            waited = True
        if waited:
            self.overhead_s += max(0.0, time.perf_counter() - max(started, self._idle_since))
        if (failure := next(filter(None, failures), None)) is not None:
            raise failure

    def begin_layer(self) -> None:
        """The GPU never waits for a job, so the caller may be as far ahead as it likes."""

    def give_up(self) -> None:
        """Wait for the jobs without looking at how they ended."""
        while self._jobs:
            self._jobs.popleft()[1].exception()

    def close(self) -> None:
        """Finish the jobs and stop the thread; idempotent."""
        self._worker.shutdown(wait=True)

    def _run(self, event: Any, job: Job, given: float) -> None:
        self.overhead_s += time.perf_counter() - max(given, self._idle_since)
        if event is not None:
            self._device.synchronize(event)
        try:
            job()
        finally:
            self._idle_since = time.perf_counter()
