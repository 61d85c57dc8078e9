"""Hand-overs by flags: the caller queues a whole step ahead, and only GPU and host worker wait for each other.

A flag is a word of page-locked host memory, alone on its cache lines. The GPU's stream waits for it or writes it
without a kernel. While a step runs ahead, one counter is enough: the worker sets it to the number of each job it has
ended, and the stream waits for the number of the last job it needs. It is set even if the job failed, so the GPU never
waits for a job that is over; a job that never ends is released, with an error, when `join` has waited `watchdog_s`.

In a captured step (`record`, then `replay` for every step) numbers would be the same each time, so every job has two
flags of its own. Both are cleared before the step runs again, when the GPU has long passed them:

    GPU: ... copies | request = 1 ...... wait done == 1 | copies ...
    host worker:      wait request == 1 | job | done = 1
"""

from collections.abc import Iterator
from concurrent.futures import Executor, Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from cpu_kernels import CpuKernels
from hetero_attn.devices import Device
from hetero_attn.errors import EngineDeadError
from hetero_attn.handover import Job

FLAG_WORDS = 16  # 128 bytes: a cache line and the one that is fetched with it
FLAGS_AT_ONCE = 256
WATCHDOG_S = 60.0
COUNTER_MASK = 0xFFFFFFFF


@dataclass(slots=True)
class RecordedJob:
    """One job of a captured step. request: its flag where it waits for the GPU; done: where the GPU waits for it."""

    job: Job
    request: torch.Tensor | None
    done: torch.Tensor | None = None


class FlagHandover:
    """See `hetero_attn.handover` for what each call means; `worker` has one thread.

    captures: whether decode steps are to be captured and replayed.
    """

    def __init__(
        self,
        device: Device,
        worker: Executor,
        host_ops: CpuKernels,
        captures: bool = False,
        watchdog_s: float = WATCHDOG_S,
    ) -> None:
        self.captures = captures
        self.overhead_s = 0.0
        self._device = device
        self._worker = worker
        self._host_ops = host_ops
        self._watchdog_s = watchdog_s
        self._unused: list[torch.Tensor] = []
        self._recorded_flags: list[torch.Tensor] = []
        self._counter = device.host_empty((1, FLAG_WORDS), torch.int64, "flags").zero_()[0, :1]
        self._given = self._ordered = 0
        self._jobs: list[Future] = []
        self._most_jobs = 1
        self._recording: list[RecordedJob] | None = None

    @property
    def name(self) -> str:
        """What `handover=` calls it."""
        return "graph" if self.captures else "flags"

    def submit(self, job: Job, after_device: bool) -> None:
        """Queue the job, or keep it for the step that is being recorded."""
        if self._recording is not None:
            self._recording.append(RecordedJob(job, self._request() if after_device else None))
            return
        event = self._device.record(self._device.compute) if after_device else None
        self._given = (self._given + 1) & COUNTER_MASK
        self._most_jobs = max(self._most_jobs, len(self._jobs) + 1)
        self._jobs.append(self._worker.submit(self._run, event, job, self._given))

    def order_device(self) -> None:
        """Queue a wait of the GPU for the last job; the caller goes on."""
        if self._recording is not None:
            self._order_recorded()
        elif self._ordered != self._given:
            self._device.wait_flag(self._counter, self._given)
            self._ordered = self._given

    def join(self) -> None:
        """Block the caller until the jobs have ended; raises EngineDeadError for one that does not end."""
        jobs, self._jobs = self._jobs, []
        try:
            failures = [failure for job in jobs if (failure := job.exception(self._watchdog_s)) is not None]
        except FutureTimeout:
            self._host_ops.set_flag(self._counter, self._given)
            raise EngineDeadError(
                f"a job of the CPU lane did not end within {self._watchdog_s:g} s; the GPU was released, make a new LLM"
            ) from None
        if failures:
            raise failures[0]

    def give_up(self) -> None:
        """Wait for the jobs without looking at how they ended."""
        jobs, self._jobs = self._jobs, []
        self._recording = None
        for job in jobs:
            job.exception(self._watchdog_s)

    def close(self) -> None:
        """Finish the jobs and stop the thread; idempotent."""
        self._worker.shutdown(wait=True)

    @contextmanager
    def record(self) -> Iterator[list[RecordedJob]]:
        """Keep the jobs given inside; what is queued on the GPU meanwhile must be captured.

        A step of this kind must have run before: no memory may be page-locked while a stream is captured, so its flags are
        made now, two for each job that any step has had.
        """
        while len(self._unused) < 2 * self._most_jobs:
            self._make_flags()
        self._recording = []
        try:
            yield self._recording
        finally:
            self._recording = None

    def replay(self, jobs: list[RecordedJob]) -> None:
        """Run recorded jobs beside a replay of what was captured with them; the GPU has ended every replay before."""
        for flags in self._recorded_flags:
            flags.zero_()
        self._jobs.append(self._worker.submit(self._serve, jobs))

    def _run(self, event: Any, job: Job, number: int) -> None:
        try:
            if event is not None:
                self._device.synchronize(event)
            job()
        finally:
            self._host_ops.set_flag(self._counter, number)

    def _serve(self, jobs: list[RecordedJob]) -> None:
        waiting = list(jobs)
        try:
            while waiting:
                self._await_request(waiting[0])
                recorded = waiting.pop(0)
                try:
                    recorded.job()
                finally:
                    self._set_done(recorded)
        except BaseException as failure:
            self._release(waiting, asks=not isinstance(failure, EngineDeadError))
            raise

    def _await_request(self, recorded: RecordedJob) -> None:
        if recorded.request is None:
            return
        if not self._host_ops.await_flag(recorded.request, 1, self._watchdog_s):
            raise EngineDeadError(
                f"the GPU did not ask for its CPU columns within {self._watchdog_s:g} s; make a new LLM"
            )

    def _release(self, jobs: list[RecordedJob], asks: bool) -> None:
        """Let the GPU run to the end of a step that failed; asks: it still runs, so its requests are taken."""
        for recorded in jobs:
            try:
                if asks:
                    self._await_request(recorded)
            except EngineDeadError:
                asks = False
            self._set_done(recorded)

    def _set_done(self, recorded: RecordedJob) -> None:
        if recorded.done is not None:
            self._host_ops.set_flag(recorded.done, 1)

    def _request(self) -> torch.Tensor:
        flag = self._new_flag()
        self._device.write_flag(flag, 1)
        return flag

    def _order_recorded(self) -> None:
        if self._recording and self._recording[-1].done is None:
            done = self._recording[-1].done = self._new_flag()
            self._device.wait_flag(done, 1, exactly=True)

    def _new_flag(self) -> torch.Tensor:
        if not self._unused:
            self._make_flags()
        return self._unused.pop()

    def _make_flags(self) -> None:
        words = self._device.host_empty((FLAGS_AT_ONCE, FLAG_WORDS), torch.int64, "flags")
        self._recorded_flags.append(words.zero_())
        self._unused += words[:, :1].unbind()
