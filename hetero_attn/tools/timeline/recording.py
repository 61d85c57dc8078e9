"""A driver, CPU kernels and a host worker that compute nothing and keep what they are asked for, lane by lane.

Tensors of the device are `meta` tensors: shapes without memory. What must have values, the small tables of a step, has
memory, and copies between such tensors are made. The lanes' own code runs on these as it runs on a GPU, so what is kept
is what a GPU, its copy engine, the host worker and the calling thread would be given.
"""

import inspect
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from gpu_kernels import reference
from hetero_attn.devices.cuda import KERNEL_COPY_BYTES

MAIN, GPU, COPIES, CPU = LANES = ("main thread", "GPU compute", "copies", "CPU lane")
WRITTEN = {"q", "k_pages", "v_pages", "out", "lse", "target"}
ONLY_READ = {"decode_attention": {"q", "k_pages", "v_pages"}, "prefill_attention": {"q", "k_pages", "v_pages"}}
OTHERS_WRITTEN = {"route": {"ids", "places", "sources", "starts", "weights"}, "norm_heads": {"qkv"}}
OPS = (
    "add_rows",
    "linear",
    "rms_norm",
    "layer_norm",
    "silu_mul",
    "gelu_mul",
    "gelu",
    "route",
    "expert_linear",
    "combine",
    "scale_rows",
    "norm_heads",
    "rope_append",
    "decode_attention",
    "prefill_attention",
    "merge",
)


class Region(NamedTuple):
    """Bytes of one allocation: `rows` runs of `width` bytes, `pitch` apart, from `start` on."""

    storage: int
    start: int
    width: int
    pitch: int
    rows: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "Region":
        """Where a tensor lies; of more than rows with a pitch, all from its first byte to its last."""
        size, start = tensor.itemsize, tensor.storage_offset() * tensor.itemsize
        storage = tensor.untyped_storage()._cdata
        if tensor.dim() == 2 and tensor.stride(1) == 1 and tensor.stride(0) >= tensor.shape[1]:
            return cls(storage, start, tensor.shape[1] * size, tensor.stride(0) * size, tensor.shape[0])
        extent = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
        return cls(storage, start, (extent + 1) * size, (extent + 1) * size, 1)

    def meets(self, other: "Region") -> bool:
        """Whether both have a byte in common; of equal pitches exactly, else by their extents."""
        if self.start >= other.stop or other.start >= self.stop:
            return False
        if self.pitch != other.pitch or self.start // self.pitch != other.start // other.pitch:
            return True
        first, second = self.start % self.pitch, other.start % self.pitch
        return first < second + other.width and second < first + self.width

    @property
    def stop(self) -> int:
        """The byte behind the last one."""
        return self.start + (self.rows - 1) * self.pitch + self.width


@dataclass(slots=True, eq=False)
class Entry:
    """One thing that a lane does. kind: work | post (say that `key` is reached) | await (go on once it is).

    operation, arguments: of work, for its duration. issued: how many entries of the main thread come before this one
    can begin; of the main thread's own, 0. replayed: queued with a whole captured step.
    """

    lane: str
    kind: str
    name: str
    issued: int = 0
    key: Any = None
    operation: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)
    reads: tuple[Region, ...] = ()
    writes: tuple[Region, ...] = ()
    replayed: bool = False


class Recording:
    """Entries by lane in the order each lane has them. names: of allocations that are a shard's."""

    def __init__(self) -> None:
        self.lanes: dict[str, list[Entry]] = {lane: [] for lane in LANES}
        self.target: list[Entry] | None = None
        self.names: dict[int, str] = {}
        self._keeps: list[Any] = []
        self._arrived: dict[Region, str] = {}

    def clear(self) -> None:
        """Forget all entries."""
        self.lanes = {lane: [] for lane in LANES}
        self._keeps.clear()

    def work(self, lane: str, operation: str, arguments: dict[str, Any], reads: list, writes: list) -> None:
        """Keep an operation, its name being that of what it reads; on a GPU's lane the main thread queues it."""
        self._keeps.append((reads, writes))  # an allocation that is gone may be taken for another
        read, written = (
            tuple(Region.of(tensor) for tensor in tensors if tensor.numel()) for tensors in (reads, writes)
        )
        shard = next((self.names[region.storage] for region in read if region.storage in self.names), "")
        if lane == COPIES and shard:
            self._arrived[written[0]] = shard  # who reads the buffer reads this
        shard = shard or next((self._arrived[region] for region in read if region in self._arrived), "")
        self._add(Entry(lane, "work", f"{operation} {shard}".rstrip(), 0, None, operation, arguments, read, written))

    def post(self, lane: str, key: Any, name: str) -> None:
        """Keep that a lane reaches `key`."""
        self._add(Entry(lane, "post", name, key=key))

    def wait(self, lane: str, key: Any, name: str) -> None:
        """Keep that a lane waits for `key`."""
        self._add(Entry(lane, "await", name, key=key))

    def replay(self, entries: list[Entry], name: str) -> None:
        """What was captured is queued at once."""
        self._add(Entry(MAIN, "work", name, operation="launch"))
        issued = len(self.lanes[MAIN])
        for entry in entries:
            entry.issued, entry.replayed = issued, True
            self.lanes[entry.lane].append(entry)

    @contextmanager
    def into(self, entries: list[Entry]) -> Iterator[None]:
        """Keep entries here instead, as a capture does."""
        kept, self.target = self.target, entries
        try:
            yield
        finally:
            self.target = kept

    def _add(self, entry: Entry) -> None:
        if self.target is not None:
            self.target.append(entry)
            return
        if entry.lane in (GPU, COPIES):
            name, about = f"queue {entry.name}", {"of": entry}
            self.lanes[MAIN].append(Entry(MAIN, "work", name, operation="queue", arguments=about))
        entry.issued = len(self.lanes[MAIN]) if entry.lane != MAIN else 0
        self.lanes[entry.lane].append(entry)


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


