"""A device driver whose GPU and bus take exactly the time that a hardware profile says, and compute nothing.

It has what a real GPU has for timing: queues that run beside the calling thread, events, copies that overlap with
kernels.
A queue is a clock: an operation starts when the one before it has ended and ends after bytes / rate or operations /
rate; waiting for an event is sleeping until its time. So the CPU lane, Python, the hand-overs between the lanes and the
way they overlap are real, and the GPU's and the bus's own speeds are the set ones. Results have no meaning. Copies of
weights cost no DRAM traffic here, so the profile must not slow the CPU lane while they run.
"""

import ctypes
import math
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from placement.machine.hardware import HardwareProfile

BLOCK_FEATURES = 16
# Activations and tables up to this size are really copied: page tables steer the CPU kernels.
COPIED_BYTES = 1 << 18
PR_SET_TIMERSLACK = 29


@dataclass(slots=True)
class PacedStream:
    """A queue; `ready_at` is when the work given to it so far will have ended."""

    name: str
    ready_at: float = 0.0

    def take(self, seconds: float) -> None:
        """Queue work of this length."""
        self.ready_at = max(self.ready_at, time.perf_counter()) + seconds


@dataclass(frozen=True, slots=True)
class PacedEvent:
    """A point in time."""

    at: float


class PacedOps:
    """The operations of the lanes' contract; each takes its time on the compute stream and writes nothing."""

    def __init__(self, machine: HardwareProfile) -> None:
        self._machine = machine
        self.stream: PacedStream | None = None

    def rounded(self, x, weight_dtype) -> torch.Tensor:
        """Counted with the products."""
        return x

    def rounded_norm(self, x, weight, eps, out, weight_dtype) -> torch.Tensor:
        """Bytes in and out."""
        self._move(x, out)
        return out

    def rounded_gated(self, gate_up, out, activation, weight_dtype) -> torch.Tensor:
        """Bytes in and out."""
        self._move(gate_up, out)
        return out

    def linear(self, x, weight, weight_dtype, bias, out, accumulate=False) -> None:
        """The longer of weight bytes over GPU memory and operations."""
        operations = 2 * x.shape[0] * x.shape[1] * weight.shape[0] * BLOCK_FEATURES
        machine = self._machine
        self.stream.take(max(weight.nbytes / machine.gpu_bytes_per_s, operations / machine.gpu_flops.of(weight_dtype)))

    def rms_norm(self, x, weight, eps, out, accumulate=False) -> None:
        """Bytes in and out."""
        self._move(x, out)

    def silu_mul(self, gate_up, out) -> None:
        """Bytes in and out."""
        self._move(gate_up, out)

    def gelu_mul(self, gate_up, out) -> None:
        """Bytes in and out."""
        self._move(gate_up, out)

    def layer_norm(self, x, weight, bias, eps, out) -> None:
        """Bytes in and out."""
        self._move(x, out)

    def gelu(self, x, out) -> None:
        """Bytes in and out."""
        self._move(x, out)

    def rope_append(self, qkv, positions, rotation, q, pages, slots) -> None:
        """Bytes in and out."""
        self._move(qkv, q)

    def decode_attention(self, q, pages, keys, scale, into, cap=0.0) -> None:
        """K and V of every sequence's segment."""
        tokens = int((keys.stop - keys.start).sum())
        self._attend(tokens, tokens, keys.table.shape[1], q, pages.k)

    def prefill_attention(self, q, pages, keys, scale, into, cap=0.0) -> None:
        """K and V of the segment once, operations of the keys that each row sees."""
        seen = sum(max(0, min(keys.stop, keys.q_start + row + 1) - keys.start) for row in range(q.shape[0]))
        self._attend(keys.stop - keys.start, seen, keys.table.shape[0], q, pages.k)

    def merge(self, partials, into) -> None:
        """Bytes in and out."""
        self._move(*(partial.out for partial in partials), into.out)

    def _attend(self, tokens: int, seen: int, groups: int, q: torch.Tensor, k_pages: torch.Tensor) -> None:
        machine = self._machine
        read = 2 * tokens * groups * k_pages.shape[-1] * k_pages.element_size()
        operations = 4 * q.shape[-1] * q.shape[-2] * seen
        self.stream.take(max(read / machine.gpu_bytes_per_s, operations / machine.gpu_attention_ops_per_s))

    def _move(self, *tensors: torch.Tensor) -> None:
        moved = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        self.stream.take(moved / self._machine.gpu_bytes_per_s)


