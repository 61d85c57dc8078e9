"""Lanes whose time is counted, not taken: what a step would last if every rate of a profile were kept to the letter.

The lanes' own code runs over the emulated GPU and computes what it computes; beside that every queue has a clock. An
operation begins when the one before it has ended and takes bytes / rate or operations / rate; a queue that waits for an
event is set to the event's time, and so is the caller where it waits. Nothing sleeps and no clock is read, so the same
run gives the same seconds on any machine, however busy.

Counted are products, copies and attention of cached tokens. Python, launches and small operations take no time, for
which a profile has zeros (`counted_machine`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cpu_kernels.contract import Picks
from hetero_attn.cache.stream import PageStream
from hetero_attn.devices import Device, EmulatedDriver
from hetero_attn.engine.build import assemble, step_table_bytes_of
from hetero_attn.engine.engine import Engine
from hetero_attn.lanes.lanes import Lanes
from hetero_attn.lanes.staging import make_ring
from hetero_attn.lanes.tables import StepTables
from hetero_attn.planning.settle import PlannedModel
from hetero_attn.spec.config import ModelConfig
from placement.machine.hardware import HardwareProfile
from placement.machine.rates import DtypeRates
from placement.plan.plan import Plan
from tests.support.gpu.simulated_lanes import kernels

BLOCK_FEATURES = 16


def counted_machine(cpu_bytes_per_s: float, bus_bytes_per_s: float, gpu_bytes_per_s: float) -> HardwareProfile:
    """Three rates that bound everything, nothing that Python or the system would cost, no lane slowing another."""
    plenty = DtypeRates(1e18, 1e18, 1e18, 1e18)
    return replace(
        HardwareProfile.named("emulated"),
        dram_bytes_per_s=1e18,
        cpu_linear_bytes_per_s=DtypeRates(*(cpu_bytes_per_s,) * 4),
        cpu_ops_per_s=plenty,
        h2d_bytes_per_s=bus_bytes_per_s,
        d2h_bytes_per_s=bus_bytes_per_s,
        gpu_bytes_per_s=gpu_bytes_per_s,
        gpu_flops=plenty,
        gpu_attention_ops_per_s=1e18,
        handover_s=0.0,
        launch_overhead_s=0.0,
        cpu_call_s=0.0,
        cpu_slowdown_while_copying=1.0,
        logits_s_per_token=4 / bus_bytes_per_s,  # they are brought to the caller
    )


@dataclass(slots=True)
class Clock:
    """The time of the thread that calls."""

    now: float = 0.0


@dataclass(eq=False, slots=True)
class Queue:
    """Work in order; `ready_at` is when what was given so far will have ended."""

    name: str
    clock: Clock
    ready_at: float = 0.0

    def take(self, seconds: float) -> None:
        """Queue work of this length."""
        self.ready_at = max(self.ready_at, self.clock.now) + seconds


class CountedOps:
    """Operations that compute as `ops` do and take the time of the weights and tokens that they read, on `queue`."""

    def __init__(self, ops: Any, queue: Queue, bytes_per_s: float) -> None:
        self._ops, self._queue, self._bytes_per_s = ops, queue, bytes_per_s

    def linear(self, x: torch.Tensor, weight: torch.Tensor, *others: Any, **options: Any) -> None:
        """All of the weight."""
        self._read(weight.nbytes)
        self._ops.linear(x, weight, *others, **options)

    def expert_linear(self, x: torch.Tensor, picks: Picks, weight: torch.Tensor, *others: Any) -> None:
        """The experts that have a row."""
        bounds = picks.starts[picks.first : picks.first + weight.shape[0] + 1]
        self._read(int((bounds[1:] > bounds[:-1]).sum()) * weight[0].nbytes)
        self._ops.expert_linear(x, picks, weight, *others)

    def decode_attention(self, q: torch.Tensor, pages: Any, keys: Any, *others: Any, **options: Any) -> None:
        """Keys and values of every sequence's segment."""
        tokens = int((keys.stop - keys.start).sum())
        self._read(2 * tokens * keys.table.shape[1] * pages.k.shape[-1] * pages.k.element_size())
        self._ops.decode_attention(q, pages, keys, *others, **options)

    def close(self) -> None:
        """The kernels are those of every run, and stay."""

    def _read(self, count: int) -> None:
        self._queue.take(count / self._bytes_per_s)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)


