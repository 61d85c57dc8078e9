"""A GPU that does everything as late as it may, and reports every access that no event, flag or join has ordered.

`SimulatedDriver` runs the lanes' own code on one thread. Calls only queue; a stream runs when somebody waits for it,
and then no further than asked; the host worker runs when its jobs are joined. So a missing wait also computes with what
was there before, and all fresh memory holds NaN. Every operation carries a vector clock of what happened before it, and
every byte of every tensor remembers who touched it last: an access that is not ordered after the others' is a race,
whatever the timing (Lamport 1978; Mattern 1989).

Kernels are the wrapped operations, whose reads and writes follow from their signatures; plain torch calls are seen by a
dispatch mode. A call that mixes memories, or makes a tensor in GPU memory outside of the arena, is an error.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from gpu_kernels import reference
from tests.support.gpu.checked_ops import (
    CheckedOps,
    PickedReads,
    TorchCalls,
    filled,
)
from tests.support.gpu.race_checker import (
    WORKER,
    Clock,
    MixedMemoryError,
    RaceChecker,
    RaceError,
    StuckError,
    merge,
)

SMALL_BYTES = 256  # so that toys have rows of both kinds


@dataclass(eq=False)
class Stream:
    """A queue of work not yet run. clock: what has happened before its next operation."""

    name: str
    queue: deque[Callable[[], None]] = field(default_factory=deque)
    clock: Clock = field(default_factory=dict)


@dataclass(eq=False)
class Event:
    """A point on a stream; `clock` is None until the stream has come there."""

    stream: Stream
    clock: Clock | None = None
    is_asked: bool = False


class SimulatedDriver:
    """See `hetero_attn.devices.device` for what each call means, and the module for what is checked."""

    kind = "emulated"
    name = "simulated GPU"

    def __init__(self) -> None:
        self.checker = RaceChecker()
        self.streams: list[Stream] = []
        self.ops = CheckedOps(reference, self._launch)
        self.flags: dict[int, tuple[int, Clock]] = {}
        self.worker: SimulatedWorker

    def stream(self, name: str) -> Stream:
        """A new queue."""
        self.streams.append(Stream(name))
        return self.streams[-1]

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype, stays: bool) -> torch.Tensor:
        """GPU memory full of NaN."""
        with _disable_current_modes():
            tensor = filled(torch.empty(shape, dtype=dtype))
            self.checker.own(tensor)
        return tensor

    def free(self, tensor: torch.Tensor) -> None:
        """The record keeps the memory."""

    def pin(self, tensor: torch.Tensor) -> bool:
        """Fresh host memory for copies holds NaN too."""
        with _disable_current_modes():
            filled(tensor)
        return True

    def unpin(self, tensor: torch.Tensor) -> bool:
        """Memory that is given back may be written by anybody from now on."""
        self.run_host("unpin", [], [tensor])
        return True

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: Stream) -> None:
        """Queue a copy; the target must not be read, nor the source written, before it has run."""
        self._enqueue(stream, "copy", lambda: target.copy_(source), [source], [target])

    def reaches(self, target: torch.Tensor, source: torch.Tensor, stream: Stream) -> bool:
        """Small host memory is read in place."""
        return target.nbytes <= SMALL_BYTES and not self.checker.on_device(source)

    def record(self, stream: Stream, reuse: Event | None = None) -> Event:
        """Mark the work queued so far."""
        event = Event(stream)

        def reach() -> None:
            event.clock = dict(stream.clock)

        stream.queue.append(reach)
        return event

    def wait(self, stream: Stream, event: Event) -> None:
        """Later work of the stream comes after the event."""
        stream.queue.append(lambda: merge(stream.clock, self.reach(event)))

    def write_flag(self, stream: Stream, flag: torch.Tensor, value: int) -> None:
        """Whoever sees the flag comes after everything that the stream has done before."""
        stream.queue.append(lambda: self.flags.__setitem__(flag.data_ptr(), (value, dict(stream.clock))))

    def await_flag(self, flag: torch.Tensor, value: int, timeout_s: float) -> bool:
        """The running thread comes after what the stream did before it wrote the flag."""
        stream = self.streams[0]
        while self.flags.get(flag.data_ptr(), (None, {}))[0] != value:
            if not stream.queue:
                raise StuckError("a flag is waited for that no stream will write")
            self._step(stream)
        merge(self.checker.clocks[self.checker.actor], self.flags[flag.data_ptr()][1])
        return True

    def wait_flag(self, stream: Stream, flag: torch.Tensor, value: int, exactly: bool) -> None:
        """Later work of the stream comes after what the flag's writer did; the worker runs until it is written."""

        def wait() -> None:
            while (self.flags.get(flag.data_ptr(), (0, {}))[0] - value) & 0x80000000:
                self.worker.run_next()
            merge(stream.clock, self.flags[flag.data_ptr()][1])

        stream.queue.append(wait)

    def set_flag(self, flag: torch.Tensor, value: int) -> None:
        """The running thread writes a flag, after all it has done."""
        self.flags[flag.data_ptr()] = (value, dict(self.checker.clocks[self.checker.actor]))

    def synchronize(self, event: Event) -> None:
        """This thread comes after the event."""
        merge(self.checker.clocks[self.checker.actor], self.reach(event))

    def is_reached(self, event: Event) -> bool:
        """Not when it is asked for the first time; then this thread comes after it."""
        if event.is_asked:
            self.synchronize(event)
            return True
        event.is_asked = True
        return False

    @contextmanager
    def current(self, stream: Stream) -> Iterator[None]:
        """Watch this thread's torch calls; those on GPU memory are queued on the stream."""
        with TorchCalls(self, stream):
            yield

    def clear(self) -> None:
        """The reference operations keep nothing."""

    def close(self) -> None:
        """Run what is still queued: work that nobody waited for may race too."""
        for stream in self.streams:
            while stream.queue:
                self._step(stream)

    def reach(self, event: Event) -> Clock:
        """Run the event's stream until it is there."""
        while event.clock is None:
            if not event.stream.queue:
                raise StuckError(f"an event of {event.stream.name} is never reached")
            self._step(event.stream)
        return event.clock

    def run_host(self, name: str, reads: list, writes: list) -> None:
        """Check an access of the running thread."""
        clock = self.checker.clocks[self.checker.actor]
        self.checker.run(self.checker.actor, clock, name, reads, writes)

    def launch(self, stream: Stream, name: str, work: Callable[[], Any], reads: list, writes: list) -> None:
        """Queue a kernel; raises MixedMemoryError if it was given host memory."""
        for tensor in (*reads, *writes):
            if tensor.numel() and not self.checker.on_device(tensor) and name != "add_rows":
                raise MixedMemoryError(f"{name} on the GPU was given host memory {tuple(tensor.shape)}")
        self._enqueue(stream, name, work, reads, writes)

    def _launch(self, name: str, work: Callable[[], Any], reads: list, writes: list) -> None:
        self.launch(self.streams[0], name, work, reads, writes)

    def _enqueue(self, stream: Stream, name: str, work: Callable[[], Any], reads: list, writes: list) -> None:
        issued = dict(self.checker.clocks[self.checker.actor])

        def run() -> None:
            merge(stream.clock, issued)
            found = reads.now() if isinstance(reads, PickedReads) else reads
            self.checker.run(stream.name, stream.clock, name, found, writes)
            with _disable_current_modes():
                work()

        stream.queue.append(run)

    @staticmethod
    def _step(stream: Stream) -> None:
        stream.queue.popleft()()


