"""A GPU that does everything as late as it may, and reports every access that no event, flag or join has ordered.

`SimulatedDriver` runs the lanes' own code on one thread. Calls only queue; a stream runs when somebody waits for it,
and then no further than asked; the host worker runs when its jobs are joined. So a missing wait also computes with what
was there before, and all fresh memory holds NaN. Every operation carries a vector clock of what happened before it, and
every byte of every tensor remembers who touched it last: an access that is not ordered after the others' is a race,
whatever the timing (Lamport 1978; Mattern 1989).

Kernels are the wrapped operations, whose reads and writes follow from their signatures; plain torch calls are seen by a
dispatch mode. A call that mixes memories, or makes a tensor in GPU memory outside of the arena, is an error.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from gpu_kernels import reference

Clock = dict[str, int]
MAIN, WORKER = "main thread", "host worker"
SMALL_BYTES = 256  # so that toys have rows of both kinds
WRITTEN = {
    "q",
    "k_pages",
    "v_pages",
    "out",
    "lse",
    "target",
}  # of rope_append, and of every other operation its results
ONLY_READ = {"decode_attention": {"q", "k_pages", "v_pages"}, "prefill_attention": {"q", "k_pages", "v_pages"}}
OTHERS_WRITTEN = {"route": {"ids", "places", "sources", "starts", "weights"}, "norm_heads": {"qkv"}}
CHECKED_OPS = {
    "add_rows",
    "pack",
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
    "merge",
    "rope_append",
    *ONLY_READ,
}


class RaceError(AssertionError):
    """Two operations touch the same bytes, one of them writes, and nothing orders them."""


class MixedMemoryError(AssertionError):
    """An operation was given a tensor of the other memory, or would make one outside of the arena."""


class StuckError(AssertionError):
    """Somebody waits for what nobody will do."""


@dataclass(eq=False)
class Stream:
    """A queue of work not yet run. clock: what has happened before its next operation."""

    name: str
    queue: deque[Callable[[], None]] = field(default_factory=deque)
    clock: Clock = field(default_factory=dict)


@dataclass(eq=False)
class Event:
    """A point on a stream; `clock` is None until the stream has come there."""

    stream: Stream
    clock: Clock | None = None


class Storage:
    """Who touched each byte of one allocation last: per actor the number of its last read and write there."""

    def __init__(self, tensor: torch.Tensor, on_device: bool) -> None:
        self.keeper = tensor.untyped_storage()  # a freed address would be taken for this allocation
        self.on_device = on_device
        self._size = self.keeper.nbytes()
        self._last: dict[tuple[bool, str], np.ndarray] = {}

    def bytes_of(self, tensor: torch.Tensor, actor: str, writes: bool, make: bool) -> np.ndarray | None:
        """The numbers at a tensor's bytes, [*shape, itemsize] or flat."""
        if (writes, actor) not in self._last:
            if not make:
                return None
            self._last[writes, actor] = np.zeros(self._size, np.int32)
        size, start = tensor.itemsize, tensor.data_ptr() - self.keeper.data_ptr()
        if tensor.is_contiguous():
            return self._last[writes, actor][start : start + tensor.nbytes]
        strides = [4 * size * stride for stride in tensor.stride()]
        return np.lib.stride_tricks.as_strided(
            self._last[writes, actor][start:], (*tensor.shape, size), (*strides, 4), writeable=True
        )


