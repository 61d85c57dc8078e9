"""A toy model on the CUDA driver over fakes of `torch.cuda` and libcuda."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

from cpu_kernels import CpuKernels
from hetero_attn.devices import Device
from hetero_attn.engine.build import assemble, connect
from hetero_attn.engine.engine import Engine
from hetero_attn.planning.settle import PlannedModel
from hetero_attn.spec.config import ModelConfig
from placement.machine.hardware import HardwareProfile
from placement.plan.plan import Plan
from tests.support.gpu.checked_ops import TorchCalls
from tests.support.gpu.fake_cuda import QUEUE_ENTRIES
from tests.support.gpu.fake_driver import fake_driver
from tests.support.models.runtime import THREADS

SLACK_BYTES = 1 << 16


class QueuedTorchCalls:
    """What `TorchCalls` asks of a driver: plain torch calls on GPU memory become entries of the current stream."""

    def __init__(self, driver) -> None:
        self._driver = driver
        self.checker = self

    def on_device(self, tensor: torch.Tensor) -> bool:
        start = self._driver._memory.data_ptr()
        return start <= tensor.data_ptr() < start + self._driver._slab.size_bytes

    def launch(self, stream, name, work, reads, writes) -> None:
        self._driver.fake.current.add(work, name)

    def run_host(self, name, reads, writes) -> None:
        pass


@contextmanager
def fake_engine(
    path: Path,
    plan: Plan,
    refuse_pins: bool = False,
    handover: str = "events",
    slack_bytes: int = SLACK_BYTES,
    queue_entries: int = QUEUE_ENTRIES,
) -> Iterator[Engine]:
    """A toy model on the CUDA driver over the fakes."""
    driver = fake_driver(plan.gpu_memory_bytes + slack_bytes, refuse_pins, queue_entries)
    device = Device(driver, plan.gpu_memory_bytes)
    lanes = connect(plan, CpuKernels(THREADS), device, ThreadPoolExecutor(1), handover)
    config, weight_dtype = ModelConfig.from_dir(path), plan.workload.weight_dtype
    planned = PlannedModel(path, config, weight_dtype, "cuda", HardwareProfile.named("emulated"), plan)
    engine = assemble(planned, lanes)
    with TorchCalls(QueuedTorchCalls(driver), None):
        yield engine
    engine.close()
    driver.fake.stop()
