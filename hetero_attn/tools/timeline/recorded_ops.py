"""Operations, programs and a host worker that compute nothing: each call is kept with what it reads and writes."""

import inspect
from collections.abc import Callable
from concurrent.futures import Executor, Future
from itertools import count
from typing import Any

import torch

from cpu_kernels.contract import Ops
from gpu_kernels import reference
from hetero_attn.tools.timeline.recording import CPU, MAIN, Entry, Recording

WRITTEN = {"q", "pages", "out", "into", "target"}  # of rope_append, and of every other operation its results
ONLY_READ = {"decode_attention": {"q", "pages"}, "prefill_attention": {"q", "pages"}}
OTHERS_WRITTEN = {"norm_heads": {"qkv"}, "delta_step": {"states", "out"}}
OPS = ("add_rows", *(name for name in vars(Ops) if not name.startswith("_")))


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


def tensors_in(value: Any) -> list[torch.Tensor]:
    """The tensors in nested lists and tuples."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for item in value for tensor in tensors_in(item)] if isinstance(value, (list, tuple)) else []
