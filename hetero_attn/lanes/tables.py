"""The small integer tables of a step (positions, slots, page tables) on their way to the device: one copy a step.

The same tables of the same shapes land at the same addresses every time, so a recorded step finds the next step's.
"""

from collections.abc import Sequence

import torch

from hetero_attn.devices import Device
from hetero_attn.spec.weights import table_bytes


class StepTables:
    """A buffer in page-locked host memory and one in device memory, both rewritten by every step.

    The copy of the step before must have been made: the lanes wait for it (`Lanes.upload`).
    """

    def __init__(self, device: Device, capacity_bytes: int) -> None:
        self._device = device
        self._host = device.host_empty((capacity_bytes,), torch.uint8, "tables")
        self._target = device.empty((capacity_bytes,), torch.uint8, "resident")

    @property
    def buffers(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Both sides, uint8, host first."""
        return self._host, self._target

    def upload(self, tables: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Queue the copy of contiguous integer tables; returns their device sides, valid until the next upload."""
        views, stop = [], 0
        for table in tables:
            start, stop = stop, stop + table_bytes(table.nbytes)
            part = slice(start, start + table.nbytes)
            self._host[part].view(table.dtype).view(table.shape).copy_(table)
            views.append(self._target[part].view(table.dtype).view(table.shape))
        self._device.copy(self._target[:stop], self._host[:stop], self._device.compute)
        return views
