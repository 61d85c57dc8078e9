"""The stream lane's staging ring: dram-home columns copied into GPU memory ahead of their use.

A step announces, in order, every piece it will consume; the ring keeps its slots full, so copies run ahead of compute
across linears and layers. Ownership of a slot passes by events alone:

    copies stream   [copy piece i -> slot]  --ready-->  compute stream  [linear reads slot]  --free-->  copies stream

A copy into a slot waits for the `free` event of the piece that was there; a linear waits for the `ready` event of its
own piece. So no piece is overwritten while it is read, nor read before it has arrived. At the end of a step, when the
calling thread has waited for the device, `settle` forgets the events.
"""

from collections import deque
from collections.abc import Iterable

import torch

from hetero_attn.devices import Device
from placement.plan import Plan


class StagingRing:
    """`slots` buffers of `slot_bytes` in GPU memory, filled in the announced order.

    Every piece is a uint8 tensor [blocks, block_bytes] in host memory of at most `slot_bytes`. Where the system refused
    to page-lock the weights, each piece passes a small page-locked buffer of its slot, filled by the calling thread.
    """

    def __init__(self, device: Device, slots: int, slot_bytes: int) -> None:
        self.device = device
        self._bounce: list[torch.Tensor] = []
        self._free = [None] * slots
        self._sent = [None] * slots
        self._pending: deque[torch.Tensor] = deque()
        self._arriving: deque[tuple[int, torch.Tensor, object]] = deque()
        self.copied_bytes = 0
        self._slots: list[torch.Tensor] = []
        try:
            self._slots += (device.empty((slot_bytes,), torch.uint8, "staging") for _ in range(slots))
        except BaseException:
            self.close()
            raise

    def announce(self, pieces: Iterable[torch.Tensor]) -> None:
        """Say what the coming step will consume, in order, and start the first copies."""
        self._pending.extend(pieces)
        idle = set(range(len(self._slots))) - {slot for slot, _, _ in self._arriving}
        for slot in sorted(idle):
            self._fill(slot)

    def take(self) -> tuple[int, torch.Tensor]:
        """Return (slot, view of the next piece in GPU memory); compute queued from now on sees it complete."""
        slot, view, ready = self._arriving[0]
        self.device.wait(self.device.compute, ready)
        return slot, view

    def give_back(self, slot: int) -> None:
        """Say that all compute queued so far is the last to read `slot`; starts the next copy into it."""
        self._arriving.popleft()
        self._free[slot] = self.device.record(self.device.compute)
        self._fill(slot)

    def settle(self) -> None:
        """Say that all queued work has ended, so nothing needs to be waited for."""
        self._free = [None] * len(self._slots)
        self._sent = [None] * len(self._slots)

    def reset(self) -> None:
        """Forget what was announced; for a step that was given up half-way, after all queued work has ended."""
        self._pending.clear()
        self._arriving.clear()
        self.settle()

    def close(self) -> None:
        """Return the slots' memory; nothing queued may still use them."""
        self.reset()
        while self._slots:
            self.device.release(self._slots.pop(), "staging")
        while self._bounce:
            self.device.host_release(self._bounce.pop(), "staging")

    def _fill(self, slot: int) -> None:
        if not self._pending:
            return
        piece = self._pending.popleft()
        view = self._slots[slot][: piece.numel()].view(piece.shape)
        if self.device.refused_pins:
            piece = self._bounced(slot, piece)
        if self._free[slot] is not None:
            self.device.wait(self.device.copies, self._free[slot])
        self.device.copy(view, piece, self.device.copies)
        ready = self._sent[slot] = self.device.record(self.device.copies)
        self._arriving.append((slot, view, ready))
        self.copied_bytes += piece.numel()

    def _bounced(self, slot: int, piece: torch.Tensor) -> torch.Tensor:
        """The piece in the slot's page-locked buffer, once the buffer's last copy has left it."""
        if not self._bounce:
            self._bounce = [self.device.host_empty(slot.shape, slot.dtype, "staging") for slot in self._slots]
        if self._sent[slot] is not None:
            self.device.synchronize(self._sent[slot])
        target = self._bounce[slot][: piece.numel()].view(piece.shape)
        target.copy_(piece)
        return target


def make_ring(plan: Plan, device: Device) -> StagingRing | None:
    """Allocate the ring of a plan; None where nothing streams."""
    return StagingRing(device, plan.staging_slots, plan.staging_slot_bytes) if plan.staging_slots else None
