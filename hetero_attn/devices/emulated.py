"""The driver of a machine without a GPU: host memory, reference operations, streams that run each call as it is made.

Scratch inside a reference operation is not counted against a budget; everything the runtime allocates is.
"""

import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from gpu_kernels import reference


@dataclass(frozen=True, slots=True)
class EmulatedStream:
    """A queue whose work has already run."""

    name: str


@dataclass(frozen=True, slots=True)
class EmulatedEvent:
    """A point on an emulated stream; always reached."""

    stream: EmulatedStream


class EmulatedDriver:
    """See `hetero_attn.devices.protocols` for what each call means."""

    kind = "emulated"
    name = "emulated GPU"
    ops = reference

    def stream(self, name: str) -> EmulatedStream:
        """A new queue."""
        return EmulatedStream(name)

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype, stays: bool) -> torch.Tensor:
        """Uninitialised host memory in the place of GPU memory."""
        return torch.empty(shape, dtype=dtype, device="cpu")

    def free(self, tensor: torch.Tensor) -> None:
        """Memory goes with its tensors."""

    def pin(self, tensor: torch.Tensor) -> bool:
        """Pretend to page-lock."""
        return True

    def unpin(self, tensor: torch.Tensor) -> bool:
        """Pretend to have undone that."""
        return True

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: EmulatedStream) -> None:
        target.copy_(source)

    def reaches(self, target: torch.Tensor, source: torch.Tensor, stream: EmulatedStream) -> bool:
        """Host memory counts as out of reach, so that everything passes the bus."""
        return False

    def record(self, stream: EmulatedStream, reuse: EmulatedEvent | None = None) -> EmulatedEvent:
        """Mark the work queued so far, which has run."""
        return EmulatedEvent(stream)

    def wait(self, stream: EmulatedStream, event: EmulatedEvent) -> None:
        pass

    def synchronize(self, event: EmulatedEvent) -> None:
        pass

    def is_reached(self, event: EmulatedEvent) -> bool:
        """All work has run."""
        return True

    def write_flag(self, stream: EmulatedStream, flag: torch.Tensor, value: int) -> None:
        flag.fill_(value)

    def wait_flag(self, stream: EmulatedStream, flag: torch.Tensor, value: int, exactly: bool) -> None:
        """Block the caller until it is there."""
        while int(flag) != value if exactly else (int(flag) - value) & 0x80000000:
            time.sleep(0)

    def delay(self, stream: EmulatedStream) -> None:
        """Nothing is queued that a launch could hold up."""

    def mark(self, stream: EmulatedStream) -> float:
        """The time now, for work runs as it is queued."""
        return time.perf_counter()

    def seconds_between(self, mark: float, later: float) -> float:
        """Seconds from one mark to a later one."""
        return later - mark

    def capture(self, stream: EmulatedStream) -> AbstractContextManager:
        """Not possible: work runs as it is queued."""
        raise NotImplementedError("an emulated GPU runs its work at once and captures none")

    def current(self, stream: EmulatedStream) -> AbstractContextManager:
        """Kernels run where they are called."""
        return nullcontext()

    def clear(self) -> None:
        """The reference operations keep nothing."""

    def close(self) -> None:
        """Memory goes with its tensors."""
