"""A persistent team of threads that runs one compiled kernel at a time; the calling thread is its thread 0.

Why not numba's prange: it compiles slowly, starts a pool of its own beside torch's, and its fallback pool aborts the
process when two threads call it. Here a member is a daemon Python thread inside a compiled loop without the GIL.

Protocol (offsets in words.py). The caller writes kernel and arguments, opens the gate, advances the sequence,
runs the kernel itself, closes the gate and waits until nobody is inside. A member that sees a new sequence adds one to
the gate; if the gate was open it runs the kernel; it subtracts one either way. So kernel and arguments never change
while a member may read them, and a member that is asleep is not waited for: the others take its chunks (chunks.py).
An idle member spins, then yields, then naps, and after about 20 ms waits in Python on an event and burns nothing.
While a program is served it goes on yielding: the program's thread may wait for a GPU between two ops, and no Python
runs there that could wake anybody.
"""

import ctypes
import os
import struct
import threading
import weakref
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch

from cpu_kernels.team import topology
from cpu_kernels.team.arguments import MAX_PARAMETERS
from cpu_kernels.team.store import KernelStore, as_function
from cpu_kernels.team.words import (
    ARGUMENT_BYTES,
    ARGUMENTS,
    CONTROL_BYTES,
    FAILURE,
    GATE,
    KERNEL,
    OPEN,
    PARAMETERS,
    SERVING,
    STOP,
)
from cpu_kernels.vectors.isa import Isa

Made = TypeVar("Made")


class RecordedOp(NamedTuple):
    """One op as Team.run would run it, or an entry over a flag as words.py describes it."""

    name: str
    kernel_address: int
    scratch_bytes: int
    parameters: tuple[int, ...]


class _Shared:
    """What members and caller share; it outlives the team object until the last member has left."""

    def __init__(self, store: KernelStore):
        self.memory = ctypes.create_string_buffer(CONTROL_BYTES + ARGUMENT_BYTES + 256)
        self.control = (ctypes.addressof(self.memory) + 255) & ~255
        self.arguments = self.control + CONTROL_BYTES
        self.store = store
        self.drive = as_function(store.address("team.kernel", "drive"))
        self.member = as_function(store.address("team.kernel", "member"))
        self.parked: set[threading.Event] = set()
        self.stopping = False
        self.word(GATE).value = -OPEN
        self.word(ARGUMENTS).value = self.arguments

    def word(self, offset: int) -> ctypes.c_int64:
        """The control word at this offset."""
        return ctypes.c_int64.from_address(self.control + offset)

    def wake(self) -> None:
        """Wake the members that wait in Python."""
        for event in tuple(self.parked):
            event.set()


def _serve(shared: _Shared, thread: int, cpu: int | None) -> None:
    """Body of a member thread."""
    if cpu is not None:
        os.sched_setaffinity(0, {cpu})
    result, event = ctypes.c_int64(), threading.Event()
    while not shared.stopping:
        shared.member(ctypes.addressof(result), None, shared.control, thread)
        shared.parked.add(event)
        if not shared.stopping and not shared.word(SERVING).value:  # who serves from now on sets the event
            event.wait()
        shared.parked.discard(event)
        event.clear()


def _stop(shared: _Shared, members: list[threading.Thread], pid: int) -> None:
    """End the members; nothing in a forked child, which has none and whose parent's go on."""
    if os.getpid() != pid:
        return
    shared.stopping = True
    shared.word(STOP).value = 1
    while any(member.is_alive() for member in members):
        shared.wake()
        for member in members:
            member.join(0.01)


