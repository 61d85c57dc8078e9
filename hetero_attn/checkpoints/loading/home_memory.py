"""Host memory of linears, side by side in huge pages.

Each by itself, what lies behind a linear's last whole huge page would be in small ones, a tenth of the weights of a
small model: the system finds and clears these one by one, and they are read more slowly for good.
"""

import math

import torch

from cpu_kernels import fresh_memory

SLAB_BYTES = 1 << 30  # what is left of one is never written to, and counts as no memory
LINE_BYTES = 64  # linears begin at cache lines


class HomeMemory:
    """Gives out memory, in one piece where all is at most `total` bytes; it lives as long as a tensor of it does."""

    def __init__(self, total: int) -> None:
        self._slab_bytes = min(total, SLAB_BYTES)
        self._free = memoryview(b"")  # of the slab that is being used

    def take(self, shape: tuple[int, ...]) -> torch.Tensor:
        """uint8 of this shape, with unknown content."""
        size = math.prod(shape)
        if size == 0:
            return fresh_memory(shape, torch.uint8)
        if size > len(self._free):
            self._free = fresh_memory((max(size, self._slab_bytes),), torch.uint8).numpy().data
        tensor = torch.frombuffer(self._free[:size], dtype=torch.uint8).view(shape)
        self._free = self._free[-(-size // LINE_BYTES) * LINE_BYTES :]
        return tensor
