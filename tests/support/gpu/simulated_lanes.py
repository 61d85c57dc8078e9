"""A toy model on the simulated GPU, over the lanes' own code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from cpu_kernels import CpuKernels
from hetero_attn.devices import Device
from hetero_attn.engine.build import assemble, connect
from hetero_attn.engine.engine import Engine
from hetero_attn.planning.settle import PlannedModel
from hetero_attn.spec.config import ModelConfig
from placement.machine.hardware import HardwareProfile
from placement.plan.plan import Plan
from tests.support.gpu.checked_ops import checked_host_ops
from tests.support.gpu.simulated_gpu import SimulatedDriver, SimulatedWorker
from tests.support.models.runtime import THREADS


@cache
def kernels() -> CpuKernels:
    """The CPU kernels of every run."""
    return CpuKernels(THREADS)


@contextmanager
def simulated(path: Path, plan: Plan, handover: str | None = "events", taps: tuple[int, ...] = ()) -> Iterator[Engine]:
    """A toy model on the simulated GPU; what is still queued at the end runs, and is checked, too."""
    driver = SimulatedDriver()
    device = Device(driver, plan.gpu_memory_bytes)
    worker = None if handover is None else SimulatedWorker(driver)
    lanes = connect(plan, checked_host_ops(kernels(), driver), device, worker, handover)
    config, hardware = ModelConfig.from_dir(path), HardwareProfile.named("emulated")
    planned = PlannedModel(path, config, plan.workload.weight_dtype, "emulated", hardware, plan, taps=taps)
    with device.current():
        engine = assemble(planned, lanes)
    yield engine
    engine.close()
