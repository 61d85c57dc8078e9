"""Places in one allocation made at the start: first fit from either end, neighbours that are free become one again."""

from hetero_attn.errors import MemoryBudgetError
from placement.plan.units import format_bytes

ALIGN_BYTES = 256  # what CUDA's own allocator gives, and more than any kernel's vector load needs


class NoGapError(MemoryBudgetError):
    """Enough memory may be free, but not in one piece. Exit code as its parent's."""


class Slab:
    """Hands out [offset, offset + size) of `size_bytes` bytes, less what is beyond the last aligned offset: what is
    taken from the end would be aligned nowhere else."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes = size_bytes // ALIGN_BYTES * ALIGN_BYTES
        self._free = {0: size_bytes} if size_bytes else {}  # offset -> size, in the order of offsets
        self._taken: dict[int, int] = {}

    def take(self, count: int, at_end: bool = False) -> int:
        """An aligned offset with `count` bytes behind it, the first that there is or the last; raises NoGapError."""
        size = -(-count // ALIGN_BYTES) * ALIGN_BYTES
        fitting = (offset for offset, gap in self._free.items() if gap >= size)
        offset = max(fitting, default=None) if at_end else next(fitting, None)
        if offset is None:
            raise NoGapError(
                f"GPU memory: no gap of {format_bytes(size)} is left in the {format_bytes(self.size_bytes)} taken at "
                "the start; raise gpu_memory or shorten the context"
            )
        gap = self._free.pop(offset)
        start = offset + gap - size if at_end else offset
        self._taken[start] = size
        if gap > size:
            self._free[offset if at_end else offset + size] = gap - size
            self._sort()
        return start

    def give(self, offset: int) -> None:
        """Take back what `take` gave at this offset."""
        size = self._taken.pop(offset)
        self._free[offset] = size
        self._sort()
        before = next((start for start, gap in self._free.items() if start + gap == offset), None)
        if before is not None:
            self._free[before] += self._free.pop(offset)
            offset = before
        after = offset + self._free[offset]
        if after in self._free:
            self._free[offset] += self._free.pop(after)

    def _sort(self) -> None:
        self._free = dict(sorted(self._free.items()))
