"""How host jobs and GPU work wait for each other: the one host worker, and three orders between it and the device.

    submit(job, after_device)   run `job` on the host after the jobs before it and, if asked, the GPU work queued so far
    order_device()              GPU work queued from now on sees what the jobs given so far wrote
    join()                      the calling thread sees it; raises what the first failed job raised
    give_up()                   let every job end and forget failures; for a step that is abandoned half-way

`InOrder` is the plain path: jobs run on the calling thread. `EventHandover` runs them on one worker thread and blocks
the caller wherever GPU work has to see their results.
"""

from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

from hetero_attn.devices import Device

Job = Callable[[], None]


class InOrder:
    """Every job runs when it is given. device: None without a GPU."""

    name = "in order"

    def __init__(self, device: Device | None) -> None:
        self._device = device

    def submit(self, job: Job, after_device: bool) -> None:
        """Run the job now; what it raises is raised here."""
        if after_device and self._device is not None:
            self._device.synchronize(self._device.record(self._device.compute))
        job()

    def order_device(self) -> None:
        """Nothing is under way."""

    def join(self) -> None:
        """Nothing is under way."""

    def give_up(self) -> None:
        """Nothing is under way."""

    def close(self) -> None:
        """Nothing to stop."""


class EventHandover:
    """Jobs run one after another on the only thread of `worker`, each after the event that it waits for."""

    name = "events"

    def __init__(self, device: Device, worker: Executor) -> None:
        self._device = device
        self._worker = worker
        self._jobs: list[Future] = []

    def submit(self, job: Job, after_device: bool) -> None:
        """Queue the job."""
        event = self._device.record(self._device.compute) if after_device else None
        self._jobs.append(self._worker.submit(self._run, event, job))

    def order_device(self) -> None:
        """Block the caller until the jobs have ended, so that whatever it queues next comes after them."""
        self.join()

    def join(self) -> None:
        """Block the caller until the jobs have ended, the failed ones too."""
        jobs, self._jobs = self._jobs, []
        failures = [failure for job in jobs if (failure := job.exception()) is not None]
        if failures:
            raise failures[0]

    def give_up(self) -> None:
        """Wait for the jobs without looking at how they ended."""
        jobs, self._jobs = self._jobs, []
        for job in jobs:
            job.exception()

    def close(self) -> None:
        """Finish the jobs and stop the thread; idempotent."""
        self._worker.shutdown(wait=True)

    def _run(self, event: Any, job: Job) -> None:
        if event is not None:
            self._device.synchronize(event)
        job()
