"""The CUDA driver of the runtime on a FakeCuda: what a test of its own code is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from gpu_kernels import reference
from hetero_attn.devices.libcuda import LibCuda
from tests.support.gpu.fake_cuda import QUEUE_ENTRIES, FakeCuda
from tests.support.gpu.fake_cuda_library import FakeLibrary


class QueuedOps:
    """The reference operations as kernels: each call is an entry of the current stream.

    in_gpu_memory: whether a tensor is there, which tells a copy to the GPU from one to the host.
    """

    def __init__(self, cuda: FakeCuda, in_gpu_memory: Callable[[torch.Tensor], bool]) -> None:
        self._cuda = cuda
        self._in_gpu_memory = in_gpu_memory

    def copy_rows(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """A small copy, which is a kernel."""
        name = "pull" if self._in_gpu_memory(target) else "push"
        self._cuda.current.add(lambda: reference.copy_rows(target, source), name)

    def clear(self) -> None:
        """What the operations keep is counted from zero again."""
        self.cleared = getattr(self, "cleared", 0) + 1

    def rounded(self, x: torch.Tensor, weight_dtype: str) -> torch.Tensor:
        """As the reference: x itself."""
        return x

    def rounded_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor, fmt: str) -> Any:
        """One kernel."""
        self._cuda.current.add(lambda: reference.rounded_norm(x, weight, eps, out, fmt), "rounded_norm")
        return out

    def rounded_gated(self, gate_up: torch.Tensor, out: torch.Tensor, activation: str, fmt: str) -> Any:
        """One kernel."""
        self._cuda.current.add(lambda: reference.rounded_gated(gate_up, out, activation, fmt), "rounded_gated")
        return out

    def __getattr__(self, name: str) -> Callable[..., None]:
        operation = getattr(reference, name)
        return lambda *arguments: self._cuda.current.add(lambda: operation(*arguments), name)


def fake_driver(slab_bytes: int, refuse_pins: bool = False, queue_entries: int = QUEUE_ENTRIES) -> Any:
    """A CudaDriver over the fakes; `driver.fake` is the FakeCuda, to be stopped by the caller."""
    from hetero_attn.devices.cuda import CudaDriver

    class Driver(CudaDriver):
        """With kernels that this machine has."""

    cuda = FakeCuda(queue_entries=queue_entries)
    driver = Driver(0, slab_bytes, 1 << 20, cuda, LibCuda(FakeLibrary(cuda, refuse_pins)))
    slab = driver._memory
    driver.ops = QueuedOps(cuda, lambda tensor: slab.data_ptr() <= tensor.data_ptr() < slab.data_ptr() + slab_bytes)
    driver.fake = cuda
    return driver