class SimulatedWorker:
    """The host worker's executor: a job runs, in its turn, when somebody asks how it ended."""

    def __init__(self, driver: SimulatedDriver) -> None:
        self._driver = driver
        driver.worker = self
        self._queue: deque[tuple[Future, Clock, Callable[[], None]]] = deque()

    def submit(self, function: Callable[..., None], *arguments: Any) -> Future:
        """Queue a job; it comes after what the submitting thread has seen."""
        checker = self._driver.checker
        future = JobFuture(self)
        self._queue.append((future, dict(checker.clocks[checker.actor]), lambda: function(*arguments)))
        return future

    def run_next(self) -> None:
        """Run the oldest job as the worker."""
        if not self._queue:
            raise StuckError("a host job is waited for that was never given")
        future, issued, job = self._queue.popleft()
        checker = self._driver.checker
        before, checker.actor = checker.actor, WORKER
        merge(checker.clocks[WORKER], issued)
        try:
            job()
            future.set_result(None)
        except (RaceError, MixedMemoryError, StuckError):
            raise
        except BaseException as error:  # as an executor does
            future.set_exception(error)
        finally:
            checker.actor = before
            future.clock = dict(checker.clocks[WORKER])

    def join(self, future: JobFuture) -> None:
        """The running thread comes after the job."""
        while not future.done():
            self.run_next()
        checker = self._driver.checker
        merge(checker.clocks[checker.actor], future.clock)

    def shutdown(self, wait: bool = True) -> None:
        """Run what is left."""
        while self._queue:
            self.run_next()


class JobFuture(Future):
    """A job that runs when its end is asked for."""

    clock: Clock

    def __init__(self, worker: SimulatedWorker) -> None:
        super().__init__()
        self._worker = worker

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Run up to this job."""
        self._worker.join(self)
        return super().exception(0)