class Team:
    """num_threads threads, the caller included; `store` provides the kernels, `isa` is for those that ask; pin ties
    each member to its own core.

    Any thread may call run; a lock lets one in at a time. A forked child has no members: run raises RuntimeError there.
    """

    def __init__(self, store: KernelStore, isa: Isa, num_threads: int | None = None, pin: bool = False):
        self.isa = isa
        cpus = topology.physical_cpus()
        self.num_threads = topology.default_threads(cpus) if num_threads is None else num_threads
        if self.num_threads < 1:
            raise ValueError(f"num_threads is {num_threads}; it must be at least 1")
        self._shared = _Shared(store)
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._result = ctypes.c_int64()
        self._kernel, self._serving = self._shared.word(KERNEL), self._shared.word(SERVING)
        self._result_at = ctypes.addressof(self._result)
        self._failure = ctypes.c_int64.from_address(self._shared.arguments + FAILURE)
        self._pack = {n: struct.Struct(f"={n + 1}q").pack_into for n in range(MAX_PARAMETERS)}
        self._recording: list[RecordedOp] | None = None
        self._drive_all: Callable[..., int] | None = None
        self._scratch_bytes = 0
        self._grow(1 << 16)
        space = ctypes.c_char * (ARGUMENT_BYTES - PARAMETERS)
        self._parameters = space.from_address(self._shared.arguments + PARAMETERS)
        members = [
            threading.Thread(
                target=_serve,
                args=(self._shared, thread, cpus[thread % len(cpus)] if pin else None),
                name=f"cpu_kernels-{thread}",
                daemon=True,
            )
            for thread in range(1, self.num_threads)
        ]
        try:
            for member in members:
                member.start()
        except RuntimeError:  # no more threads: those that have started must not wait for a team that never was
            _stop(self._shared, [member for member in members if member.ident is not None], self._pid)
            raise
        self._finalizer = weakref.finalize(self, _stop, self._shared, members, self._pid)

    def run(self, kernel: tuple, scratch_bytes: int, *parameters: int) -> int:
        """Run a kernel, given as KernelStore.address takes it, on all threads; returns when all its work is done.

        Its parameter 0 is the address of `scratch_bytes` of working memory, then come `parameters`. Returns the
        kernel's failure code, 0 for none.
        Raises RuntimeError after close() and in a forked child.
        """
        shared = self._shared
        self._check_process()
        with self._lock:
            self._check_open()
            address = shared.store.address(*kernel)
            if self._recording is not None:
                self._recording.append(RecordedOp(kernel[1], address, scratch_bytes, parameters))
                return 0
            self._kernel.value = address
            if scratch_bytes > self._scratch_bytes:
                self._grow(scratch_bytes)
            self._pack[len(parameters)](self._parameters, 0, self._scratch_at, *parameters)
            if shared.parked:
                shared.wake()
            shared.drive(self._result_at, None, shared.control, 0)
            return self._failure.value

    def alone(self) -> "Team":
        """A team of the calling thread alone over the same kernels; it needs no closing."""
        return Team(self._shared.store, self.isa, 1)

    def locked(self, make: Callable[[KernelStore], Made]) -> Made:
        """What `make` builds from the kernel store, while no other thread uses it."""
        with self._lock:
            return make(self._shared.store)

    def _check_process(self) -> None:
        """RuntimeError in a forked child; asked before the lock, which another thread may have held at the fork."""
        if os.getpid() != self._pid:
            raise RuntimeError(
                "this CpuKernels was made before a fork and has no threads here; make a new one, or start "
                "processes with multiprocessing's spawn method"
            )

    def _check_open(self) -> None:
        if self._shared.stopping:
            raise RuntimeError("this CpuKernels is closed; make a new one")

    @property
    def is_recording(self) -> bool:
        """True inside record: ops must not pass addresses of tensors that nobody keeps."""
        return self._recording is not None

    def record(self, work: Callable[[], None]) -> list[RecordedOp]:
        """The ops that `work` would run, with their checks done and nothing computed; one thread at a time records.

        What runs them is loaded now: a GPU may wait for their first run.
        """
        if self._drive_all is None:
            self._drive_all = self.locked(lambda store: as_function(store.address("team.kernel", "drive_all")))
        self._recording = []
        try:
            work()
            return self._recording
        finally:
            self._recording = None

    def missing(self, work: Callable[[], None]) -> list[tuple]:
        """The kernels of the ops that `work` would run which are not compiled yet; nothing is computed. Before the team
        is used: ops of other threads must not run meanwhile."""
        try:
            return self._shared.store.missing(lambda: self.record(work))
        finally:
            self._drive_all = None  # it may have been among the missing

    def note(self, entry: RecordedOp) -> None:
        """Put an entry that is no op into what is being recorded; RuntimeError outside of record."""
        if self._recording is None:
            raise RuntimeError(f"{entry.name} is an entry of a recorded program; call it inside record")
        self._recording.append(entry)

    def replay(self, program_address: int) -> int:
        """Run a program laid out as in words.py; returns the failure code that stopped it, 0 for none."""
        shared = self._shared
        self._check_process()
        with self._lock:
            self._check_open()
            self._serving.value = 1
            try:
                if shared.parked:
                    shared.wake()
                self._drive_all(self._result_at, None, shared.control, program_address)
            finally:
                self._serving.value = 0
            return self._failure.value

    def _grow(self, scratch_bytes: int) -> None:
        """Make the working memory at least this large, with room to spare, aligned to a page."""
        size = max(scratch_bytes, 2 * self._scratch_bytes)
        self._scratch = torch.empty(size + 4096, dtype=torch.uint8, device="cpu")
        self._scratch_at = (self._scratch.data_ptr() + 4095) & ~4095
        self._scratch_bytes = size

    def close(self) -> None:
        """Stop and join the members; a second call does nothing."""
        if os.getpid() == self._pid:
            with self._lock:
                self._finalizer()
