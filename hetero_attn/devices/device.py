"""What the lanes need of a GPU: memory under a budget, host memory it can reach, copies on streams, events.

Two streams, each running its work in order: `compute` (kernels, activations to and from the host) and `copies`
(weights through the staging ring). Calls queue work and return; an event orders one stream, or a thread, after the
work queued on a stream so far. A driver supplies, with the meaning they have in CUDA:

    kind, name, ops            "cuda" or "emulated"; for messages; the operations over its tensors
    stream(name)               a new in-order queue
    allocate(shape, dtype)     memory of the device, uninitialised; free(tensor) takes it back
    pin(tensor) -> bool        page-lock host memory; False where the system refuses
    unpin(tensor) -> bool      undo that; False where it was not page-locked
    copy(target, source, stream)   same shape and dtype; contiguous, or rows of equal length with a stride
    record(stream) -> event    wait(stream, event)    synchronize(event)
    current(stream)            a context in which this thread's kernels are queued on the stream
    close()                    after all queued work has ended, return everything
"""

import math
import warnings
from contextlib import AbstractContextManager
from typing import Any

import torch

from cpu_kernels import advise_huge_pages
from hetero_attn.devices.arena import Arena
from hetero_attn.errors import MemoryBudgetError
from placement.units import format_bytes


class Device:
    """One GPU, or what stands in for one: a budget, two streams and a driver.

    arena counts GPU memory, pinned the page-locked host memory; `pin_budget_bytes` None is as much as the system gives.
    """

    def __init__(self, driver: Any, budget_bytes: int | None = None, pin_budget_bytes: int | None = None) -> None:
        self.kind: str = driver.kind
        self.ops: Any = driver.ops
        self.arena = Arena(driver.name, budget_bytes)
        self.pinned = Arena("page-locked", pin_budget_bytes, "raise pinned_memory in the policy")
        self.compute = driver.stream("compute")
        self.copies = driver.stream("copies")
        self._driver = driver
        self._warned = False

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, kind: str) -> torch.Tensor:
        """Allocate uninitialised device memory, counted as `kind`; raises MemoryBudgetError over budget."""
        self.arena.reserve(math.prod(shape) * dtype.itemsize, kind)
        return self._driver.allocate(shape, dtype)

    def release(self, tensor: torch.Tensor, kind: str) -> None:
        """Return what `empty` gave; no queued work may still use it, and the caller drops its last reference."""
        self.arena.release(kind, tensor.nbytes)
        self._driver.free(tensor)

    def host_empty(self, shape: tuple[int, ...], dtype: torch.dtype, kind: str) -> tuple[torch.Tensor, bool]:
        """Allocate host memory for copies: (tensor, whether it is page-locked).

        Where pinning is refused the memory is ordinary, which is right but slower, and a warning says so once.
        """
        tensor = torch.empty(shape, dtype=dtype)
        advise_huge_pages(tensor)
        return tensor, tensor.numel() == 0 or self._pin(tensor, kind)

    def host_release(self, tensor: torch.Tensor, kind: str) -> None:
        """Return what `host_empty` gave; no queued work may still use it, and the caller drops its last reference."""
        if self._driver.unpin(tensor):
            self.pinned.release(kind, tensor.nbytes)

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: Any) -> None:
        """Queue a copy between the device and host memory, or within either, in the order of `stream`."""
        self._driver.copy(target, source, stream)

    def record(self, stream: Any) -> Any:
        """Mark the work queued on `stream` so far."""
        return self._driver.record(stream)

    def wait(self, stream: Any, event: Any) -> None:
        """Order later work of `stream` after `event`."""
        self._driver.wait(stream, event)

    def synchronize(self, event: Any) -> None:
        """Block the calling thread until `event` is reached."""
        self._driver.synchronize(event)

    def current(self) -> AbstractContextManager:
        """Queue the kernels that this thread launches inside on the compute stream."""
        return self._driver.current(self.compute)

    def close(self) -> None:
        """Release everything the device holds; all of its tensors become invalid."""
        self._driver.close()
        for arena in (self.arena, self.pinned):
            for kind in tuple(arena.used_bytes):
                arena.release(kind)

    def _pin(self, tensor: torch.Tensor, kind: str) -> bool:
        try:
            self.pinned.reserve(tensor.nbytes, kind)
        except MemoryBudgetError as refusal:
            return self._warn(str(refusal))
        if self._driver.pin(tensor):
            return True
        self.pinned.release(kind, tensor.nbytes)
        return self._warn(f"the system refused to page-lock {format_bytes(tensor.nbytes)} for {kind}")

    def _warn(self, reason: str) -> bool:
        if not self._warned:
            message = f"{reason}; copies to the GPU go through a small page-locked buffer and run slower"
            warnings.warn(message, stacklevel=4)
        self._warned = True
        return False
