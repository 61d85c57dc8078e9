"""Hand-overs by flags: the caller queues a whole step ahead, and only GPU and host worker wait for each other.

A flag is a word of page-locked host memory, alone on its cache lines. The GPU's stream waits for it or writes it
without a kernel. While a step runs ahead, one counter is enough: the worker sets it to the number of each job it has
ended, and the stream waits for the number of the last job it needs. It is set even if the job failed, so the GPU never
waits for a job that is over; a job that never ends is released, with an error, when `join` has waited `watchdog_s`.

In a captured step (`record`, then `replay` for every step) numbers would be the same each time, so every job has two
flags of its own, each set by one side and waited for by the other. `replay` clears them all with one write before it
starts either side, since the step before has ended on both by then:

    GPU: ... copies | request = 1 ........ wait done == 1 | copies ...
    host worker:      wait request == 1 | job | done = 1

Jobs that call CPU ops alone become one program of the thread team, waits and flags included: no Python runs between two
ops, or between a flag and an op.
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from cpu_kernels import CpuKernels
from cpu_kernels.program import Program
from hetero_attn.devices import Device
from hetero_attn.errors import EngineDeadError
from hetero_attn.handover import Job

FLAG_WORDS = 16  # 128 bytes: a cache line and the one that is fetched with it
JOBS_AT_LEAST = 128  # of a captured step, room for more only where a step has had more
WATCHDOG_S = 60.0
COUNTER_MASK = 0xFFFFFFFF


@dataclass(slots=True)
class RecordedJob:
    """One job of a captured step. request: its flag where it waits for the GPU; done: where the GPU waits for it."""

    job: Job
    request: torch.Tensor | None
    done: torch.Tensor | None = None


@dataclass(slots=True)
class RecordedStep:
    """The jobs of a captured step in order. flags: int64 [jobs or more, 2, FLAG_WORDS], request and done of each.

    program: all of it as the thread team runs it; None where a job is more than CPU ops.
    """

    flags: torch.Tensor
    jobs: list[RecordedJob] = field(default_factory=list)
    program: Program | None = None


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
        self.worked_s = 0.0
        self._unused: list[torch.Tensor] = []
        self._counter = self._new_flags(1)[0, 0, :1]
        self._given = self._ordered = 0
        self._jobs: list[Future] = []
        self._most_jobs = 1
        self._recording: RecordedStep | None = None

    @property
    def name(self) -> str:
        """What `handover=` calls it."""
        return "graph" if self.captures else "flags"

    def submit(self, job: Job, after_device: bool) -> None:
        """Queue the job, or keep it for the step that is being recorded."""
        if self._recording is not None:
            self._record(job, after_device)
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
    def record(self, ops_only: bool = False) -> Iterator[RecordedStep]:
        """Keep the jobs given inside; what is queued on the GPU meanwhile must be captured.

        ops_only: every job calls operations of `host_ops` and nothing else, on the same tensors every time; they then
        run as one program. Jobs that do more are called from Python at every replay.

        A step of this kind must have run before: no memory may be page-locked while a stream is captured, so its flags
        are made now, for as many jobs as any step has had.
        """
        step = self._recording = RecordedStep(self._take_flags())
        try:
            yield step
            if ops_only:
                step.program = self._host_ops.record(lambda: self._write_program(step))
        except BaseException:
            self.forget(step)
            raise
        finally:
            self._recording = None

    def forget(self, step: RecordedStep) -> None:
        """Keep the flags of a step that is not replayed any more, and has ended, for another."""
        self._unused.append(step.flags)

    def replay(self, step: RecordedStep) -> None:
        """Run recorded jobs beside a replay of what was captured with them, which the caller starts next.

        The replay before must have ended, on the GPU too: it may else find the flag that it waits for cleared.
        """
        step.flags[: len(step.jobs)].zero_()
        serve = self._serve_jobs if step.program is None else self._serve_program
        self._jobs.append(self._worker.submit(self._serve, serve, step))

    def _run(self, event: Any, job: Job, number: int) -> None:
        try:
            if event is not None:
                self._device.synchronize(event)
            job()
        finally:
            self._host_ops.set_flag(self._counter, number)

    def _serve(self, serve: Callable[[RecordedStep], None], step: RecordedStep) -> None:
        """Run a step's jobs; where one fails, or the GPU does not ask for one, let the GPU run to the end."""
        try:
            serve(step)
        except BaseException as failure:
            for recorded in step.jobs:
                self._set_done(recorded)
            if isinstance(failure, TimeoutError):
                raise EngineDeadError(
                    f"the GPU did not ask for its CPU columns within {self._watchdog_s:g} s; make a new LLM"
                ) from None
            raise

    def _serve_program(self, step: RecordedStep) -> None:
        started = time.perf_counter()
        try:
            step.program.run(self._watchdog_s)
        finally:
            self.worked_s += time.perf_counter() - started - step.program.waited_s

    def _serve_jobs(self, step: RecordedStep) -> None:
        for recorded in step.jobs:
            request = recorded.request
            if request is not None and not self._host_ops.await_flag(request, 1, self._watchdog_s):
                raise TimeoutError
            recorded.job()
            self._set_done(recorded)

    def _write_program(self, step: RecordedStep) -> None:
        for recorded in step.jobs:
            if recorded.request is not None:
                self._host_ops.record_wait(recorded.request, 1)
            recorded.job()
            if recorded.done is not None:
                self._host_ops.record_set(recorded.done, 1)

    def _set_done(self, recorded: RecordedJob) -> None:
        if recorded.done is not None:
            self._host_ops.set_flag(recorded.done, 1)

    def _record(self, job: Job, after_device: bool) -> None:
        step, request = self._recording, None
        assert len(step.jobs) < len(step.flags), "a captured step has more jobs than any step before it"
        if after_device:
            request = step.flags[len(step.jobs), 0, :1]
            self._device.write_flag(request, 1)
        step.jobs.append(RecordedJob(job, request))

    def _order_recorded(self) -> None:
        step = self._recording
        if step.jobs and step.jobs[-1].done is None:
            done = step.jobs[-1].done = step.flags[len(step.jobs) - 1, 1, :1]
            self._device.wait_flag(done, 1, exactly=True)

    def _take_flags(self) -> torch.Tensor:
        jobs = max(JOBS_AT_LEAST, self._most_jobs)
        fitting = next((index for index, flags in enumerate(self._unused) if len(flags) >= jobs), None)
        return self._new_flags(jobs) if fitting is None else self._unused.pop(fitting)

    def _new_flags(self, jobs: int) -> torch.Tensor:
        return self._device.host_empty((jobs, 2, FLAG_WORDS), torch.int64, "flags").zero_()
