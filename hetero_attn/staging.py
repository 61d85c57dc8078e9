"""The stream lane's staging ring: dram-home columns copied into GPU memory ahead of their use.

A step announces, in order, every piece it will consume; the ring keeps its slots full, so copies run ahead of compute
across linears and layers. Ownership of a slot passes by events alone:

    copies stream   [copy piece i -> slot]  --ready-->  compute stream  [linear reads slot]  --free-->  copies stream

A copy into a slot waits for the `free` event of the piece that was there; a linear waits for the `ready` event of its
own piece. So no piece is overwritten while it is read, nor read before it has arrived.
"""

from collections import deque
from collections.abc import Iterable

import torch

from hetero_attn.device import EmulatedDevice


class StagingRing:
    """`slots` buffers of `slot_bytes` in GPU memory, filled in the announced order.

    Every piece is a uint8 tensor [blocks, block_bytes] in host memory of at most `slot_bytes`.
    """

    def __init__(self, device: EmulatedDevice, slots: int, slot_bytes: int) -> None:
        self._device = device
        self._slots = [device.empty((slot_bytes,), torch.uint8, "staging") for _ in range(slots)]
        self._free = [None] * slots
        self._pending: deque[torch.Tensor] = deque()
        self._arriving: deque[tuple[int, torch.Tensor, object]] = deque()
        self.copied_bytes = 0

    def announce(self, pieces: Iterable[torch.Tensor]) -> None:
        """Say what the coming step will consume, in order, and start the first copies."""
        self._pending.extend(pieces)
        idle = set(range(len(self._slots))) - {slot for slot, _, _ in self._arriving}
        for slot in sorted(idle):
            self._fill(slot)

    def take(self) -> tuple[int, torch.Tensor]:
        """Return (slot, view of the next piece in GPU memory); compute queued from now on sees it complete."""
        slot, view, ready = self._arriving[0]
        self._device.wait(self._device.compute, ready)
        return slot, view

    def give_back(self, slot: int) -> None:
        """Say that all compute queued so far is the last to read `slot`; starts the next copy into it."""
        self._arriving.popleft()
        self._free[slot] = self._device.record(self._device.compute)
        self._fill(slot)

    def reset(self) -> None:
        """Forget what was announced; for a step that was given up half-way."""
        self._pending.clear()
        self._arriving.clear()

    def _fill(self, slot: int) -> None:
        if not self._pending:
            return
        piece = self._pending.popleft()
        view = self._slots[slot][: piece.numel()].view(piece.shape)
        if self._free[slot] is not None:
            self._device.wait(self._device.copies, self._free[slot])
        self._device.copy(view, piece, self._device.copies)
        self._arriving.append((slot, view, self._device.record(self._device.copies)))
        self.copied_bytes += piece.numel()
