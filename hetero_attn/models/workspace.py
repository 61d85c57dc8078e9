"""The activation buffers of a step: memory that exists since the engine was made, seen in each block's own widths."""

from collections.abc import Mapping

import torch

from hetero_attn.devices import Device
from hetero_attn.lanes.activation import Activation
from hetero_attn.lanes.lanes import Lanes
from hetero_attn.spec.buffers import ActivationWidths, room

KEPT_PARTS = 4  # of a workspace's rows: those of a step and of its logits, of two kinds of step


class Workspace:
    """The buffers of a step of some rows, float32; see `ActivationWidths` for their widths.

    residual, scratch: [rows, width]. memory: every other buffer by name, flat, room for all rows of the widest block.
    """

    def __init__(self, residual: Activation, scratch: Activation, memory: Mapping[str, Activation]) -> None:
        self.residual, self.scratch, self._memory = residual, scratch, memory
        self._views: dict[tuple[str, int], Activation] = {}
        self._parts: dict[tuple[int, int], Workspace] = {}

    def of(self, name: str, width: int) -> Activation:
        """A buffer as float32 [rows, width]."""
        if (name, width) not in self._views:
            self._views[name, width] = self._memory[name].shaped(self.residual.main.shape[0], width)
        return self._views[name, width]

    def flat(self, name: str, rows: int, width: int) -> Activation:
        """The first numbers of a buffer as float32 [rows, width], whatever rows the step has."""
        return self._memory[name].shaped(rows, width)

    def rows(self, start: int, stop: int) -> "Workspace":
        """Buffers for the rows [start, stop) of the residual; the others are used from their first row on.

        The latest few are kept with their views: steps of as many rows follow each other.
        """
        if (start, stop) not in self._parts:
            if len(self._parts) == KEPT_PARTS:
                del self._parts[next(iter(self._parts))]
            residual, scratch = self.residual.rows(start, stop), self.scratch.rows(start, stop)
            self._parts[start, stop] = Workspace(residual, scratch, self._memory)
        return self._parts[start, stop]

    def randomise(self, name: str) -> None:
        """Fill a buffer with random numbers on every side that it has."""
        for side in (self._memory[name].device, self._memory[name].host):
            if side is not None:
                side.normal_()


def make_workspace(widths: ActivationWidths, rows: int, lanes: Lanes) -> Workspace:
    """Allocate the activation buffers of a step of at most `rows` rows, on every side that a lane uses."""
    residual, scratch = (make_buffer(lanes, rows, widths.residual, "activations") for _ in range(2))
    on_device = {} if lanes.device is None else _on_device(widths, rows, lanes.device)
    memory = {}
    for name, width in widths.by_name.items():
        if lanes.device is None:
            host = torch.empty(rows * width, dtype=torch.float32, device="cpu")
        else:
            host = lanes.device.host_empty((rows * width,), torch.float32, "activations")
        memory[name] = Activation(on_device.get(name), host)
    return Workspace(residual, scratch, memory)


def make_buffer(lanes: Lanes, rows: int, width: int, kind: str) -> Activation:
    """Allocate float32 [rows, width] on every side that a lane uses."""
    if lanes.device is None:
        return Activation(None, torch.empty((rows, width), dtype=torch.float32, device="cpu"))
    host = lanes.device.host_empty((rows, width), torch.float32, kind)
    return Activation(lanes.device.empty((rows, width), torch.float32, kind), host)


def _on_device(widths: ActivationWidths, rows: int, device: Device) -> dict[str, torch.Tensor]:
    """Buffers by name in GPU memory, those of every region in the same place."""
    found = {}
    for sets in widths.regions.values():
        memory = device.empty((rows * room(sets),), torch.float32, "activations")
        for each in sets:
            start = 0
            for name, width in each.buffers:
                found[name] = memory[start : start + rows * width]
                start += rows * width
    return found
