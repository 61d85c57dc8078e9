"""The small integer tables of a step (positions, slots, page tables) on their way to the device: one copy a step.

The same tables of the same shapes land at the same addresses every time, so a recorded step finds the next step's.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hetero_attn.devices import Device
from hetero_attn.spec.workload import table_bytes

Layout = tuple[tuple[torch.dtype, torch.Size], ...]
LAYOUTS = 16  # whose views are kept: a decode step's never changes, and making them took longer than the copies


@dataclass(frozen=True, slots=True)
class Views:
    """Where tables of one layout lie on both sides, and all of both."""

    host: list[torch.Tensor]
    target: list[torch.Tensor]
    whole: tuple[torch.Tensor, torch.Tensor]


class StepTables:
    """A buffer in page-locked host memory and one in device memory, both rewritten by every step.

    The copy of the step before must have been made: the lanes wait for it (`Lanes.upload`).
    """

    def __init__(self, device: Device, capacity_bytes: int) -> None:
        self._device = device
        self._views: dict[Layout, Views] = {}
        self._host = device.host_empty((capacity_bytes,), torch.uint8, "tables")
        self._target = device.empty((capacity_bytes,), torch.uint8, "resident")

    @property
    def buffers(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Both sides, uint8, host first."""
        return self._host, self._target

    def upload(self, tables: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Queue the copy of contiguous integer tables; returns their device sides, valid until the next upload."""
        layout = tuple((table.dtype, table.shape) for table in tables)
        views = self._views.get(layout)
        if views is None:
            while len(self._views) >= LAYOUTS:
                self._views.pop(next(iter(self._views)))
            views = self._views[layout] = self._lay_out(tables)
        for place, table in zip(views.host, tables, strict=True):
            place.copy_(table)
        self._device.copy(*views.whole, self._device.compute)
        return list(views.target)

    def _lay_out(self, tables: Sequence[torch.Tensor]) -> Views:
        host, target, stop = [], [], 0
        for table in tables:
            start, stop = stop, stop + table_bytes(table.nbytes)
            part = slice(start, start + table.nbytes)
            for side, views in ((self._host, host), (self._target, target)):
                views.append(side[part].view(table.dtype).view(table.shape))
        return Views(host, target, (self._target[:stop], self._host[:stop]))
