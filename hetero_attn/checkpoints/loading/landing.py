"""Rows of a file packed into blocks at home: in host memory at once, in GPU memory by way of one small buffer."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hetero_attn.checkpoints.loading.home_memory import HomeMemory
from hetero_attn.checkpoints.loading.packer import Packer
from hetero_attn.checkpoints.loading.requantised import Comparison
from hetero_attn.checkpoints.loading.run_rows import Rows
from hetero_attn.checkpoints.sources import WeightSource
from hetero_attn.lanes.lanes import Lanes
from hetero_attn.spec.weights import LinearSpec


class Landing:
    """Packs rows and brings them home, `total` bytes.

    comparison: of codes that are packed into another format than the file's. packer: the team's.
    """

    def __init__(self, source: WeightSource, lanes: Lanes, total: int) -> None:
        self._lanes = lanes
        self.comparison = Comparison(source, lanes.host_ops)
        self.packer = Packer(source, lanes.host_ops, self.comparison)
        self._homes = HomeMemory(total)
        self._buffer: torch.Tensor | None = None
        self._landed: object | None = None

    def host_memory(self, shape: tuple[int, int], streams: bool) -> torch.Tensor:
        """Host memory of one linear, page-locked where it streams: the stream and the CPU lane share this one copy."""
        if streams:
            return self._lanes.device.host_empty(shape, torch.uint8, "weights")
        return self._homes.take(shape)

    @contextmanager
    def buffer_of(self, size: int) -> Iterator[None]:
        """Host memory through which every piece for GPU memory passes, at most `size` bytes; gone when the last has
        arrived."""
        device = self._lanes.device
        if device is None:
            yield
            return
        self._buffer = device.host_empty((size,), torch.uint8, "loading")
        try:
            yield
        finally:
            self._await_landing()
            device.host_release(self._buffer, "loading")
            self._buffer = self._landed = None

    def _await_landing(self) -> None:
        """Wait until the last piece has left the buffer."""
        if self._landed is not None:
            self._lanes.device.synchronize(self._landed)

    def place(
        self,
        spec: LinearSpec,
        runs: list[Rows],
        in_features: int,
        target: torch.Tensor,
        on_device: bool,
        packer: Packer | None = None,
    ) -> None:
        """Pack the rows of every run of parts into `target`. packer: another than the team's, of the calling thread;
        only for host memory."""
        assert packer is None or not on_device, spec.name
        if not on_device:
            (packer or self.packer).pack_units(spec, runs, in_features, target)
            return
        self._await_landing()
        packed = self._buffer[: target.numel()].view(target.shape)
        self.packer.pack_units(spec, runs, in_features, packed)
        self._lanes.copy(target, packed)
        self._landed = self._lanes.device.record(self._lanes.device.compute)
