"""Vector clocks over the actors of a simulated machine, and who touched each byte of its memory last."""

from __future__ import annotations

import numpy as np
import torch

Clock = dict[str, int]
MAIN, WORKER = "main thread", "host worker"


class RaceError(AssertionError):
    """Two operations touch the same bytes, one of them writes, and nothing orders them."""


class MixedMemoryError(AssertionError):
    """An operation was given a tensor of the other memory, or would make one outside of the arena."""


class StuckError(AssertionError):
    """Somebody waits for what nobody will do."""


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
