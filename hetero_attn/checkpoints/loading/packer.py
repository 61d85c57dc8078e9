"""Rows of a file packed into blocks: by the whole team, or by one thread alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from queue import SimpleQueue

import torch

from cpu_kernels import CpuKernels, fresh_memory
from cpu_kernels.formats import BLOCK_FEATURES, segments
from hetero_attn.checkpoints.loading.requantised import Comparison
from hetero_attn.checkpoints.loading.run_rows import Rows
from hetero_attn.checkpoints.sources import WeightSource
from hetero_attn.errors import CheckpointError
from hetero_attn.spec.weights import LinearSpec


class Packer:
    """Packs what one thread at a time brings.

    comparison: is told of numbers that are codes in the file; None: none of those come.
    """

    def __init__(self, source: WeightSource, ops: CpuKernels, comparison: Comparison | None = None) -> None:
        self._source, self._ops, self._comparison = source, ops, comparison
        self._apart = fresh_memory((0,), torch.uint8)  # packed rows on their way to between others of their units

    def pack_units(self, spec: LinearSpec, runs: list[Rows], in_features: int, out: torch.Tensor) -> None:
        """The rows of every run of parts (`LinearSpec.runs`) into `out`."""
        for (_, parts), segment, rows in zip(spec.runs, segments(spec.format, in_features), runs, strict=True):
            tensors, name = [part.tensor for part in parts], segment.format.name
            if len(runs) == 1:
                self._pack_parts(tensors, rows, name, out)
                continue
            count = _features(rows) // BLOCK_FEATURES
            blocks = self._memory_apart(count, segment.format.block_bytes(in_features))
            self._pack_parts(tensors, rows, name, blocks)
            size = segment.blocks * blocks.shape[1]
            # By numpy: torch's threads go on spinning after a copy that they have shared, on the cores that pack.
            out.numpy()[:, segment.first_byte : segment.first_byte + size] = blocks.view(-1, size).numpy()

    def _pack_parts(self, tensors: list[str], rows: Rows, name: str, out: torch.Tensor) -> None:
        """Rows that lie as their blocks do, or part by part, each with a block in every unit."""
        if isinstance(rows, torch.Tensor):
            self.pack(tensors, rows, name, out)
            return
        blocks = out.view(-1, len(rows), out.shape[1])
        for index, (tensor, part) in enumerate(zip(tensors, rows, strict=True)):
            self.pack([tensor], part, name, blocks[:, index])

    def pack(self, tensors: list[str], rows: torch.Tensor, name: str, out: torch.Tensor) -> None:
        """Rows of these tensors into blocks of a format: codes as they are in the file, or numbers."""
        try:
            if rows.dtype == torch.uint8:
                self._ops.repack(rows, self._source.source_type(tensors[0]), out)
            else:
                self._ops.pack(rows, name, out)
                if self._comparison is not None:
                    self._comparison.add(tensors, rows, name, out)
        except ValueError as error:
            raise CheckpointError(
                f"{self._source.path}: {', '.join(tensors)}: {error}; the checkpoint is damaged or was "
                "exported wrongly, download it again"
            ) from error

    def _memory_apart(self, blocks: int, block_bytes: int) -> torch.Tensor:
        """For these blocks; the same each time, since the system clears new memory page by page."""
        size = blocks * block_bytes
        if self._apart.numel() < size:
            self._apart = fresh_memory((size,), torch.uint8)
        return self._apart[:size].view(blocks, block_bytes)


def _features(rows: Rows) -> int:
    return sum(part.shape[0] for part in ([rows] if isinstance(rows, torch.Tensor) else rows))


class Packers:
    """As many packers as a team has threads, each for one thread at a time, so that no more of them pack at once.

    They do not wait for each other, as the threads of a team do at the end of each run: on cores that also read, one is
    often late. count: how many they are.
    """

    def __init__(self, source: WeightSource, ops: CpuKernels) -> None:
        self.count = ops.num_threads
        self._idle: SimpleQueue[Packer] = SimpleQueue()
        for _ in range(self.count):
            self._idle.put(Packer(source, ops.alone()))

    @contextmanager
    def one(self) -> Iterator[Packer]:
        """A packer, once one is idle."""
        packer = self._idle.get()
        try:
            yield packer
        finally:
            self._idle.put(packer)