class RecordedOps:
    """The operations of `gpu_kernels.reference` by name; each call is `keep(name, arguments, reads, writes)`."""

    def __init__(self, keep: Callable[[str, dict[str, Any], list, list], None]) -> None:
        self._keep = keep
        self._signatures = {name: inspect.signature(getattr(reference, name)) for name in OPS}

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name not in OPS:
            raise AttributeError(name)

        def call(*arguments: Any, **named: Any) -> None:
            bound = self._signatures[name].bind(*arguments, **named)
            bound.apply_defaults()
            reads: list[torch.Tensor] = []
            writes: list[torch.Tensor] = []
            for parameter, value in bound.arguments.items():
                is_written = parameter in OTHERS_WRITTEN.get(name, WRITTEN - ONLY_READ.get(name, set()))
                (writes if is_written else reads).extend(tensors_in(value))
            self._keep(name, dict(bound.arguments), reads, writes)

        return call

    def rounded(self, x: torch.Tensor, weight_dtype: str) -> torch.Tensor:
        """x itself, rounded by one kernel."""
        self._keep("rounded", {"x": x}, [x], [])
        return x

    def rounded_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor, fmt: str) -> Any:
        """One kernel."""
        self._keep("rounded_norm", {"x": x}, [x, weight], [out])
        return out

    def rounded_gated(self, gate_up: torch.Tensor, out: torch.Tensor, activation: str, fmt: str) -> Any:
        """One kernel."""
        self._keep("rounded_gated", {"gate_up": gate_up}, [gate_up], [out])
        return out


class RecordedHostOps(RecordedOps):
    """The CPU kernels: each call is the CPU lane's, in a program or by itself."""

    def __init__(self, recording: Recording) -> None:
        super().__init__(lambda *work: recording.work(CPU, *work))
        self._recording = recording

    def record(self, calls: Callable[[], None]) -> "RecordedProgram":
        """The calls as one program."""
        program = RecordedProgram(self._recording)
        with self._recording.into(program.entries):
            calls()
        return program

    def record_wait(self, flag: torch.Tensor, value: int) -> None:
        """The program waits for the GPU."""
        self._recording.wait(CPU, (flag.data_ptr(), value), "wait for the GPU")

    def record_set(self, flag: torch.Tensor, value: int) -> None:
        """The program says that it has come here."""
        self._recording.post(CPU, (flag.data_ptr(), value), "done")

    def await_flag(self, flag: torch.Tensor, value: int, timeout_s: float) -> bool:
        """The worker waits for the GPU."""
        self.record_wait(flag, value)
        return True

    def set_flag(self, flag: torch.Tensor, value: int) -> None:
        """The worker says how far it has come."""
        self.record_set(flag, value)

    def close(self) -> None:
        pass


class RecordedProgram:
    """A program of the thread team. waited_s: as of a real one."""

    waited_s = 0.0

    def __init__(self, recording: Recording) -> None:
        self.entries: list[Entry] = []
        self._recording = recording

    def run(self, timeout_s: float = 0.0) -> None:
        """All of it, in order."""
        for entry in self.entries:
            entry.issued, entry.replayed = len(self._recording.lanes[MAIN]), True
            self._recording.lanes[CPU].append(entry)


class RecordedWorker(Executor):
    """The host worker: its jobs are kept when they are given; who asks how one ended waits for it."""

    def __init__(self, recording: Recording) -> None:
        self._recording, self._jobs = recording, count()

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **keywords: Any) -> Future:
        """Keep a job."""
        future = _JobFuture(self._recording, ("job", next(self._jobs)))
        function(*arguments, **keywords)
        self._recording.post(CPU, future.key, "job ends")
        future.set_result(None)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        pass


class _JobFuture(Future):
    def __init__(self, recording: Recording, key: Any) -> None:
        super().__init__()
        self.key, self._recording = key, recording

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self._recording.wait(MAIN, self.key, "wait for the CPU lane")
        return super().exception(0)


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


def tensors_in(value: Any) -> list[torch.Tensor]:
    """The tensors in nested lists and tuples."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for item in value for tensor in tensors_in(item)] if isinstance(value, (list, tuple)) else []
