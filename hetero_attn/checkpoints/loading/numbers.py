"""The numbers of a checkpoint as float32: refused, with the tensor's name, where one is NaN or infinite."""

import torch

from cpu_kernels import CpuKernels
from hetero_attn.checkpoints.loading.unit_rows import numbers_of
from hetero_attn.checkpoints.sources import WeightSource
from hetero_attn.errors import CheckpointError


class Numbers:
    """Reads whole tensors of a file, and checks what others have read; raises CheckpointError."""

    def __init__(self, source: WeightSource, ops: CpuKernels) -> None:
        self._source, self._ops = source, ops

    def vector(self, name: str) -> torch.Tensor:
        """A tensor of numbers as float32."""
        values = self._source.read(name).float()
        self.check(name, values)
        return values

    def matrix(self, name: str) -> torch.Tensor:
        """A matrix as float32, also where the file has it in codes."""
        if self._source.source_type(name) is None:
            return self.vector(name)
        return numbers_of(self._source, self._ops, name, self._source.read(name))

    def check(self, name: str, values: torch.Tensor) -> None:
        """Raise CheckpointError unless all of a tensor's numbers are finite."""
        if not torch.isfinite(values).all():
            raise CheckpointError(
                f"{self._source.path}: {name} holds NaN or infinite values; the checkpoint is damaged, download it "
                "again"
            )
