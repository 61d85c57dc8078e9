"""Copies to the GPU that run ahead of their use: what is announced, where it arrives, and who owns a buffer when.

A step announces, in order, everything that it will read; the queue keeps its buffers full, so copies run ahead of
compute across linears and layers. Ownership of a buffer passes by events alone:

    copies stream   [copy item i -> buffer]  --ready-->  compute stream  [reads buffer]  --free-->  copies stream

A copy into a buffer waits for the `free` event of the item that was there; a reader waits for the `ready` event of its
own item. So nothing is overwritten while it is read, nor read before it has arrived. A buffer has one event of each
kind,
recorded anew for each item: by then the waits for the item before are queued, and those keep what they wait for. At the
end of a step, when the calling thread has waited for the device, `settle` forgets the events, so that those of a
captured step and of others never mix.
"""

from collections import deque
from collections.abc import Iterable
from typing import Generic, TypeVar

from hetero_attn.devices import Device

Item = TypeVar("Item")
Arrived = TypeVar("Arrived")


class CopyAhead(Generic[Item, Arrived]):
    """The order and the events of `buffers` pieces of GPU memory; a subclass owns their memory and says what a copy is.

    device: whose streams are used; may be exchanged for one that watches it, between two steps. copied_bytes: so far.
    """

    def __init__(self, device: Device, buffers: int) -> None:
        self.device = device
        self.copied_bytes = 0
        self._pending: deque[Item] = deque()
        self._arriving: deque[tuple[int, Arrived, object]] = deque()
        self._sent: list[object | None] = [None] * buffers
        self._free: list[object | None] = [None] * buffers
        self._read: list[object | None] = [None] * buffers

    def announce(self, items: Iterable[Item]) -> None:
        """Say what the coming step will read, in order, and start the first copies."""
        self._pending.extend(items)
        idle = set(range(len(self._free))) - {buffer for buffer, _, _ in self._arriving}
        for buffer in sorted(idle):
            self._fill(buffer)

    def take(self) -> Arrived:
        """The next item in GPU memory; compute queued from now on sees it complete."""
        _, arrived, ready = self._arriving[0]
        self.device.wait(self.device.compute, ready)
        return arrived

    def give_back(self) -> None:
        """Say that all compute queued so far is the last to read what was taken; starts the next copy into its
        buffer."""
        buffer, _, _ = self._arriving.popleft()
        self._free[buffer] = self._read[buffer] = self.device.record(self.device.compute, self._read[buffer])
        self._fill(buffer)

    def settle(self) -> None:
        """Say that all queued work has ended, so nothing needs to be waited for."""
        self._free = [None] * len(self._free)
        self._sent = [None] * len(self._sent)
        self._read = [None] * len(self._read)

    def reset(self) -> None:
        """Forget what was announced; for a step that was given up half-way, after all queued work has ended."""
        self._pending.clear()
        self._arriving.clear()
        self.settle()

    def _fill(self, buffer: int) -> None:
        if not self._pending:
            return
        item = self._pending.popleft()
        if self._free[buffer] is not None:
            self.device.wait(self.device.copies, self._free[buffer])
        arrived = self._copy(buffer, item)
        ready = self._sent[buffer] = self.device.record(self.device.copies, self._sent[buffer])
        self._arriving.append((buffer, arrived, ready))

    def _copy(self, buffer: int, item: Item) -> Arrived:
        """Queue the copy of an item into a buffer on the copies stream; returns what its reader is given."""
        raise NotImplementedError

    def _await_copy(self, buffer: int) -> None:
        """Block the caller until the last copy into a buffer has read all of its source."""
        if self._sent[buffer] is not None:
            self.device.synchronize(self._sent[buffer])
