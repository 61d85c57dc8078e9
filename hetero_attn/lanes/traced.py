"""Operations and a device whose calls go through a `Trace`; everything else about them is unchanged."""

from collections.abc import Callable
from typing import Any

import torch


class TracedOps:
    """Operations of one side; each call goes to `run(name, work)`, named after the shard that it reads."""

    def __init__(self, ops: Any, lane: str, trace: Any, run: Callable[[str, Callable[[], object]], None]) -> None:
        self._ops, self._lane, self._trace, self._run = ops, lane, trace, run

    def __getattr__(self, name: str) -> Callable[..., object]:
        operation = getattr(self._ops, name)

        def traced(*arguments: object) -> object:
            label, results = f"{name} {self._trace.shards.of(self._lane, arguments)}".rstrip(), []
            self._run(label, lambda: results.append(operation(*arguments)))
            return results[0]

        return traced


class TracedDevice:
    """A device whose operations and copies are in the trace; all else is the device's own."""

    def __init__(self, device: Any, trace: Any) -> None:
        self._device, self._trace = device, trace
        self.ops = TracedOps(
            device.ops, "GPU compute", trace, lambda name, work: trace.queue("GPU compute", device.compute, name, work)
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._device, name)

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: Any) -> None:
        """As the device's own."""
        lane = "copies" if stream is self._device.copies else "GPU compute"
        name = f"copy {target.nbytes} B {self._trace.shards.of_copy(lane, target, source)}".rstrip()
        self._trace.queue(lane, stream, name, lambda: self._device.copy(target, source, stream))
