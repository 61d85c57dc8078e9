"""The lanes and what passes between them: one device, one host worker, copies and events.

Only this module and the two it builds on (`device`, `staging`) own streams, events, pinned buffers and threads. Exactly
one thread calls the CPU kernels: the worker while lanes overlap, else the caller's own.

An activation that more than one lane needs is an `Activation`: the same rows in GPU memory and in host memory. Each
side holds the columns that its lanes produced; `exchange` brings over the others.

What orders the lanes: a host job starts after the GPU work queued before it has reached the host (an event), jobs run
in the order they were given, and `join` returns when all of them have finished. GPU work queued after `join` sees
what they wrote. A host buffer is overwritten only by a copy queued after the `join` that ended its last reader.
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch

from cpu_kernels import CpuKernels
from hetero_attn.device import EmulatedDevice
from hetero_attn.staging import StagingRing


@dataclass(frozen=True, slots=True)
class Activation:
    """One activation, float32 [max_rows, width], in GPU memory and in host memory; a side that no lane uses is None."""

    device: torch.Tensor | None
    host: torch.Tensor | None

    def rows(self, start: int, stop: int) -> "Activation":
        """Rows [start, stop) of both sides."""
        return self._map(lambda side: side[start:stop])

    def columns(self, start: int, stop: int) -> "Activation":
        """Columns [start, stop) of both sides."""
        return self._map(lambda side: side[:, start:stop])

    @property
    def main(self) -> torch.Tensor:
        """The side where the residual stream lives: the GPU's when there is one."""
        return self.host if self.device is None else self.device

    def _map(self, view: Callable[[torch.Tensor], torch.Tensor]) -> "Activation":
        return Activation(*(None if side is None else view(side) for side in (self.device, self.host)))


class Lanes:
    """A device (None: CPU only), the CPU kernels, the worker that calls them, and the staging ring.

    With `overlap=False` everything runs in order on the calling thread: the same arithmetic, the plain path.
    cpu_lane_s, waited_s: seconds for which the CPU lane worked, and for which `join` waited for it, since the start.
    """

    def __init__(
        self,
        host_ops: CpuKernels,
        device: EmulatedDevice | None = None,
        ring: StagingRing | None = None,
        overlap: bool = True,
    ) -> None:
        self.host_ops = host_ops
        self.device = device
        self.ring = ring
        overlapped = overlap and device is not None
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="hetero-attn-host") if overlapped else None
        self._jobs: list[Future] = []
        self.cpu_lane_s = 0.0
        self.waited_s = 0.0

    @property
    def streamed_bytes(self) -> int:
        """Bytes that the staging ring has copied so far."""
        return 0 if self.ring is None else self.ring.copied_bytes

    @property
    def main_ops(self):
        """The operations of the place where the residual stream lives."""
        return self.host_ops if self.device is None else self.device.ops

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Queue a copy between GPU and host memory, in order with the GPU's compute."""
        self.device.copy(target, source, self.device.compute)

    @contextmanager
    def cpu_lane(self) -> Iterator[None]:
        """Count the time of the enclosed work as the CPU lane's."""
        started = time.perf_counter()
        yield
        self.cpu_lane_s += time.perf_counter() - started

    @contextmanager
    def main_lane(self) -> Iterator[None]:
        """Work that runs where the residual stream lives: the CPU lane's time when there is no device."""
        with self.cpu_lane() if self.device is None else nullcontext():
            yield

    @contextmanager
    def torch_at_rest(self) -> Iterator[None]:
        """Without a device, keep torch's own pool out: its idle threads would spin on the cores of the thread team."""
        threads = torch.get_num_threads()
        if self.device is None:
            torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)

    @contextmanager
    def given_up_on_error(self) -> Iterator[None]:
        """Leave no job and no announced copy behind when the enclosed step fails."""
        try:
            yield
        except BaseException:
            self.reset()
            raise

    def on_host(self, job: Callable[[], None]) -> None:
        """Give the host worker a job; it starts once the GPU work queued so far has reached the host."""
        if self.device is None:
            job()
            return
        event = self.device.record(self.device.compute)
        if self._worker is None:
            self._run(event, job)
        else:
            self._jobs.append(self._worker.submit(self._run, event, job))

    def join(self) -> None:
        """Wait for every job given so far; raises what the first failed one raised, after all have ended."""
        started = time.perf_counter()
        jobs, self._jobs = self._jobs, []
        failures = [failure for job in jobs if (failure := job.exception()) is not None]
        self.waited_s += time.perf_counter() - started
        if failures:
            raise failures[0]

    def exchange(self, activation: Activation, column: int, *, to_device: bool, to_host: bool) -> None:
        """Complete an activation whose columns [0, column) are on the GPU and [column, width) in host memory.

        Each wanted side is written in place; nothing is copied where the other side produced no column.
        """
        if self.device is None:
            return
        if to_host and column > 0:
            self.copy(activation.host[:, :column], activation.device[:, :column])
        if to_device and column < activation.host.shape[1]:
            self.join()
            self.copy(activation.device[:, column:], activation.host[:, column:])

    def finish(self) -> None:
        """Wait until every job and all queued GPU work have ended; host memory then holds what they wrote."""
        self.join()
        if self.device is not None:
            self.device.synchronize(self.device.record(self.device.compute))

    def reset(self) -> None:
        """Leave no job behind and forget what the ring was told; for a step that was given up half-way."""
        for job in self._jobs:
            job.exception()
        self._jobs.clear()
        if self.ring is not None:
            self.ring.reset()

    def close(self) -> None:
        """Finish the worker's jobs, stop it, and release the device and the CPU kernels; idempotent."""
        if self._worker is not None:
            self._worker.shutdown(wait=True)
        if self.device is not None:
            self.device.close()
        self.host_ops.close()

    def _run(self, event: object, job: Callable[[], None]) -> None:
        self.device.synchronize(event)
        with self.cpu_lane():
            job()
