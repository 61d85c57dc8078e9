"""What the lanes need of a GPU: memory under a budget, host memory it can reach, copies on streams, events.

Two streams, each running its work in order: `compute` (kernels, activations to and from the host) and `copies`
(weights and older keys and values ahead of use, pages that change their place). Calls queue work and return; an event
orders one stream, or a thread, after the work queued on a stream so far. What a driver
supplies is `protocols.Driver`.
"""

import math
import warnings
from contextlib import AbstractContextManager
from typing import Any

import torch

from cpu_kernels import HUGE_PAGE_BYTES, fresh_memory
from hetero_attn.devices.arena import Arena
from hetero_attn.devices.protocols import Driver
from hetero_attn.errors import MemoryBudgetError
from placement.plan.units import format_bytes

PAGE_BYTES = 4096
LEAST_SHARED_BYTES = 1 << 20  # of which a part is page-locked where not all can be
STAYING = ("activations", "resident")  # kinds of GPU memory that no change of plan moves


class Device:
    """One GPU, or what stands in for one: a budget, two streams and a driver.

    arena counts GPU memory, pinned the page-locked host memory; `pin_budget_bytes` None is as much as the system gives.
    refused_kinds: of host memory that could not, or not all, be page-locked.
    """

    def __init__(self, driver: Driver, budget_bytes: int | None = None, pin_budget_bytes: int | None = None) -> None:
        self.driver = driver
        self.kind: str = driver.kind
        self.ops: Any = driver.ops
        self.arena = Arena(driver.name, budget_bytes)
        self.pinned = Arena("page-locked", pin_budget_bytes, "raise pinned_memory in the policy")
        self.compute = driver.stream("compute")
        self.copies = driver.stream("copies")
        self.refused_kinds: set[str] = set()
        self._refused: list[tuple[int, int]] = []

    @property
    def refused_pins(self) -> bool:
        """Whether some host memory could not be page-locked."""
        return bool(self.refused_kinds)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, kind: str) -> torch.Tensor:
        """Allocate uninitialised device memory, counted as `kind`; raises MemoryBudgetError over budget."""
        count = math.prod(shape) * dtype.itemsize
        self.arena.reserve(count, kind)
        try:
            return self.driver.allocate(shape, dtype, kind in STAYING)
        except torch.OutOfMemoryError as error:
            self.arena.release(kind, count)
            raise MemoryBudgetError(
                f"{self.arena.name} memory: {kind} needs {format_bytes(count)}, which the budget has and the GPU has "
                "not; "
                "other programs use it too, so lower gpu_memory"
            ) from error
        except BaseException:
            self.arena.release(kind, count)
            raise

    def release(self, tensor: torch.Tensor, kind: str) -> None:
        """Return what `empty` gave; no queued work may still use it, and the caller drops its last reference."""
        self.arena.release(kind, tensor.nbytes)
        self.driver.free(tensor)

    def host_empty(self, shape: tuple[int, ...], dtype: torch.dtype, kind: str) -> torch.Tensor:
        """Allocate page-locked host memory for copies.

        Where pinning is refused the memory is ordinary, which is right but slower, and a warning says so once.
        """
        tensor = _aligned_host_memory(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)
        if tensor.numel():
            self._pin(tensor, kind)
        return tensor

    def is_refused(self, tensor: torch.Tensor) -> bool:
        """Whether host memory, all or part of what `host_empty` gave, could not all be page-locked."""
        first, last = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        return any(start < last and first < stop for start, stop in self._refused)

    def host_release(self, tensor: torch.Tensor, kind: str) -> None:
        """Return what `host_empty` gave; no queued work may still use it, and the caller drops its last reference."""
        first, last = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        if tensor.numel() and self.driver.unpin(tensor):
            refused = sum(stop - start for start, stop in self._refused if first <= start < last)
            self.pinned.release(kind, tensor.nbytes - refused)
        self._refused = [(start, stop) for start, stop in self._refused if not first <= start < last]

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: Any) -> None:
        """Queue a copy between the device and host memory, or within either, in the order of `stream`."""
        self.driver.copy(target, source, stream)

    def reaches(self, target: torch.Tensor, source: torch.Tensor) -> bool:
        """Whether an operation on the compute stream may read `source` where it is, in host memory."""
        return self.driver.reaches(target, source, self.compute)

    def record(self, stream: Any, reuse: Any = None) -> Any:
        """Mark the work queued on `stream` so far, with an event of an earlier mark if its waits are all queued."""
        return self.driver.record(stream, reuse)

    def wait(self, stream: Any, event: Any) -> None:
        """Order later work of `stream` after `event`."""
        self.driver.wait(stream, event)

    def synchronize(self, event: Any) -> None:
        """Block the calling thread until `event` is reached."""
        self.driver.synchronize(event)

    def is_reached(self, event: Any) -> bool:
        """Whether `event` is reached already; what came before it is then visible."""
        return self.driver.is_reached(event)

    def write_flag(self, flag: torch.Tensor, value: int) -> None:
        """Queue on the compute stream: write `value`, below 2^32, to a flag; what was done before is then visible."""
        self.driver.write_flag(self.compute, flag, value)

    def wait_flag(self, flag: torch.Tensor, value: int, exactly: bool = False) -> None:
        """Queue on the compute stream: wait until a flag is at least `value` (as a counter that may wrap), or
        exactly."""
        self.driver.wait_flag(self.compute, flag, value, exactly)

    def capture(self) -> AbstractContextManager:
        """Keep what this thread queues inside, on any stream that follows the compute stream, instead of running it."""
        return self.driver.capture(self.compute)

    def current(self) -> AbstractContextManager:
        """Queue the kernels that this thread launches inside on the compute stream."""
        return self.driver.current(self.compute)

    def clear(self) -> None:
        """Bring back what operations keep from call to call, after work that was given up half-way and has ended."""
        with self.current():
            self.driver.clear()

    def close(self) -> None:
        """Release everything the device holds; all of its tensors become invalid."""
        self.driver.close()
        for arena in (self.arena, self.pinned):
            for kind in tuple(arena.used_bytes):
                arena.release(kind)

    def _pin(self, tensor: torch.Tensor, kind: str) -> None:
        """Page-lock all of it, else as many eighths of it, from its beginning, as the budget and the system allow.

        One run of memory, because a copy may not reach from one locked range into the next.
        """
        reason = self._lock(tensor, kind)
        if reason is None:
            return
        memory, locked = tensor.view(-1).view(torch.uint8), 0
        if tensor.nbytes >= LEAST_SHARED_BYTES:
            sizes = (eighths * tensor.nbytes // 8 // PAGE_BYTES * PAGE_BYTES for eighths in range(7, 0, -1))
            locked = next((size for size in sizes if self._lock(memory[:size], kind) is None), 0)
            reason = f"{reason} ({format_bytes(locked)} of it are)" if locked else reason
        self._refuse(reason, kind, memory[locked:])

    def _lock(self, memory: torch.Tensor, kind: str) -> str | None:
        """Page-lock memory and count it; what stands against it, None where it is done."""
        try:
            self.pinned.reserve(memory.nbytes, kind)
        except MemoryBudgetError as refusal:
            return str(refusal)
        if self.driver.pin(memory):
            return None
        self.pinned.release(kind, memory.nbytes)
        return f"the system refused to page-lock {format_bytes(memory.nbytes)} for {kind}"

    def _refuse(self, reason: str, kind: str, tensor: torch.Tensor) -> None:
        self._refused.append((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes))
        if not self.refused_pins:
            message = (
                f"{reason}; what is not page-locked is copied to and from the GPU through a small page-locked buffer, "
                "which is slower"
            )
            warnings.warn(message, stacklevel=4)
        self.refused_kinds.add(kind)


def _aligned_host_memory(count: int) -> torch.Tensor:
    """uint8 [count] that begins on a page (a huge one if it is large) and shares none with other allocations."""
    if count >= HUGE_PAGE_BYTES:
        return fresh_memory((count,), torch.uint8)
    memory = torch.empty((-(-count // PAGE_BYTES) + 1) * PAGE_BYTES, dtype=torch.uint8, device="cpu")
    start = -memory.data_ptr() % PAGE_BYTES
    return memory[start : start + count]
