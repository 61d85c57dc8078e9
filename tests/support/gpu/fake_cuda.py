"""`torch.cuda` and libcuda on a machine without a GPU, so that the CUDA driver's own code runs there.

Every stream is a thread that runs its queue in order; an event, a copy, a kernel and a memory operation are entries of
a queue. As in CUDA a queue takes so many entries, a call that finds it full waits inside the driver, and meanwhile
holds the one lock that every other call needs, whichever thread makes it. GPU memory is host memory. Page-locking is
recorded, and may be refused. A stream that is being captured keeps
its entries instead, under the rules of CUDA: only streams that the capture's events have reached take part, and all of
them must have come back when it ends.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

QUEUE_ENTRIES = 1000  # of a stream, before a launch waits inside the driver
STUCK_S = 5.0


class FakeStream:
    """A thread and its queue; `cuda_stream` is the handle that libcuda's calls are given."""

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda_stream = len(cuda.streams) + 1
        cuda.streams[self.cuda_stream] = self
        self._cuda = cuda
        self.capture: Capture | None = None
        self._queue: queue.Queue = queue.Queue(cuda.queue_entries)
        self._thread = threading.Thread(target=self._serve, daemon=True, name=f"fake-stream-{self.cuda_stream}")
        self._thread.start()

    def add(self, work: Callable[[], None], name: str = "") -> None:
        """Queue an entry, or keep it for the graph that is being captured."""
        if self.capture is not None:
            self.capture.entries.append((self, work, name))
            return
        with self._cuda.in_driver():
            try:
                self._cuda.is_full = self._queue.full()
                self._queue.put(work, timeout=STUCK_S)
            except queue.Full:
                raise RuntimeError(f"deadlock: the launch queue stayed full for {STUCK_S:g} s") from None

    def wait_event(self, event: FakeEvent) -> None:
        """Later entries come after the event."""
        if event.capture is not None and self.capture is None:
            self.capture = event.capture  # an event of a capture brings the stream into it
            self.capture.streams.append(self)
            self.capture.open_streams.add(self)
        if self.capture is not None:
            if event.capture is not self.capture:
                raise RuntimeError("a captured stream waits for an event from outside of the capture")
            if self is self.capture.origin:
                self.capture.open_streams.discard(event.stream)
        self.add(event.queued_wait(), "wait event")

    def stop(self) -> None:
        """End the thread after what is queued."""
        self._queue.put(None)
        self._thread.join()

    def _serve(self) -> None:
        while (work := self._queue.get()) is not None:
            try:
                with torch.inference_mode():  # as in the thread that queued it
                    work()
            except BaseException as failure:
                self._cuda.failure = self._cuda.failure or failure


class FakeEvent:
    """A point on a stream. Recorded again it is a later one, for those who wait from then on; as in CUDA, a wait that was
    queued before keeps the point that it was queued for. One that a graph holds is not recorded outside of it."""

    def __init__(self) -> None:
        self._reached = threading.Event()
        self.stream: FakeStream | None = None
        self.capture: Capture | None = None

    def record(self, stream: FakeStream) -> None:
        """Mark the entries queued so far."""
        if self.stream is not None and self.capture is not stream.capture:
            raise RuntimeError("an event of a captured step is recorded outside of it, or the other way round")
        self.stream, self.capture = stream, stream.capture
        reached = self._reached = threading.Event()

        def reach() -> None:
            self.time = time.perf_counter()
            reached.set()

        stream.add(reach, "event")

    def queued_wait(self) -> Callable[[], None]:
        """What a stream does that waits for the point recorded last."""
        reached = self._reached
        return lambda: _await(reached)

    def elapsed_time(self, later: FakeEvent) -> float:
        """Milliseconds between two points that were reached."""
        return 1e3 * (later.time - self.time)

    def wait(self) -> None:
        """Block the thread that calls."""
        _await(self._reached)

    def synchronize(self) -> None:
        """As CUDA: not allowed for an event of a capture."""
        if self.capture is not None:
            raise RuntimeError("an event of a capture cannot be waited for by the host")
        with self.stream._cuda.in_driver():
            pass
        self.wait()
        if self.stream._cuda.failure is not None:
            raise self.stream._cuda.failure

    def query(self) -> bool:
        """Whether it is reached."""
        return self._reached.is_set()


