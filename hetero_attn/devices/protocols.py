"""The contract of a driver, of a GPU or of what stands in for one: `CudaDriver`, `EmulatedDriver` and those of the
tests. That of the operations is `cpu_kernels.contract`.
"""

from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor


class Driver(Protocol):
    """A GPU's memory, streams and events, with the meaning they have in CUDA. Calls queue work and return.

    kind: "cuda" or "emulated"; name: for messages; ops: over its tensors. A stream runs its work in order; an event is
    a point on one. flag: int64 [1] in page-locked host memory.
    """

    @property
    def kind(self) -> str:
        """The kind of device that a plan is made for."""

    @property
    def name(self) -> str:
        """What messages call the device."""

    @property
    def ops(self) -> Any:
        """An `Ops` over tensors of the device, and copy_rows and add_rows."""

    def stream(self, name: str) -> Any:
        """A new in-order queue."""

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype, stays: bool) -> Tensor:
        """Memory of the device, uninitialised. stays: until the end, whatever the plan."""

    def free(self, tensor: Tensor) -> None:
        """Take back what `allocate` gave."""

    def pin(self, tensor: Tensor) -> bool:
        """Page-lock host memory; False where the system refuses."""

    def unpin(self, tensor: Tensor) -> bool:
        """Undo that; False where it was not page-locked."""

    def copy(self, target: Tensor, source: Tensor, stream: Any) -> None:
        """Same shape and dtype; contiguous, or rows of equal length with a stride; by an engine or a kernel, in the
        stream's order either way."""

    def reaches(self, target: Tensor, source: Tensor, stream: Any) -> bool:
        """Whether kernels of the stream read `source`, in host memory, as fast as it could be copied to the device."""

    def record(self, stream: Any, reuse: Any = None) -> Any:
        """An event after the work queued on the stream so far: a new one, or `reuse`, for which nobody is to wait
        any more but whose waits were queued; those stay what they were."""

    def wait(self, stream: Any, event: Any) -> None:
        """Let what is queued on the stream from now on come after the event."""

    def synchronize(self, event: Any) -> None:
        """Block the calling thread until the event."""

    def is_reached(self, event: Any) -> bool:
        """Whether the event is reached, without waiting for it."""

    def write_flag(self, stream: Any, flag: Tensor, value: int) -> None:
        """Write a flag once the work queued so far is done."""

    def wait_flag(self, stream: Any, flag: Tensor, value: int, exactly: bool) -> None:
        """Hold the stream until the flag has the value, or, unless `exactly`, a later one."""

    def capture(self, stream: Any) -> AbstractContextManager:
        """A context whose graph's `replay()` queues again what was queued inside."""

    def current(self, stream: Any) -> AbstractContextManager:
        """A context in which this thread's kernels are queued on the stream."""

    def delay(self, stream: Any) -> None:
        """Queue nothing that takes longer than a launch; for measurements."""

    def mark(self, stream: Any) -> Any:
        """A point in time of the stream."""

    def seconds_between(self, mark: Any, later: Any) -> float:
        """Seconds between two marks, both reached."""

    def clear(self) -> None:
        """Bring back what operations keep from call to call."""

    def close(self) -> None:
        """After all queued work has ended, return everything."""
