"""Copies to the GPU that run ahead of their use: what is announced, where it arrives, and who owns a slot when.

A step announces, in order, everything that it will read; the queue keeps its slots full, so copies run ahead of compute
across linears and layers. Ownership of a slot passes by events alone:

    copies stream   [copy item i -> slot]  --ready-->  compute stream  [reads slot]  --free-->  copies stream

A copy into a slot waits for the `free` event of the item that was there; a reader waits for the `ready` event of its
own item. So nothing is overwritten while it is read, nor read before it has arrived. A slot has one event of each kind,
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
    """The order and the events of `slots` places in GPU memory; a subclass owns their memory and says what a copy is.

    device: whose streams are used; may be exchanged for one that watches it, between two steps. copied_bytes: so far.
    """

    def __init__(self, device: Device, slots: int) -> None:
        self.device = device
        self.copied_bytes = 0
        self._pending: deque[Item] = deque()
        self._arriving: deque[tuple[int, Arrived, object]] = deque()
        self._sent: list[object | None] = [None] * slots
        self._free: list[object | None] = [None] * slots
        self._read: list[object | None] = [None] * slots

    def announce(self, items: Iterable[Item]) -> None:
        """Say what the coming step will read, in order, and start the first copies."""
        self._pending.extend(items)
        idle = set(range(len(self._free))) - {slot for slot, _, _ in self._arriving}
        for slot in sorted(idle):
            self._fill(slot)

    def take(self) -> Arrived:
        """The next item in GPU memory; compute queued from now on sees it complete."""
        _, arrived, ready = self._arriving[0]
        self.device.wait(self.device.compute, ready)
        return arrived

    def give_back(self) -> None:
        """Say that all compute queued so far is the last to read what was taken; starts the next copy into its slot."""
        slot, _, _ = self._arriving.popleft()
        self._free[slot] = self._read[slot] = self.device.record(self.device.compute, self._read[slot])
        self._fill(slot)

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

    def _fill(self, slot: int) -> None:
        if not self._pending:
            return
        item = self._pending.popleft()
        if self._free[slot] is not None:
            self.device.wait(self.device.copies, self._free[slot])
        arrived = self._copy(slot, item)
        ready = self._sent[slot] = self.device.record(self.device.copies, self._sent[slot])
        self._arriving.append((slot, arrived, ready))

    def _copy(self, slot: int, item: Item) -> Arrived:
        """Queue the copy of an item into a slot on the copies stream; returns what its reader is given."""
        raise NotImplementedError

    def _await_copy(self, slot: int) -> None:
        """Block the caller until the last copy into a slot has read all of its source."""
        if self._sent[slot] is not None:
            self.device.synchronize(self._sent[slot])
