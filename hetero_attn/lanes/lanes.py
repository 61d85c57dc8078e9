"""The lanes and what passes between them: one device, one host worker, copies and events.

Only this module and those it builds on (`devices`, `staging`, `cache.stream`, `tables`, `handover`) own streams,
events, page-locked buffers and threads. Exactly one thread calls the CPU kernels: the worker while lanes overlap, else
the caller's own.

An activation that more than one lane needs is an `Activation`: the same rows in GPU memory and in host memory. Each
side holds the columns that its lanes produced; `push` and `pull` bring over the others.

Why no race can happen: copies of activations and kernels share one stream, so they run in the order they are queued.
Host jobs run in the order they are given. A job that follows a copy waits for it (an event), so it reads only what has
arrived and overwrites only what has left. A copy that follows a job is queued behind `order_device` or `join`; where
activations could not be page-locked, the caller itself waits for the job, whatever the hand-over.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from cpu_kernels import CpuKernels
from hetero_attn.cache.stream import PageStream
from hetero_attn.devices import Device
from hetero_attn.devices.copy_ahead import CopyAhead
from hetero_attn.lanes.activation import Activation
from hetero_attn.lanes.handover import Handover, InOrder
from hetero_attn.lanes.rest import torch_at_rest
from hetero_attn.lanes.staging import StagingRing
from hetero_attn.lanes.tables import StepTables

HANDED_OVER = ("activations", "resident")  # kinds of host memory that an Activation may have


class Lanes:
    """A device (None: CPU only), the CPU kernels, the order between them, the staging ring and the step's tables.

    handover: how host jobs and GPU work wait for each other; None runs everything in order on the calling thread, the
    plain path. waited_s: seconds for which the caller waited for the CPU lane since the start.
    """

    def __init__(
        self,
        host_ops: CpuKernels,
        device: Device | None = None,
        ring: StagingRing | None = None,
        tables: StepTables | None = None,
        handover: Handover | None = None,
        pages: PageStream | None = None,
    ) -> None:
        self.host_ops = host_ops
        self.device = device
        self.ring = ring
        self.tables = tables
        self.handover: Handover = handover or InOrder(device)
        self.pages = pages
        self._copied = False
        self._inputs: object | None = None
        self._is_observed = False
        self._called_s = 0.0
        self.waited_s = 0.0

    @property
    def cpu_lane_s(self) -> float:
        """Seconds for which the CPU lane worked so far, in calls from Python and in recorded programs."""
        return self._called_s + self.handover.worked_s

    @property
    def streamed_bytes(self) -> int:
        """Bytes of weights and of older keys and values that were copied to the GPU ahead of use so far."""
        return 0 if self.device is None else sum(ahead.copied_bytes for ahead in self._ahead)

    @property
    def handover_s(self) -> float:
        """Seconds that hand-overs themselves took so far: waking the worker, noticing that it has finished."""
        return self.handover.overhead_s

    @property
    def can_replay(self) -> bool:
        """Whether a recorded decode step can be run again, if it streams nothing that passes the calling thread."""
        if self._is_observed or self._copies_at_once:
            return False
        return self.device is None or self.handover.captures

    @property
    def main_ops(self):
        """The operations of the place where the residual stream lives."""
        return self.host_ops if self.device is None else self.device.ops

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Queue a copy between GPU and host memory, in order with the GPU's compute."""
        self._copied = True
        self.device.copy(target, source, self.device.compute)

    def upload(self, tables: Sequence[torch.Tensor], through: StepTables | None = None) -> list[torch.Tensor]:
        """Bring a step's integer tables to the device, all in one copy; they stay until the next step's. through:
        buffers of their own, where they stay until the next ones there."""
        self._await_inputs()
        self._copied = True
        return (through or self.tables).upload(tables)

    def inputs_queued(self) -> None:
        """The copies of a step's tables and embedded rows are queued: the next step's may follow once they were
        made."""
        if self.device is not None:
            self._inputs = self.device.record(self.device.compute)

    def _await_inputs(self) -> None:
        """Block the caller until the host memory that the last step's inputs came from may be written again."""
        if self._inputs is not None:
            self.device.synchronize(self._inputs)
            self._inputs = None

    @contextmanager
    def copies_beside(self) -> Iterator[None]:
        """Around a step that is captured: the ring's copies branch off from the compute stream and come back to it.

        What was queued before belongs to no capture, so the first job asks for itself.
        """
        self._copied = True
        compute, copies = self.device.compute, self.device.copies
        if self.ring is not None:
            self.device.wait(copies, self.device.record(compute))
        yield
        if self.ring is not None:
            self.device.wait(compute, self.device.record(copies))

    def cpu_lane(self) -> AbstractContextManager[None]:
        """Count the time of the enclosed work as the CPU lane's."""
        return _CpuLane(self)

    def main_lane(self) -> AbstractContextManager[None]:
        """Around work that runs where the residual stream lives: the CPU lane's time when there is no device."""
        return self.cpu_lane() if self.device is None else nullcontext()

    def torch_at_rest(self) -> AbstractContextManager[None]:
        """What a thread needs around a step: see `rest.torch_at_rest`."""
        return torch_at_rest(self.device)

    @contextmanager
    def using(self, host_ops: Any, device: Any, handover: Handover, can_replay: bool = True) -> Iterator[None]:
        """Within this, others stand in for the CPU's operations, the device and the hand-over.

        host_ops, device: what answers as the lanes' own do. can_replay: whether recorded steps may be replayed.
        """
        kept = self.host_ops, self.device, self.handover, self._is_observed
        self._use(host_ops, device, handover, self._is_observed or not can_replay)
        try:
            yield
        finally:
            self._use(*kept)

    def _use(self, host_ops: Any, device: Any, handover: Handover, is_observed: bool) -> None:
        self.host_ops, self.device, self.handover, self._is_observed = host_ops, device, handover, is_observed
        for ahead in self._ahead:
            ahead.device = device

    def on_host(self, job: Callable[[], None]) -> None:
        """Give the host worker a job; it starts once the copies queued so far have been made.

        It calls `host_ops` and does nothing else: in a captured step the calls are recorded, and made again without it.
        """
        if self.device is None:
            job()
            return
        self.handover.submit(lambda: self._run(job), self._copied)
        self._copied = False

    @property
    def given(self) -> int:
        """How many host jobs were given so far, for `order_device`."""
        return self.handover.given

    def begin_layer(self) -> None:
        """Before a layer is queued: wait where the caller is too far ahead of the host worker."""
        if self.device is None:  # every job has run where it was given
            return
        with self._waiting():
            self.handover.begin_layer()

    def order_device(self, given: int | None = None) -> None:
        """GPU work queued from now on sees what the first `given` jobs wrote; None: all given so far."""
        if self.device is None:
            return
        with self._waiting():
            if self._copies_at_once:
                self.handover.join(given)
            else:
                self.handover.order_device(given)

    def join(self) -> None:
        """Wait for every job given so far; raises what the first failed one raised, after all have ended."""
        if self.device is None:
            return
        with self._waiting():
            self.handover.join()

    def push(self, activation: Activation, start: int, stop: int) -> None:
        """Bring columns [start, stop) from the GPU to host memory, in place, in order with the GPU's compute."""
        if self.device is not None and start < stop:
            self.copy(activation.host[:, start:stop], activation.device[:, start:stop])

    def pull(self, activation: Activation, start: int, stop: int, given: int | None = None) -> None:
        """Bring columns [start, stop) to the GPU once the first `given` host jobs, None for all, have written them."""
        if self.device is not None and start < stop:
            self.order_device(given)
            self.copy(activation.device[:, start:stop], activation.host[:, start:stop])

    def pull_onto(self, residual: torch.Tensor, scratch: Activation, start: int) -> None:
        """Add columns [start, ...) of what all host jobs given so far wrote to `residual`, in GPU memory: by a kernel
        that reads them in host memory where it can, else through the device's side of `scratch`."""
        self.order_device()
        target, source = residual[:, start:], scratch.host[:, start:]
        if self.device.reaches(target, source):
            self._copied = True
            self.device.ops.add_rows(target, source)
        else:
            self.copy(scratch.device[:, start:], source)
            target.add_(scratch.device[:, start:])

    def settle_device(self) -> None:
        """Wait until every job and all queued compute have ended, in the middle of a step."""
        self.join()
        if self.device is not None:
            self.device.synchronize(self.device.record(self.device.compute))

    def finish(self) -> None:
        """Wait until every job and all queued GPU work have ended; host memory then holds what they wrote."""
        if self.device is None:
            return
        self.settle_device()
        self._copied = False
        self._inputs = None
        for ahead in self._ahead:
            ahead.settle()

    def reset(self) -> None:
        """Leave no job, no queued work and nothing announced; for a step that was given up half-way."""
        self.handover.give_up()
        if self.device is not None:
            for stream in (self.device.copies, self.device.compute):
                self.device.synchronize(self.device.record(stream))
            self.device.clear()
        self._inputs = None
        for ahead in self._ahead:
            ahead.reset()

    def close(self) -> None:
        """Finish the worker's jobs, stop it, and release the device and the CPU kernels; idempotent."""
        self.handover.close()
        if self.device is not None:
            self.device.close()
        self.host_ops.close()

    @property
    def _copies_at_once(self) -> bool:
        """Whether host memory that jobs write may be ordinary: a copy reads that when it is queued, not in its turn."""
        return self.device is not None and not self.device.refused_kinds.isdisjoint(HANDED_OVER)

    @property
    def _ahead(self) -> Iterator[CopyAhead]:
        """The queues of copies ahead of use that there are: weights, older keys and values."""
        return (ahead for ahead in (self.ring, self.pages) if ahead is not None)

    def _run(self, job: Callable[[], None]) -> None:
        with self.cpu_lane():
            job()

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.waited_s += time.perf_counter() - started


class _CpuLane:
    """See `Lanes.cpu_lane`; what fails is not counted."""

    def __init__(self, lanes: Lanes) -> None:
        self._lanes = lanes

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, kind: object, *error: object) -> None:
        if kind is None:
            self._lanes._called_s += time.perf_counter() - self._started
