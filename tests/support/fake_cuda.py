"""`torch.cuda` and libcuda on a machine without a GPU, so that the CUDA driver's own code runs there.

Every stream is a thread that runs its queue in order; an event, a copy, a kernel and a memory operation are entries of
a queue. As in CUDA a queue takes so many entries, a call that finds it full waits inside the driver, and meanwhile
holds the one lock that every other call needs, whichever thread makes it. GPU memory is host memory. Page-locking is
recorded, and may be refused. A stream that is being captured keeps
its entries instead, under the rules of CUDA: only streams that the capture's events have reached take part, and all of
them must have come back when it ends.
"""

from __future__ import annotations

import ctypes
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from gpu_kernels import reference
from hetero_attn.devices.libcuda import DEVICE, Copy2D, LibCuda

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


class _Function:
    """A function of the library: callable, and it takes the types that ctypes is told."""

    def __init__(self, work: Callable[..., int]) -> None:
        self._work = work

    def __call__(self, *arguments: Any) -> int:
        return self._work(*arguments) or 0


class FakeLibrary:
    """The functions of libcuda that `LibCuda` calls. refuse_pins: page-locking fails, as under a limit of the
    system."""

    def __init__(self, cuda: FakeCuda, refuse_pins: bool = False) -> None:
        self._cuda = cuda
        self._refuse_pins = refuse_pins
        self.registered: dict[int, int] = {}
        self.copies_before_failure: int | None = None
        self.memory_operations = 0

    def __getattr__(self, name: str) -> _Function:
        if name.startswith("_"):
            raise AttributeError(name)
        return _Function(getattr(self, f"_{name.removesuffix('_v2')}"))

    def _cuGetErrorName(self, result: int, word: Any) -> None:
        ctypes.cast(word, ctypes.POINTER(ctypes.c_char_p))[0] = b"CUDA_ERROR_FAKE"

    def _cuCtxGetCurrent(self, context: Any) -> None:
        ctypes.cast(context, ctypes.POINTER(ctypes.c_void_p))[0] = 7

    def _cuCtxSetCurrent(self, context: int) -> int:
        return 0 if context == 7 else 201

    def _locked(self, address: int) -> bool:
        return any(start <= address < start + size for start, size in self.registered.items())

    def _cuMemcpyHtoDAsync(self, target: int, source: int, count: int, stream: int) -> int:
        """Ordinary memory is taken into a buffer of the driver's before the call returns, as CUDA says it is."""
        keeper = None if self._locked(source) else ctypes.create_string_buffer(ctypes.string_at(source, count), count)
        start = source if keeper is None else ctypes.addressof(keeper)
        self._cuda.streams[stream].add(lambda keeper=keeper: ctypes.memmove(target, start, count) and None, "pull")
        return self._failure()

    def _failure(self) -> int:
        """CUDA_ERROR_UNKNOWN once, after as many copies as a test has set."""
        if self.copies_before_failure is None:
            return 0
        self.copies_before_failure -= 1
        if self.copies_before_failure >= 0:
            return 0
        self.copies_before_failure = None
        return 999

    def _cuMemcpyDtoDAsync(self, target: int, source: int, count: int, stream: int) -> None:
        self._cuda.streams[stream].add(lambda: ctypes.memmove(target, source, count) and None)

    def _cuMemcpyDtoHAsync(self, target: int, source: int, count: int, stream: int) -> None:
        """A copy to ordinary memory has been made when the call returns."""
        self._cuda.streams[stream].add(lambda: ctypes.memmove(target, source, count) and None, "push")
        if not self._locked(target):
            event = FakeEvent()
            event.record(self._cuda.streams[stream])
            event.wait()

    def _cuMemcpy2DAsync(self, request: Any, stream: int) -> None:
        copied = Copy2D.from_buffer_copy(ctypes.cast(request, ctypes.POINTER(Copy2D)).contents)
        source = copied.srcDevice if copied.srcMemoryType == DEVICE else copied.srcHost
        target = copied.dstDevice if copied.dstMemoryType == DEVICE else copied.dstHost

        def move() -> None:
            for row in range(copied.Height):
                ctypes.memmove(target + row * copied.dstPitch, source + row * copied.srcPitch, copied.WidthInBytes)

        self._cuda.streams[stream].add(move, "pull" if copied.dstMemoryType == DEVICE else "push")

    def _cuMemHostRegister(self, address: int, count: int, flags: int) -> int:
        pages = range(address // 4096, (address + count - 1) // 4096 + 1)
        taken = {
            page
            for start, size in self.registered.items()
            for page in range(start // 4096, (start + size - 1) // 4096 + 1)
        }
        assert all(stream.capture is None for stream in self._cuda.streams.values()), "page-locking in a capture"
        assert address % 4096 == 0 and not taken & set(pages), "page-locked ranges share a page"
        if self._refuse_pins:
            return 304
        self.registered[address] = count
        return 0

    def _cuMemHostUnregister(self, address: int) -> None:
        del self.registered[address]

    def _cuMemHostGetDevicePointer(self, mapped: Any, address: int, flags: int) -> None:
        ctypes.cast(mapped, ctypes.POINTER(ctypes.c_uint64))[0] = address

    def _cuStreamWriteValue32(self, stream: int, address: int, value: int, flags: int) -> None:
        self.memory_operations += 1
        word = ctypes.c_uint32.from_address(address)
        self._cuda.streams[stream].add(lambda: setattr(word, "value", value), "request")

    def _cuStreamWaitValue32(self, stream: int, address: int, value: int, flags: int) -> None:
        self.memory_operations += 1
        word = ctypes.c_uint32.from_address(address)

        def wait() -> None:
            deadline = time.monotonic() + 20
            while (word.value != value) if flags else (word.value - value) & 0x80000000:
                time.sleep(0)
                if time.monotonic() > deadline:
                    raise RuntimeError(f"a flag stays at {word.value}, {value} is waited for")

        self._cuda.streams[stream].add(wait, "wait")


class QueuedOps:
    """The reference operations as kernels: each call is an entry of the current stream.

    in_gpu_memory: whether a tensor is there, which tells a copy to the GPU from one to the host.
    """

    def __init__(self, cuda: FakeCuda, in_gpu_memory: Callable[[torch.Tensor], bool]) -> None:
        self._cuda = cuda
        self._in_gpu_memory = in_gpu_memory

    def copy_rows(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """A small copy, which is a kernel."""
        name = "pull" if self._in_gpu_memory(target) else "push"
        self._cuda.current.add(lambda: reference.copy_rows(target, source), name)

    def clear(self) -> None:
        """What the operations keep is counted from zero again."""
        self.cleared = getattr(self, "cleared", 0) + 1

    def rounded(self, x: torch.Tensor, weight_dtype: str) -> torch.Tensor:
        """As the reference: x itself."""
        return x

    def rounded_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor, fmt: str) -> Any:
        """One kernel."""
        self._cuda.current.add(lambda: reference.rounded_norm(x, weight, eps, out, fmt), "rounded_norm")
        return out

    def rounded_gated(self, gate_up: torch.Tensor, out: torch.Tensor, activation: str, fmt: str) -> Any:
        """One kernel."""
        self._cuda.current.add(lambda: reference.rounded_gated(gate_up, out, activation, fmt), "rounded_gated")
        return out

    def __getattr__(self, name: str) -> Callable[..., None]:
        operation = getattr(reference, name)
        return lambda *arguments: self._cuda.current.add(lambda: operation(*arguments), name)


def fake_driver(slab_bytes: int, refuse_pins: bool = False, queue_entries: int = QUEUE_ENTRIES) -> Any:
    """A CudaDriver over the fakes; `driver.fake` is the FakeCuda, to be stopped by the caller."""
    from hetero_attn.devices.cuda import CudaDriver

    class Driver(CudaDriver):
        """With kernels that this machine has."""

    cuda = FakeCuda(queue_entries=queue_entries)
    driver = Driver(0, slab_bytes, 1 << 20, cuda, LibCuda(FakeLibrary(cuda, refuse_pins)))
    slab = driver._memory
    driver.ops = QueuedOps(cuda, lambda tensor: slab.data_ptr() <= tensor.data_ptr() < slab.data_ptr() + slab_bytes)
    driver.fake = cuda
    return driver
