"""The GPU side of the lanes behind one small interface: memory under a budget, copies on streams, events.

    empty(shape, dtype, kind)       memory counted against the budget
    copy(target, source, stream)    asynchronous on real hardware, in stream order
    record(stream) -> event         marks the work queued on a stream so far
    upload(table)                   a step's small integer table, on the device
    wait(stream, event)             later work of the stream runs after the event
    synchronize(event)              the calling thread waits for the event
    ops                             the module whose functions compute on this device's tensors

`EmulatedDevice` runs the same calls on a machine without a GPU: its memory is host memory behind an enforced budget,
its operations are the reference ones, its streams run each call as it is made. Scratch inside a reference operation
is not counted; everything the runtime allocates is.
"""

import math
from dataclasses import dataclass, field

import torch

from gpu_kernels import reference
from hetero_attn.errors import MemoryBudgetError
from placement.units import format_bytes


@dataclass(slots=True)
class Arena:
    """Counts allocations of one memory by kind and refuses the one that would pass the budget.

    `budget_bytes` None means unlimited. Memory is returned with `release`, kind by kind; counters reach zero when all
    is.
    """

    name: str
    budget_bytes: int | None = None
    used_bytes: dict[str, int] = field(default_factory=dict)
    peak_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """Bytes in use, all kinds."""
        return sum(self.used_bytes.values())

    def reserve(self, count: int, kind: str) -> None:
        """Count `count` bytes of `kind`; raises MemoryBudgetError when the budget would be passed."""
        if self.budget_bytes is not None and self.total_bytes + count > self.budget_bytes:
            raise MemoryBudgetError(
                f"{self.name} memory: {kind} needs {format_bytes(count)}, but {format_bytes(self.total_bytes)} of the "
                f"{format_bytes(self.budget_bytes)} budget are in use; raise gpu_memory or shorten the context"
            )
        self.used_bytes[kind] = self.used_bytes.get(kind, 0) + count
        self.peak_bytes = max(self.peak_bytes, self.total_bytes)

    def release(self, kind: str) -> None:
        """Forget every allocation of `kind`."""
        self.used_bytes.pop(kind, None)


@dataclass(frozen=True, slots=True)
class EmulatedStream:
    """A queue whose work has already run: calls on an emulated device execute as they are made."""

    name: str


@dataclass(frozen=True, slots=True)
class EmulatedEvent:
    """A point on an emulated stream; always reached."""

    stream: EmulatedStream


class EmulatedDevice:
    """A stand-in for a GPU: host memory under a hard budget, reference operations, the same calls as real hardware."""

    kind = "emulated"
    ops = reference

    def __init__(self, budget_bytes: int | None = None) -> None:
        self.arena = Arena("emulated GPU", budget_bytes)
        self.compute = EmulatedStream("compute")
        self.copies = EmulatedStream("copies")

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, kind: str) -> torch.Tensor:
        """Allocate uninitialised device memory, counted as `kind`; raises MemoryBudgetError over budget."""
        self.arena.reserve(math.prod(shape) * dtype.itemsize, kind)
        return torch.empty(shape, dtype=dtype)

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: EmulatedStream) -> None:
        """Copy between the device and host memory, or within either, in the order of `stream`."""
        target.copy_(source)

    def upload(self, table: torch.Tensor) -> torch.Tensor:
        """Bring a small table of one step (positions, slots, page tables) to the device; planned as resident."""
        return table

    def record(self, stream: EmulatedStream) -> EmulatedEvent:
        """Mark the work queued on `stream` so far."""
        return EmulatedEvent(stream)

    def wait(self, stream: EmulatedStream, event: EmulatedEvent) -> None:
        """Order later work of `stream` after `event`."""

    def synchronize(self, event: EmulatedEvent) -> None:
        """Block the calling thread until `event` is reached."""

    def close(self) -> None:
        """Release everything the device holds."""
        for kind in tuple(self.arena.used_bytes):
            self.arena.release(kind)