def _await(reached: threading.Event) -> None:
    if not reached.wait(20):
        raise RuntimeError("an event was not reached within 20 s")


class Capture:
    """What a graph holds: entries of its streams in the order they were queued."""

    def __init__(self, origin: FakeStream) -> None:
        self.origin = origin
        self.streams = [origin]
        self.open_streams: set[FakeStream] = set()
        self.entries: list[tuple[FakeStream, Callable[[], None], str]] = []


class FakeGraph:
    """`torch.cuda.CUDAGraph`: replayed on the stream that is current, one entry after another.

    names: of the entries of each stream that took part, the one that was captured first.
    """

    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda = cuda
        self.entries: list[Callable[[], None]] = []
        self.names: list[list[str]] = []

    def replay(self) -> None:
        """Queue everything captured; the order of capture is one that the graph allows."""
        for entry in self.entries:
            self._cuda.current.add(entry)


class FakeCuda:
    """What the CUDA driver uses of `torch.cuda`. total_bytes: of the imagined GPU; queue_entries: of each stream.

    is_full: whether the last launch found its queue full.
    """

    stand_in = "cpu"

    def __init__(self, total_bytes: int = 1 << 33, queue_entries: int = QUEUE_ENTRIES) -> None:
        self.queue_entries = queue_entries
        self.is_full = False
        self._lock = threading.RLock()
        self.streams: dict[int, FakeStream] = {}
        self.failure: BaseException | None = None
        self.total_bytes = total_bytes
        self.fraction = 1.0
        self.current = FakeStream(self)

    @contextmanager
    def in_driver(self) -> Iterator[None]:
        """A call of the driver: one at a time, and none while another waits inside for room in a queue."""
        if not self._lock.acquire(timeout=2 * STUCK_S):
            raise RuntimeError("deadlock: another thread does not come back from the driver")
        try:
            yield
        finally:
            self._lock.release()

    def Stream(self, device: int) -> FakeStream:
        """A new stream."""
        return FakeStream(self)

    def Event(self, enable_timing: bool = False) -> FakeEvent:
        """A new event."""
        return FakeEvent()

    def CUDAGraph(self) -> FakeGraph:
        """An empty graph."""
        return FakeGraph(self)

    def _sleep(self, cycles: int) -> None:
        """Time is no matter here."""

    def graph_pool_handle(self) -> object:
        """Stands for a pool of memory."""
        return object()

    @contextmanager
    def device(self, index: int) -> Iterator[None]:
        """There is one device."""
        yield

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        """Kernels go to the stream."""
        before, self.current = self.current, stream
        yield
        self.current = before

    @contextmanager
    def graph(self, graph: FakeGraph, stream: FakeStream, pool: object, capture_error_mode: str) -> Iterator[None]:
        """Keep what is queued on the stream, and on those that its events reach."""
        capture = stream.capture = Capture(stream)
        try:
            with self.stream(stream):
                yield
        finally:
            for member in capture.streams:
                member.capture = None
        if capture.open_streams:
            raise RuntimeError("a stream that joined the capture has not come back")
        graph.entries = [entry for _, entry, _ in capture.entries]
        graph.names = [[name for stream, _, name in capture.entries if stream is each] for each in capture.streams]

    def current_stream(self, index: int) -> FakeStream:
        """Where kernels go."""
        return self.current

    def synchronize(self) -> None:
        """Wait for every stream."""
        for stream in list(self.streams.values()):
            event = FakeEvent()
            event.record(stream)
            event.wait()

    def memory_reserved(self, index: int) -> int:
        """Nothing else of this process is on the GPU."""
        return 0

    def mem_get_info(self, index: int) -> tuple[int, int]:
        """(free, total)."""
        return self.total_bytes, self.total_bytes

    def set_per_process_memory_fraction(self, fraction: float, index: int) -> None:
        """Recorded."""
        self.fraction = fraction

    def empty_cache(self) -> None:
        """Nothing is cached."""

    def stop(self) -> None:
        """End every stream's thread."""
        for stream in self.streams.values():
            stream.stop()
