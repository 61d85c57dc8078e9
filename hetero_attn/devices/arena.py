"""Bytes of one memory in use by kind, under a hard budget."""

from dataclasses import dataclass, field

from hetero_attn.errors import MemoryBudgetError
from placement.plan.units import format_bytes


@dataclass(slots=True)
class Arena:
    """Counts allocations of one memory by kind and refuses the one that would pass the budget.

    `budget_bytes` None means unlimited. advice: the way out that a refusal names. Counters reach zero when everything
    has been returned with `release`.
    """

    name: str
    budget_bytes: int | None = None
    advice: str = "raise gpu_memory or shorten the context"
    used_bytes: dict[str, int] = field(default_factory=dict)
    peak_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """Bytes in use, all kinds."""
        return sum(self.used_bytes.values())

    def reserve(self, count: int, kind: str) -> None:
        """Count `count` bytes of `kind`; raises MemoryBudgetError when the budget would be passed."""
        if self.budget_bytes is not None and self.total_bytes + count > self.budget_bytes:
            raise MemoryBudgetError(
                f"{self.name} memory: {kind} needs {format_bytes(count)}, but {format_bytes(self.total_bytes)} of the "
                f"{format_bytes(self.budget_bytes)} budget are in use; {self.advice}"
            )
        self.used_bytes[kind] = self.used_bytes.get(kind, 0) + count
        self.peak_bytes = max(self.peak_bytes, self.total_bytes)

    def release(self, kind: str, count: int | None = None) -> None:
        """Forget `count` bytes of `kind`, all of them by default."""
        if count is None:
            self.used_bytes.pop(kind, None)
        else:
            self.used_bytes[kind] -= count
