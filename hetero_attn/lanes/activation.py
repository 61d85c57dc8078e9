"""One activation of a step on both sides of the bus: the same rows in GPU memory and in host memory."""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Activation:
    """One activation, float32 [max_rows, width], in GPU memory and in host memory; a side that no lane uses is None."""

    device: torch.Tensor | None
    host: torch.Tensor | None

    def rows(self, start: int, stop: int) -> "Activation":
        """Rows [start, stop) of both sides."""
        return self._map(lambda side: side[start:stop])

    def columns(self, start: int, stop: int) -> "Activation":
        """Columns [start, stop) of both sides."""
        if start == 0 and stop == self.main.shape[1]:
            return self
        return self._map(lambda side: side[:, start:stop])

    def shaped(self, rows: int, width: int) -> "Activation":
        """The front of both sides, flat memory, as [rows, width]."""
        return self._map(lambda side: side[: rows * width].view(rows, width))

    @property
    def main(self) -> torch.Tensor:
        """The side where the residual stream lives: the GPU's when there is one."""
        return self.host if self.device is None else self.device

    def _map(self, view: Callable[[torch.Tensor], torch.Tensor]) -> "Activation":
        device, host = self.device, self.host
        return Activation(None if device is None else view(device), None if host is None else view(host))


def behind(values: torch.Tensor, start: int) -> torch.Tensor:
    """Columns from `start` on: the tensor itself for all of them, since a view costs as much as a check of it."""
    return values[:, start:] if start else values


def before(values: torch.Tensor, stop: int) -> torch.Tensor:
    """Columns before `stop`, as `behind`."""
    return values if stop == values.shape[1] else values[:, :stop]