class RaceChecker:
    """Vector clocks of the actors (streams and threads) and the record of every byte."""

    def __init__(self) -> None:
        self.actor = MAIN
        self.clocks: dict[str, Clock] = {MAIN: {}, WORKER: {}}
        self._names: dict[str, list[str]] = {}
        self._storages: dict[int, Storage] = {}

    def own(self, tensor: torch.Tensor) -> None:
        """Declare an allocation to be GPU memory."""
        self._storages[tensor.untyped_storage().data_ptr()] = Storage(tensor, on_device=True)

    def on_device(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies in GPU memory."""
        storage = self._storages.get(tensor.untyped_storage().data_ptr())
        return storage is not None and storage.on_device

    def run(self, actor: str, clock: Clock, name: str, reads: list, writes: list) -> None:
        """Let `actor` do one operation; raises RaceError for an access that `clock` does not order."""
        names = self._names.setdefault(actor, ["the start"])
        names.append(name)
        number = clock[actor] = len(names) - 1
        for tensors, write in ((reads, False), (writes, True)):
            for tensor in tensors:
                if tensor.numel():
                    self._touch(actor, clock, number, tensor, write)

    def _touch(self, actor: str, clock: Clock, number: int, tensor: torch.Tensor, write: bool) -> None:
        key = tensor.untyped_storage().data_ptr()
        if key not in self._storages:
            self._storages[key] = Storage(tensor, on_device=False)
        storage = self._storages[key]
        for other, names in self._names.items():
            if other == actor:
                continue
            for earlier_write in (True, False) if write else (True,):
                last = storage.bytes_of(tensor, other, earlier_write, make=False)
                if last is not None and (latest := int(last.max())) > clock.get(other, 0):
                    memory = "GPU" if storage.on_device else "host"
                    raise RaceError(
                        f"{actor}: {names_of(self._names, actor, number)} {'writes' if write else 'reads'} {memory} bytes "
                        f"{tuple(tensor.shape)} that {other}: {names[latest]} {'wrote' if earlier_write else 'reads'}, "
                        "and nothing orders the two"
                    )
        storage.bytes_of(tensor, actor, write, make=True)[...] = number


def names_of(names: dict[str, list[str]], actor: str, number: int) -> str:
    """The name of an actor's operation."""
    return names[actor][number]


def merge(into: Clock, other: Clock) -> None:
    """Everything that happened before `other` happened before `into` too."""
    for actor, number in other.items():
        into[actor] = max(into.get(actor, 0), number)


class SimulatedDriver:
    """See `hetero_attn.devices.device` for what each call means, and the module for what is checked."""

    kind = "emulated"
    name = "simulated GPU"

    def __init__(self) -> None:
        self.checker = RaceChecker()
        self.streams: list[Stream] = []
        self.ops = CheckedOps(reference, self._launch)
        self.flags: dict[int, tuple[int, Clock]] = {}
        self.worker: SimulatedWorker

    def stream(self, name: str) -> Stream:
        """A new queue."""
        self.streams.append(Stream(name))
        return self.streams[-1]

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype, stays: bool) -> torch.Tensor:
        """GPU memory full of NaN."""
        with _disable_current_modes():
            tensor = filled(torch.empty(shape, dtype=dtype))
            self.checker.own(tensor)
        return tensor

    def free(self, tensor: torch.Tensor) -> None:
        """The record keeps the memory."""

    def pin(self, tensor: torch.Tensor) -> bool:
        """Fresh host memory for copies holds NaN too."""
        with _disable_current_modes():
            filled(tensor)
        return True

    def unpin(self, tensor: torch.Tensor) -> bool:
        """Memory that is given back may be written by anybody from now on."""
        self.run_host("unpin", [], [tensor])
        return True

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: Stream) -> None:
        """Queue a copy; the target must not be read, nor the source written, before it has run."""
        self._enqueue(stream, "copy", lambda: target.copy_(source), [source], [target])

    def reaches(self, target: torch.Tensor, source: torch.Tensor, stream: Stream) -> bool:
        """Small host memory is read in place."""
        return target.nbytes <= SMALL_BYTES and not self.checker.on_device(source)

    def record(self, stream: Stream, reuse: Event | None = None) -> Event:
        """Mark the work queued so far."""
        event = Event(stream)

        def reach() -> None:
            event.clock = dict(stream.clock)

        stream.queue.append(reach)
        return event

    def wait(self, stream: Stream, event: Event) -> None:
        """Later work of the stream comes after the event."""
        stream.queue.append(lambda: merge(stream.clock, self.reach(event)))

    def write_flag(self, stream: Stream, flag: torch.Tensor, value: int) -> None:
        """Whoever sees the flag comes after everything that the stream has done before."""
        stream.queue.append(lambda: self.flags.__setitem__(flag.data_ptr(), (value, dict(stream.clock))))

    def await_flag(self, flag: torch.Tensor, value: int, timeout_s: float) -> bool:
        """The running thread comes after what the stream did before it wrote the flag."""
        stream = self.streams[0]
        while self.flags.get(flag.data_ptr(), (None, {}))[0] != value:
            if not stream.queue:
                raise StuckError("a flag is waited for that no stream will write")
            self._step(stream)
        merge(self.checker.clocks[self.checker.actor], self.flags[flag.data_ptr()][1])
        return True

    def wait_flag(self, stream: Stream, flag: torch.Tensor, value: int, exactly: bool) -> None:
        """Later work of the stream comes after what the flag's writer did; the worker runs until it is written."""

        def wait() -> None:
            while (self.flags.get(flag.data_ptr(), (0, {}))[0] - value) & 0x80000000:
                self.worker.run_next()
            merge(stream.clock, self.flags[flag.data_ptr()][1])

        stream.queue.append(wait)

    def set_flag(self, flag: torch.Tensor, value: int) -> None:
        """The running thread writes a flag, after all it has done."""
        self.flags[flag.data_ptr()] = (value, dict(self.checker.clocks[self.checker.actor]))

    def synchronize(self, event: Event) -> None:
        """This thread comes after the event."""
        merge(self.checker.clocks[self.checker.actor], self.reach(event))

    @contextmanager
    def current(self, stream: Stream) -> Iterator[None]:
        """Watch this thread's torch calls; those on GPU memory are queued on the stream."""
        with TorchCalls(self, stream):
            yield

    def clear(self) -> None:
        """The reference operations keep nothing."""

    def close(self) -> None:
        """Run what is still queued: work that nobody waited for may race too."""
        for stream in self.streams:
            while stream.queue:
                self._step(stream)

    def reach(self, event: Event) -> Clock:
        """Run the event's stream until it is there."""
        while event.clock is None:
            if not event.stream.queue:
                raise StuckError(f"an event of {event.stream.name} is never reached")
            self._step(event.stream)
        return event.clock

    def run_host(self, name: str, reads: list, writes: list) -> None:
        """Check an access of the running thread."""
        clock = self.checker.clocks[self.checker.actor]
        self.checker.run(self.checker.actor, clock, name, reads, writes)

    def launch(self, stream: Stream, name: str, work: Callable[[], Any], reads: list, writes: list) -> None:
        """Queue a kernel; raises MixedMemoryError if it was given host memory."""
        for tensor in (*reads, *writes):
            if tensor.numel() and not self.checker.on_device(tensor) and name != "add_rows":
                raise MixedMemoryError(f"{name} on the GPU was given host memory {tuple(tensor.shape)}")
        self._enqueue(stream, name, work, reads, writes)

    def _launch(self, name: str, work: Callable[[], Any], reads: list, writes: list) -> None:
        self.launch(self.streams[0], name, work, reads, writes)

    def _enqueue(self, stream: Stream, name: str, work: Callable[[], Any], reads: list, writes: list) -> None:
        issued = dict(self.checker.clocks[self.checker.actor])

        def run() -> None:
            merge(stream.clock, issued)
            self.checker.run(stream.name, stream.clock, name, reads, writes)
            with _disable_current_modes():
                work()

        stream.queue.append(run)

    @staticmethod
    def _step(stream: Stream) -> None:
        stream.queue.popleft()()


