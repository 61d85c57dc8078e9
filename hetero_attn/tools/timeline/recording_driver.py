"""A driver that computes nothing and keeps what it is asked for.

Tensors of the device are `meta` tensors: shapes without memory. What must have values, the small tables of a step, has
memory, and copies between such tensors are made.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from hetero_attn.devices.cuda import KERNEL_COPY_BYTES
from hetero_attn.tools.timeline.recorded_ops import RecordedOps, tensors_in
from hetero_attn.tools.timeline.recording import COPIES, GPU, MAIN, Entry, Recording


class RecordingDriver:
    """See `hetero_attn.devices.protocols.Driver` for what each call means."""

    kind = "emulated"
    name = "recorded GPU"

    def __init__(self, recording: Recording) -> None:
        self.recording, self._events = recording, count()
        self.ops: Any = RecordedOps(lambda *work: recording.work(GPU, *work))

    def stream(self, name: str) -> str:
        """The lane of that name."""
        return GPU if name == "compute" else COPIES

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype, stays: bool) -> torch.Tensor:
        """No memory, except for tables of integers, whose values are read."""
        is_table = stays and dtype in (torch.uint8, torch.int32)
        return torch.zeros(shape, dtype=dtype, device="cpu" if is_table else "meta")

    def free(self, tensor: torch.Tensor) -> None:
        pass

    def pin(self, tensor: torch.Tensor) -> bool:
        """Memory that nobody touches."""
        return True

    def unpin(self, tensor: torch.Tensor) -> bool:
        return True

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: str) -> None:
        """Keep the copy; values go along where both sides have any and it is small."""
        if "meta" not in (target.device.type, source.device.type):
            with _disable_current_modes():
                target.copy_(source)
        to_gpu = source.device.type != "meta"
        self.recording.work(stream, "copy", {"nbytes": source.nbytes, "to_gpu": to_gpu}, [source], [target])

    def reaches(self, target: torch.Tensor, source: torch.Tensor, stream: str) -> bool:
        """As CUDA's driver has it."""
        return target.nbytes <= KERNEL_COPY_BYTES

    def record(self, stream: str, reuse: int | None = None) -> int:
        """A key of its own for every record."""
        key = next(self._events)
        self.recording.post(stream, key, "event")
        return key

    def wait(self, stream: str, event: int) -> None:
        """Keep the wait."""
        self.recording.wait(stream, event, "wait for event")

    def synchronize(self, event: int) -> None:
        """Keep that the calling thread waits."""
        self.recording.wait(MAIN, event, "wait for the GPU")

    def is_reached(self, event: int) -> bool:
        """Every copy is soon made; keep that the calling thread has seen it."""
        self.synchronize(event)
        return True

    def write_flag(self, stream: str, flag: torch.Tensor, value: int) -> None:
        """Keep the request."""
        self.recording.post(stream, (flag.data_ptr(), value), "request")

    def wait_flag(self, stream: str, flag: torch.Tensor, value: int, exactly: bool) -> None:
        """Keep the wait."""
        self.recording.wait(stream, (flag.data_ptr(), value), "wait for the CPU lane")

    @contextmanager
    def capture(self, stream: str) -> Iterator["RecordedGraph"]:
        """Keep what is queued inside for every replay."""
        graph = RecordedGraph(self.recording)
        with self.recording.into(graph.entries):
            yield graph

    @contextmanager
    def current(self, stream: str) -> Iterator[None]:
        """Plain torch calls on device tensors are kernels of the stream."""
        with _TorchCalls(self.recording):
            yield

    def delay(self, stream: str) -> None:
        """Nothing runs that could be delayed."""

    def mark(self, stream: str) -> float:
        """No clock runs."""
        return 0.0

    def seconds_between(self, mark: float, later: float) -> float:
        return 0.0

    def clear(self) -> None:
        """Nothing is kept from call to call."""

    def close(self) -> None:
        pass


class RecordedGraph:
    """A captured step."""

    def __init__(self, recording: Recording) -> None:
        self.entries: list[Entry] = []
        self._recording = recording

    def replay(self) -> None:
        """Queue all of it."""
        self._recording.replay(self.entries, "launch the captured step")


class _TorchCalls(TorchDispatchMode):
    """Keeps torch calls that write a device tensor as kernels."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self._recording = recording

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        named = dict(zip((each.name for each in func._schema.arguments), args, strict=False)) | kwargs
        aliases = {each.name: each.alias_info for each in func._schema.arguments}
        written = [named[name] for name, alias in aliases.items() if alias is not None and alias.is_write]
        if any(tensor.device.type == "meta" for tensor in tensors_in(written)):
            operands = tensors_in((args, tuple(kwargs.values())))
            self._recording.work(GPU, func.name().partition("::")[2].partition(".")[0], {}, operands, written)
        return func(*args, **kwargs)
