"""The greatest logit: what greedy decoding chooses, and the check of every other choice begins with."""

from typing import NamedTuple

import numpy as np
import torch


class LogitsRow(NamedTuple):
    """One row of logits, float32 [vocab_size], in any memory, and the same as numpy sees it, in host memory.

    Of memory that every step writes again both are made once: after a pass over all weights either takes 50 us.
    """

    values: torch.Tensor
    numbers: np.ndarray

    @classmethod
    def of(cls, values: torch.Tensor) -> "LogitsRow":
        """A copy of what is on a device."""
        return cls(values, values.cpu().numpy())


class LogitsRows:
    """The rows of float32 [rows, vocab_size], kept for as long as steps give the same host memory, written anew."""

    def __init__(self) -> None:
        self._logits: torch.Tensor | None = None
        self._rows: tuple[LogitsRow, ...] = ()

    def of(self, logits: torch.Tensor) -> tuple[LogitsRow, ...]:
        """The rows of these logits."""
        if logits is not self._logits or not logits.is_cpu:
            self._logits, self._rows = logits, tuple(map(LogitsRow.of, logits.unbind()))
        return self._rows


def greatest(logits: torch.Tensor) -> int:
    """The index of the greatest of float32 [vocab_size]; the first of equals, and of NaN where there is any.

    numpy looks at a vector of values at a time: 9 us for 128,256 logits, for which torch takes 320 on one thread.
    """
    return greatest_with_value(LogitsRow.of(logits))[0]


def greatest_with_value(row: LogitsRow) -> tuple[int, float]:
    """`greatest`, and what stands there."""
    index = int(row.numbers.argmax())
    return index, row.numbers.item(index)