class CheckedOps:
    """A module or object of operations; every call goes to `launch(name, work, reads, writes)`."""

    def __init__(self, ops: Any, launch: Callable[..., None]) -> None:
        self._ops = ops
        self._launch = launch

    def rounded_norm(self, x: Any, weight: Any, eps: float, out: Any, fmt: str) -> Any:
        """The norm, and x itself as the reference rounds it."""
        self.rms_norm(x, weight, eps, out)
        return out

    def rounded_gated(self, gate_up: Any, out: Any, activation: str, fmt: str) -> Any:
        """The activation, and x itself as the reference rounds it."""
        getattr(self, activation)(gate_up, out)
        return out

    def __getattr__(self, name: str) -> Any:
        operation = getattr(self._ops, name)
        if name not in CHECKED_OPS:
            return operation
        signature = inspect.signature(operation)

        def call(*arguments: Any, **named: Any) -> None:
            bound = signature.bind(*arguments, **named)
            bound.apply_defaults()
            writes, reads = [], []
            for parameter, value in bound.arguments.items():
                tensors = tensors_in(value)
                written = parameter in OTHERS_WRITTEN.get(name, WRITTEN - ONLY_READ.get(name, set()))
                (writes if written else reads).extend(tensors)
            if bound.arguments.get("accumulate") or name in ("add_rows", "combine", "scale_rows", "norm_heads"):
                reads += writes
            self._launch(name, lambda: operation(*arguments, **named), reads, writes)

        return call


