"""The driver of a CUDA device: streams, events and one allocation from torch, copies and page-locking from libcuda.

All memory of the device is taken once, at the start, in one piece; afterwards only kernels' temporaries come from
torch's allocator, which is told to stay under the rest of the budget. Copies go through the driver library, because
torch copies rows with a stride by way of temporaries and cannot leave them out of a captured graph; small ones of
activations between kernels are kernels themselves.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from math import prod
from typing import Any

import torch

from gpu_kernels.device_ops import DeviceOps
from hetero_attn.devices.libcuda import DEVICE, HOST, WAIT_EQ, WAIT_GEQ, LibCuda
from hetero_attn.devices.slab import ALIGN_BYTES, Slab
from hetero_attn.errors import MemoryBudgetError
from placement.plan.units import format_bytes

PAGE_BYTES = 4096
# Up to here a copy is a kernel: 16 KiB each way took 3.6 us by kernels and 13.1 us by the copy engine on an H100.
# Beyond some tens of KiB the bus takes as long as the engine's start, and a kernel would hold GPU cores meanwhile.
KERNEL_COPY_BYTES = 64 << 10
DELAY_CYCLES = 1_000_000  # about half a millisecond; Python queues an operation of several kernels in a third of that


class CudaDriver:
    """See `hetero_attn.devices.device` for what each call means.

    index: of the device. slab_bytes: its memory for everything that `allocate` gives. temporary_bytes: what kernels may
    take beside it. cuda, library: `torch.cuda` and libcuda, or what a test puts in their place. int8_rows: the most
    rows that the card multiplies in int8, by weight format.
    """

    kind = "cuda"

    def __init__(
        self,
        index: int,
        slab_bytes: int,
        temporary_bytes: int,
        cuda: Any = torch.cuda,
        library: LibCuda | None = None,
        int8_rows: Mapping[str, int] | None = None,
    ) -> None:
        self.name = f"GPU {index}"
        self._cuda = cuda
        self._index = index
        self._library = library or LibCuda()
        with cuda.device(index):
            cuda.synchronize()
            self._context = self._library.current_context()
            self._limit(slab_bytes + temporary_bytes)
            self._memory = self._take(slab_bytes)
            self.ops: Any = DeviceOps(self._device(), int8_rows)
            cuda.synchronize()  # other streams use what the operations keep
        self._slab = Slab(slab_bytes)
        self._pool: Any = None
        self._addresses: dict[int, int] = {}
        self._pinned: dict[int, torch.Tensor] = {}

    def stream(self, name: str) -> Any:
        """A new queue."""
        return self._cuda.Stream(device=self._index)

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype, stays: bool) -> torch.Tensor:
        """A part of the one allocation, uninitialised; what stays lies at its end, out of the way of the rest."""
        count = prod(shape) * dtype.itemsize
        if count == 0:
            return self._memory[:0].view(dtype).view(shape)
        offset = self._slab.take(count, stays)
        return self._memory[offset : offset + count].view(dtype).view(shape)

    def free(self, tensor: torch.Tensor) -> None:
        """Take back what `allocate` gave."""
        if tensor.numel():
            self._slab.give(tensor.data_ptr() - self._memory.data_ptr())

    def pin(self, tensor: torch.Tensor) -> bool:
        """Page-lock host memory, which begins on a page and is alone on its last one."""
        self._library.set_context(self._context)
        locked = self._library.register(tensor.data_ptr(), -(-tensor.nbytes // PAGE_BYTES) * PAGE_BYTES)
        if locked:
            self._pinned[tensor.data_ptr()] = tensor
        return locked

    def unpin(self, tensor: torch.Tensor) -> bool:
        """Undo that; False where it was not page-locked."""
        if self._pinned.pop(tensor.data_ptr(), None) is None:
            return False
        self._library.set_context(self._context)
        self._library.unregister(tensor.data_ptr())
        self._addresses.clear()
        return True

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: Any) -> None:
        """Queue a copy; one that touches ordinary host memory may block until it is made."""
        assert target.shape == source.shape and target.dtype == source.dtype, (target.shape, source.shape)
        if target.numel() == 0:
            return
        if self.reaches(target, source, stream):
            self.ops.copy_rows(*(tensor.view(-1, tensor.shape[-1]) for tensor in (target, source)))
            return
        self._library.set_context(self._context)
        to, start, queue = self._place(target), self._place(source), stream.cuda_stream
        if target.is_contiguous() and source.is_contiguous():
            self._library.copy(to, start, target.nbytes, queue)
            return
        pitches = [_pitch(tensor) for tensor in (target, source)]
        width = target.shape[1] * target.itemsize
        self._library.copy_rows(to, pitches[0], start, pitches[1], width, target.shape[0], queue)

    def record(self, stream: Any, reuse: Any = None) -> Any:
        """Mark the work queued so far; an event is made only where none is to be used again."""
        event = self._cuda.Event() if reuse is None else reuse
        event.record(stream)
        return event

    def delay(self, stream: Any) -> None:
        """Keep the stream busy for longer than it takes to queue an operation."""
        with self._cuda.stream(stream):
            self._cuda._sleep(DELAY_CYCLES)

    def mark(self, stream: Any) -> Any:
        """A point in time of the stream, by the device's clock."""
        event = self._cuda.Event(enable_timing=True)
        event.record(stream)
        return event

    def seconds_between(self, mark: Any, later: Any) -> float:
        """Seconds from one mark to a later one, both reached."""
        return mark.elapsed_time(later) / 1e3

    def wait(self, stream: Any, event: Any) -> None:
        """Order later work of the stream after the event."""
        stream.wait_event(event)

    def synchronize(self, event: Any) -> None:
        """Block the calling thread, without Python's lock, until the event is reached."""
        event.synchronize()

    def is_reached(self, event: Any) -> bool:
        """Ask, without waiting."""
        return event.query()

    def write_flag(self, stream: Any, flag: torch.Tensor, value: int) -> None:
        """Queue a write by the stream's front end; no kernel is launched."""
        self._library.set_context(self._context)
        self._library.write_value(stream.cuda_stream, self._mapped(flag), value)

    def wait_flag(self, stream: Any, flag: torch.Tensor, value: int, exactly: bool) -> None:
        """Queue a wait by the stream's front end; only the host can end it."""
        self._library.set_context(self._context)
        self._library.wait_value(stream.cuda_stream, self._mapped(flag), value, WAIT_EQ if exactly else WAIT_GEQ)

    @contextmanager
    def capture(self, stream: Any) -> Iterator[Any]:
        """A CUDA graph of what is queued inside; the temporaries of all graphs share one pool of memory."""
        if self._pool is None:
            self._pool = self._cuda.graph_pool_handle()
        graph = self._cuda.CUDAGraph()
        with self._cuda.graph(graph, stream=stream, pool=self._pool, capture_error_mode="thread_local"):
            yield graph

    @contextmanager
    def current(self, stream: Any) -> Iterator[None]:
        """Kernels that this thread launches inside go to the stream."""
        self._library.set_context(self._context)
        with self._cuda.device(self._index), self._cuda.stream(stream):
            yield

    def clear(self) -> None:
        """Count the splits of a decode attention from zero again."""
        self.ops.clear()

    def close(self) -> None:
        """Wait for the device, give back all memory and lift the limit; idempotent."""
        if self._memory is None:
            return
        with self._cuda.device(self._index):
            with suppress(RuntimeError):  # a device that met a fault answers everything with it
                self._cuda.synchronize()
            for tensor in tuple(self._pinned.values()):
                with suppress(Exception):
                    self.unpin(tensor)
            self._memory = None
            with suppress(RuntimeError):
                self._cuda.empty_cache()
                self._cuda.set_per_process_memory_fraction(1.0, self._index)

    def _mapped(self, tensor: torch.Tensor) -> int:
        """The device's address of page-locked memory."""
        host = tensor.data_ptr()
        if host not in self._addresses:
            self._addresses[host] = self._library.device_address(host)
        return self._addresses[host]

    def reaches(self, target: torch.Tensor, source: torch.Tensor, stream: Any) -> bool:
        """Whether both are small activations that the GPU reaches, and the stream is that of this thread's kernels."""
        if target.nbytes > KERNEL_COPY_BYTES or target.dtype != torch.float32 or target.dim() not in (1, 2):
            return False
        if self._cuda.current_stream(self._index).cuda_stream != stream.cuda_stream:
            return False
        return all(tensor.stride(-1) == 1 and self._is_reached(tensor) for tensor in (target, source))

    def _is_reached(self, tensor: torch.Tensor) -> bool:
        """Whether kernels may read and write a tensor: in GPU memory, or in page-locked host memory."""
        place, start = self._place(tensor)
        if place == DEVICE or start in self._addresses:
            return True
        locked = ((first, first + whole.nbytes) for first, whole in self._pinned.items())
        if any(first <= start < stop for first, stop in locked):
            self._mapped(tensor)
            return True
        return False

    def _limit(self, count: int) -> None:
        """Let torch's allocator refuse what would pass the budget, whoever asks."""
        _, total = self._cuda.mem_get_info(self._index)
        allowed = self._cuda.memory_reserved(self._index) + count + ALIGN_BYTES
        self._cuda.set_per_process_memory_fraction(min(1.0, allowed / total), self._index)

    def _take(self, count: int) -> torch.Tensor:
        try:
            return torch.empty(count, dtype=torch.uint8, device=self._device())
        except torch.OutOfMemoryError as error:
            free, total = self._cuda.mem_get_info(self._index)
            raise MemoryBudgetError(
                f"{self.name} has {format_bytes(free)} of {format_bytes(total)} free, but this plan takes "
                f"{format_bytes(count)} at once; lower gpu_memory or end other programs on the GPU"
            ) from error

    def _device(self) -> Any:
        return getattr(self._cuda, "stand_in", f"cuda:{self._index}")

    def _place(self, tensor: torch.Tensor) -> tuple[int, int]:
        start = self._memory.data_ptr()
        inside = start <= tensor.data_ptr() < start + self._slab.size_bytes
        return (DEVICE if inside else HOST), tensor.data_ptr()


def _pitch(tensor: torch.Tensor) -> int:
    """Bytes from one row to the next of [rows, columns]."""
    assert tensor.dim() == 2 and (tensor.stride(1) == 1 or tensor.shape[1] == 1), (tensor.shape, tensor.stride())
    return tensor.stride(0) * tensor.itemsize
