"""Hand-overs by flags: the caller queues ahead, and only GPU and host worker wait for each other.

A flag is a word of page-locked host memory, alone on its cache lines. The GPU's stream waits for it or writes it
without a kernel. While a step runs ahead, the worker sets one counter to the number of each job it has ended, and the
stream waits for the number of the last job it needs. It is set even if the job failed, so the GPU never waits for a job
that is over; a job that never ends is released, with an error, when `join` has waited `watchdog_s`. The other way round
every job that follows GPU work has a flag, one of a ring, to which the stream writes the job's number.

The worker waits for flags alone, never inside the driver: a launch that finds its queue full behind a parked wait holds
the driver's lock until the worker has set what the GPU waits for. Nor does the caller run ahead without bound: a layer
is queued once the jobs of the layer before the last have ended.

In a captured step (`record`, then `replay` for each) every job has flags of its own: see `recorded_step`; `replay`
clears them all with one write before it starts either side, since the step before has ended on both by then.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager

import torch

from cpu_kernels import CpuKernels
from hetero_attn.devices import Device
from hetero_attn.errors import EngineDeadError
from hetero_attn.lanes.handover import Job
from hetero_attn.lanes.recorded_step import RecordedStep

FLAG_WORDS = 16  # 128 bytes: a cache line and the one that is fetched with it
JOBS_AT_LEAST = 128  # of a captured step, room for more only where a step has had more
WATCHDOG_S = 60.0
COUNTER_MASK = 0xFFFFFFFF
REQUESTS = 64  # jobs that may wait at once, many more than two layers have
RUN_AHEAD_LAYERS = 2


class FlagHandover:
    """See `hetero_attn.lanes.handover` for what each call means; `worker` has one thread.

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
        self.worked_s = self.parked_s = 0.0
        # Made now: what a capture needs is page-locked before weights, which may leave nothing to lock.
        self._unused = [self._new_flags(JOBS_AT_LEAST)] if captures else []
        self._counter = self._new_flags(1)[0, 0, :1]
        self._requests = self._new_flags(REQUESTS)[:, 0, :1]
        self._given = self._ordered = 0
        self._jobs: deque[tuple[int, Future]] = deque()
        self._layers: deque[int] = deque()
        self._is_abandoned = False
        self._most_jobs = 1
        self._recording: RecordedStep | None = None
        self._replaying: RecordedStep | None = None

    @property
    def name(self) -> str:
        """What `handover=` calls it."""
        return "graph" if self.captures else "flags"

    @property
    def given(self) -> int:
        """How many jobs were given so far; those of a recorded step count by themselves."""
        return self._given if self._recording is None else len(self._recording.jobs)

    def submit(self, job: Job, after_device: bool) -> None:
        """Queue the job, or keep it for the step that is being recorded."""
        if self._recording is not None:
            request = self._recording.add(job, after_device)
            if request is not None:
                self._device.write_flag(request, 1)
            return
        self._wait_for(self._given + 1 - REQUESTS)  # whose flag this job takes over
        self._given += 1
        if after_device:
            self._device.write_flag(self._request(self._given), self._given & COUNTER_MASK)
        self._most_jobs = max(self._most_jobs, len(self._jobs) + 1)
        self._jobs.append((self._given, self._worker.submit(self._run, after_device, job, self._given)))

    def order_device(self, given: int | None = None) -> None:
        """Queue a wait of the GPU for the last job, or the last of the first `given`; the caller goes on."""
        given = self.given if given is None else given
        if self._recording is not None:
            done = self._recording.done_flag(given)
            if done is not None:
                self._device.wait_flag(done, 1, exactly=True)
        elif self._ordered < given:
            self._device.wait_flag(self._counter, given & COUNTER_MASK)
            self._ordered = given

    def begin_layer(self) -> None:
        """Block the caller until the jobs of the layer before the last have ended."""
        if self._recording is not None:
            return
        self._layers.append(self._given)
        if len(self._layers) >= RUN_AHEAD_LAYERS:
            self._wait_for(self._layers.popleft())

    def join(self, given: int | None = None) -> None:
        """Block the caller until the jobs, or the first `given`, have ended; raises EngineDeadError for one that does
        not."""
        failures = []
        while self._jobs and (given is None or self._jobs[0][0] <= given):
            self._wait_for(self._jobs[0][0])
            failures.append(self._jobs.popleft()[1].exception(0))
        if not self._jobs:
            self._replaying = None
        if (failure := next(filter(None, failures), None)) is not None:
            raise failure

    def give_up(self) -> None:
        """Let every job end, without looking at how, and nobody wait for what a step given up half-way will not do."""
        self._recording = None
        if self._replaying is not None:
            self._replaying.release(self._host_ops)
        self._is_abandoned = not self._device_answers()
        if self._is_abandoned:
            for number, _ in self._jobs:
                self._host_ops.set_flag(self._request(number), number & COUNTER_MASK)
        try:
            self._wait_for(self._given)
        finally:
            self._jobs.clear()
            self._replaying, self._is_abandoned = None, False

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
                step.program = self._host_ops.record(lambda: step.write_program(self._host_ops))
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
        self._replaying = step
        self._given += 1
        self._ordered = self._given  # the graph has waits of its own
        self._jobs.append((self._given, self._worker.submit(self._serve, serve, step)))

    def _run(self, after_device: bool, job: Job, number: int) -> None:
        try:
            if after_device:
                self._await_request(number)
            if not self._is_abandoned:
                job()
        finally:
            self._host_ops.set_flag(self._counter, number & COUNTER_MASK)

    def _await_request(self, number: int) -> None:
        if not self._host_ops.await_flag(self._request(number), number & COUNTER_MASK, self._watchdog_s):
            raise self._unasked()

    def _request(self, number: int) -> torch.Tensor:
        return self._requests[number % REQUESTS]

    def _wait_for(self, number: int) -> None:
        """Block the caller until the job of this number and those before it have ended, however they did."""
        for given, job in self._jobs:
            if given > number:
                return
            try:
                job.exception(self._watchdog_s)
            except FutureTimeout:
                self._jobs.clear()
                self._host_ops.set_flag(self._counter, self._given & COUNTER_MASK)
                raise EngineDeadError(
                    f"a job of the CPU lane did not end within {self._watchdog_s:g} s; the GPU was released, make a "
                    "new LLM"
                ) from None

    def _device_answers(self) -> bool:
        """Whether the GPU still takes work; one that met a fault answers every call with it and asks for no job."""
        try:
            self._device.record(self._device.compute)
        except Exception:  # torch and the driver's library have types of their own for it
            return False
        return True

    def _serve(self, serve: Callable[[RecordedStep], None], step: RecordedStep) -> None:
        """Run a step's jobs; where one fails, or the GPU does not ask for one, let the GPU run to the end."""
        try:
            serve(step)
        except BaseException as failure:
            step.end(self._host_ops)
            if isinstance(failure, TimeoutError):
                raise self._unasked() from None
            raise

    def _unasked(self) -> EngineDeadError:
        return EngineDeadError(f"the GPU did not ask for its CPU columns within {self._watchdog_s:g} s; make a new LLM")

    def _serve_program(self, step: RecordedStep) -> None:
        started = time.perf_counter()
        try:
            step.program.run(self._watchdog_s)
        finally:
            self.worked_s += time.perf_counter() - started - step.program.waited_s
            self.parked_s += step.program.waited_s

    def _serve_jobs(self, step: RecordedStep) -> None:
        step.serve(self._host_ops, self._watchdog_s)

    def _take_flags(self) -> torch.Tensor:
        jobs = max(JOBS_AT_LEAST, self._most_jobs)
        fitting = next((index for index, flags in enumerate(self._unused) if len(flags) >= jobs), None)
        return self._new_flags(jobs) if fitting is None else self._unused.pop(fitting)

    def _new_flags(self, jobs: int) -> torch.Tensor:
        return self._device.host_empty((jobs, 2, FLAG_WORDS), torch.int64, "flags").zero_()