class CountedDriver(EmulatedDriver):
    """The emulated GPU, whose queues have clocks."""

    def __init__(self, machine: HardwareProfile, clock: Clock) -> None:
        self.clock, self._machine = clock, machine
        self._compute = Queue("compute", clock)
        self.ops = CountedOps(EmulatedDriver.ops, self._compute, machine.gpu_bytes_per_s)

    def stream(self, name: str) -> Queue:
        """A queue; operations run on the one called compute."""
        return self._compute if name == "compute" else Queue(name, self.clock)

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: Queue) -> None:
        """Made at once, counted as the bus makes it."""
        target.copy_(source)
        stream.take(source.numel() * source.element_size() / self._machine.h2d_bytes_per_s)

    def record(self, stream: Queue, reuse: float | None = None) -> float:
        """When the work queued so far will have ended."""
        return stream.ready_at

    def wait(self, stream: Queue, event: float) -> None:
        """Later work starts no earlier."""
        stream.ready_at = max(stream.ready_at, event)

    def synchronize(self, event: float) -> None:
        """The caller goes on no earlier."""
        self.clock.now = max(self.clock.now, event)

    def is_reached(self, event: float) -> bool:
        """Whether its time has come."""
        return event <= self.clock.now


class CountedHandover:
    """Jobs run where they are given, on the queue of the host worker; who waits for them is set to their end."""

    name = "counted"
    captures = False
    overhead_s = worked_s = parked_s = 0.0

    def __init__(self, device: Device, host: Queue) -> None:
        self._device, self._host = device, host
        self._ends: list[float] = []

    @property
    def given(self) -> int:
        """See Handover."""
        return len(self._ends)

    def submit(self, job: Callable[[], None], after_device: bool) -> None:
        """Run the job; it begins after the worker's last one and, if asked, after the GPU's work so far."""
        if after_device:
            self._device.wait(self._host, self._device.record(self._device.compute))
        job()
        self._ends.append(self._host.ready_at)

    def order_device(self, given: int | None = None) -> None:
        """GPU work queued from now on begins after those jobs; the caller itself goes on."""
        self._device.wait(self._device.compute, self._end(given))

    def join(self, given: int | None = None) -> None:
        """The caller goes on after those jobs."""
        self._device.synchronize(self._end(given))

    def _end(self, given: int | None) -> float:
        ends = self._ends[:given]
        return ends[-1] if ends else 0.0

    def begin_layer(self) -> None:
        """The caller may be as far ahead as it likes."""

    def give_up(self) -> None:
        """Every job has run."""

    def close(self) -> None:
        """There is no thread."""


@contextmanager
def counted(path: Path, plan: Plan, machine: HardwareProfile) -> Iterator[tuple[Engine, Clock]]:
    """A checkpoint on counted lanes, and the caller's clock."""
    clock = Clock()
    device = Device(CountedDriver(machine, clock), plan.gpu_memory_bytes)
    host = Queue("host", clock)
    dtype = plan.workload.weight_dtype
    ops = CountedOps(kernels(), host, machine.cpu_linear_bytes_per_s.of(dtype))
    tables, pages = StepTables(device, step_table_bytes_of(plan)), PageStream(device, plan.workload)
    lanes = Lanes(ops, device, make_ring(plan, device), tables, CountedHandover(device, host), pages)
    planned = PlannedModel(path, ModelConfig.from_dir(path), dtype, "emulated", machine, plan)
    engine = assemble(planned, lanes)
    try:
        yield engine, clock
    finally:
        engine.close()