class CheckedHostOps(CheckedOps):
    """The CPU kernels, each call checked; closing it leaves the kernels, which several runs may share, open."""

    def close(self) -> None:
        """The kernels' owner closes them."""


def checked_host_ops(ops: Any, driver: SimulatedDriver) -> CheckedHostOps:
    """The CPU kernels, each call checked as an access of the running thread and refused GPU memory."""

    def launch(name: str, work: Callable[[], Any], reads: list, writes: list) -> None:
        for tensor in (*reads, *writes):
            if tensor.numel() and driver.checker.on_device(tensor):
                raise MixedMemoryError(f"{name} on the CPU was given GPU memory {tuple(tensor.shape)}")
        driver.run_host(name, reads, writes)
        with _disable_current_modes():
            work()

    checked = CheckedHostOps(ops, launch)
    checked.set_flag = driver.set_flag
    checked.await_flag = driver.await_flag
    return checked


class TorchCalls(TorchDispatchMode):
    """Plain torch calls: on host memory an access of this thread, on GPU memory a kernel of the stream."""

    def __init__(self, driver: SimulatedDriver, stream: Stream) -> None:
        super().__init__()
        self._driver = driver
        self._stream = stream

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        named = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
        written = [
            named[argument.name]
            for argument in func._schema.arguments
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        operands = tensors_in((args, tuple(kwargs.values())))
        on_device = [tensor for tensor in operands if self._driver.checker.on_device(tensor)]
        if on_device and written:
            self._driver.launch(self._stream, str(func), lambda: func(*args, **kwargs), operands, written)
            return args[0]
        result = func(*args, **kwargs)
        results = tensors_in(result)
        shared = {tensor.untyped_storage().data_ptr() for tensor in operands}
        is_view = not written and all(tensor.untyped_storage().data_ptr() in shared for tensor in results)
        if on_device and not is_view:
            raise MixedMemoryError(f"{func} would make a tensor of GPU memory outside of the arena")
        if not is_view or not results:
            self._driver.run_host(str(func), operands, written)
        return result


class SimulatedWorker:
    """The host worker's executor: a job runs, in its turn, when somebody asks how it ended."""

    def __init__(self, driver: SimulatedDriver) -> None:
        self._driver = driver
        driver.worker = self
        self._queue: deque[tuple[Future, Clock, Callable[[], None]]] = deque()

    def submit(self, function: Callable[..., None], *arguments: Any) -> Future:
        """Queue a job; it comes after what the submitting thread has seen."""
        checker = self._driver.checker
        future = JobFuture(self)
        self._queue.append((future, dict(checker.clocks[checker.actor]), lambda: function(*arguments)))
        return future

    def run_next(self) -> None:
        """Run the oldest job as the worker."""
        if not self._queue:
            raise StuckError("a host job is waited for that was never given")
        future, issued, job = self._queue.popleft()
        checker = self._driver.checker
        before, checker.actor = checker.actor, WORKER
        merge(checker.clocks[WORKER], issued)
        try:
            job()
            future.set_result(None)
        except (RaceError, MixedMemoryError, StuckError):
            raise
        except BaseException as error:  # as an executor does
            future.set_exception(error)
        finally:
            checker.actor = before
            future.clock = dict(checker.clocks[WORKER])

    def join(self, future: JobFuture) -> None:
        """The running thread comes after the job."""
        while not future.done():
            self.run_next()
        checker = self._driver.checker
        merge(checker.clocks[checker.actor], future.clock)

    def shutdown(self, wait: bool = True) -> None:
        """Run what is left."""
        while self._queue:
            self.run_next()


class JobFuture(Future):
    """A job that runs when its end is asked for."""

    clock: Clock

    def __init__(self, worker: SimulatedWorker) -> None:
        super().__init__()
        self._worker = worker

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Run up to this job."""
        self._worker.join(self)
        return super().exception(0)


def filled(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with every bit set: NaN in every floating-point type."""
    tensor.view(torch.uint8).fill_(255)
    return tensor


def tensors_in(value: Any) -> list[torch.Tensor]:
    """The tensors in nested lists and tuples."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for item in value for tensor in tensors_in(item)] if isinstance(value, (list, tuple)) else []
