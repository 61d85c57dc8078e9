"""Rows of a file packed into blocks at home: in host memory at once, in GPU memory by way of one small buffer."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from cpu_kernels import fresh_memory
from cpu_kernels.formats import BLOCK_FEATURES, segments
from hetero_attn.checkpoints.loading.home_memory import HomeMemory
from hetero_attn.checkpoints.loading.numbers import Numbers
from hetero_attn.checkpoints.loading.requantised import Comparison
from hetero_attn.checkpoints.sources import WeightSource
from hetero_attn.errors import CheckpointError
from hetero_attn.lanes.lanes import Lanes
from hetero_attn.spec.weights import LinearSpec


class Landing:
    """Packs rows and brings them home, `total` bytes; progress(count) is called with the number of them just placed.

    comparison: of codes that are packed into another format than the file's.
    """

    def __init__(self, source: WeightSource, lanes: Lanes, total: int, progress: Callable[[int], None]) -> None:
        self._source = source
        self._lanes = lanes
        self._numbers = Numbers(source, lanes.host_ops)
        self.comparison = Comparison(source, lanes.host_ops)
        self._progress = progress
        self._homes = HomeMemory(total)
        self._apart = fresh_memory((0,), torch.uint8)  # packed rows on their way to between others of their units
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
        self, spec: LinearSpec, runs: list[torch.Tensor], in_features: int, target: torch.Tensor, on_device: bool
    ) -> None:
        """Pack the rows of every run of parts into `target`."""
        packed = target
        if on_device:
            self._await_landing()
            packed = self._buffer[: target.numel()].view(target.shape)
        for (_, parts), segment, rows in zip(spec.runs, segments(spec.format, in_features), runs, strict=True):
            tensors, name = [part.tensor for part in parts], segment.format.name
            if len(runs) == 1:
                self.pack(tensors, rows, name, packed)
                continue
            blocks = self._memory_apart(rows.shape[0] // BLOCK_FEATURES, segment.format.block_bytes(in_features))
            self.pack(tensors, rows, name, blocks)
            size = segment.blocks * blocks.shape[1]
            # By numpy: torch's threads go on spinning after a copy that they have shared, on the cores that pack.
            packed.numpy()[:, segment.first_byte : segment.first_byte + size] = blocks.view(-1, size).numpy()
        if on_device:
            self._lanes.copy(target, packed)
            self._landed = self._lanes.device.record(self._lanes.device.compute)
        self._progress(target.numel())

    def _memory_apart(self, blocks: int, block_bytes: int) -> torch.Tensor:
        """For these blocks; the same each time, since the system clears new memory page by page."""
        size = blocks * block_bytes
        if self._apart.numel() < size:
            self._apart = fresh_memory((size,), torch.uint8)
        return self._apart[:size].view(blocks, block_bytes)

    def pack(self, tensors: list[str], rows: torch.Tensor, name: str, out: torch.Tensor) -> None:
        """Rows of these tensors into blocks of a format: codes as they are in the file, or numbers, which may lie there
        already."""
        ops = self._lanes.host_ops
        if rows.data_ptr() == out.data_ptr():
            self._numbers.check(", ".join(tensors), rows)
            return
        try:
            if rows.dtype == torch.uint8:
                ops.repack(rows, self._source.source_type(tensors[0]), out)
            else:
                ops.pack(rows, name, out)
                self.comparison.add(tensors, rows, name, out)
        except ValueError as error:
            raise CheckpointError(
                f"{self._source.path}: {', '.join(tensors)}: {error}; the checkpoint is damaged or was "
                "exported wrongly, download it again"
            ) from error