class PacedDriver:
    """See `hetero_attn.devices.device` for what each call means. machine: the rates to keep."""

    kind = "emulated"
    name = "paced GPU"

    def __init__(self, machine: HardwareProfile) -> None:
        self.ops = PacedOps(machine)
        self._bytes_per_s = machine.h2d_bytes_per_s
        _wake_precisely()

    def stream(self, name: str) -> PacedStream:
        """A new queue; the operations run on the one called compute."""
        stream = PacedStream(name)
        if name == "compute":
            self.ops.stream = stream
        return stream

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype, stays: bool) -> torch.Tensor:
        """Host memory in the place of GPU memory; pages are touched when something writes them, which is seldom."""
        return torch.empty(shape, dtype=dtype) if math.prod(shape) > COPIED_BYTES else torch.zeros(shape, dtype=dtype)

    def free(self, tensor: torch.Tensor) -> None:
        """Memory goes with its tensors."""

    def pin(self, tensor: torch.Tensor) -> bool:
        """Pretend to page-lock."""
        return True

    def unpin(self, tensor: torch.Tensor) -> bool:
        """Pretend to undo it."""
        return True

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: PacedStream) -> None:
        """Take the bus's time; both directions have the same rate."""
        size = source.numel() * source.element_size()
        if size <= COPIED_BYTES:
            target.copy_(source)
        stream.take(size / self._bytes_per_s)

    def reaches(self, target: torch.Tensor, source: torch.Tensor, stream: PacedStream) -> bool:
        """Host memory counts as out of reach, so that everything passes the bus."""
        return False

    def record(self, stream: PacedStream, reuse: PacedEvent | None = None) -> PacedEvent:
        """When the work queued so far will have ended."""
        return PacedEvent(stream.ready_at)

    def wait(self, stream: PacedStream, event: PacedEvent) -> None:
        """Later work starts no earlier than the event."""
        stream.ready_at = max(stream.ready_at, event.at)

    def synchronize(self, event: PacedEvent) -> None:
        """Sleep until the event."""
        left = event.at - time.perf_counter()
        if left > 0:
            time.sleep(left)

    def is_reached(self, event: PacedEvent) -> bool:
        """Whether its time has come."""
        return event.at <= time.perf_counter()

    def write_flag(self, stream: PacedStream, flag: torch.Tensor, value: int) -> None:
        """Write when the queue has come this far; the caller waits for it."""
        self.synchronize(self.record(stream))
        flag.fill_(value)

    def wait_flag(self, stream: PacedStream, flag: torch.Tensor, value: int, exactly: bool) -> None:
        """Block the caller until it is there; later work starts no earlier."""
        while int(flag) != value if exactly else (int(flag) - value) & 0x80000000:
            time.sleep(0)
        stream.take(0.0)

    def delay(self, stream: PacedStream) -> None:
        """Nothing is queued that a launch could hold up."""

    def mark(self, stream: PacedStream) -> float:
        """When the work queued so far will have ended."""
        return stream.ready_at

    def seconds_between(self, mark: float, later: float) -> float:
        """Seconds from one mark to a later one."""
        return later - mark

    def capture(self, stream: PacedStream) -> AbstractContextManager:
        """Not possible: a clock has nothing to replay."""
        raise NotImplementedError("a paced GPU computes nothing and captures none")

    def current(self, stream: PacedStream) -> AbstractContextManager:
        """There is one compute stream."""
        return nullcontext()

    def clear(self) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        """Memory goes with its tensors."""


def _wake_precisely() -> None:
    """Let the system wake this thread, and those it starts, within microseconds of the time asked for."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, 1000, 0, 0, 0)
