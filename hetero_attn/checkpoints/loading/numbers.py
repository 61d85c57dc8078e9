"""The numbers of a checkpoint as float32: refused, with the tensor's name, where one is NaN or infinite."""

import numpy as np
import torch

from cpu_kernels import CpuKernels
from hetero_attn.checkpoints.loading.run_rows import numbers_of
from hetero_attn.checkpoints.sources import WeightSource
from hetero_attn.errors import CheckpointError

# The bits of an exponent that only infinities and NaN have all of.
_EXPONENTS = {torch.float32: np.uint32(0x7F800000), torch.bfloat16: np.uint16(0x7F80), torch.float16: np.uint16(0x7C00)}
CHECKED_AT_ONCE = 1 << 17  # numbers whose bits stay in a core's own cache


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
        if not all_finite(values):
            raise CheckpointError(
                f"{self._source.path}: {name} holds NaN or infinite values; the checkpoint is damaged, download it "
                "again"
            )


def all_finite(values: torch.Tensor) -> bool:
    """Whether no number is NaN or infinite: their bits are looked at, on this thread and once, as fast as memory gives
    them. torch's own threads go on spinning, on the cores that pack."""
    exponent = _EXPONENTS[values.dtype]
    bits = values.contiguous().view(-1).view(torch.uint8).numpy().view(exponent.dtype)
    masked = np.empty(min(CHECKED_AT_ONCE, bits.size), exponent.dtype)
    for start in range(0, bits.size, CHECKED_AT_ONCE):
        piece = bits[start : start + CHECKED_AT_ONCE]
        if np.bitwise_and(piece, exponent, out=masked[: piece.size]).max() == exponent:
            return False
    return True
