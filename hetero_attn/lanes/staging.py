"""The stream lane's staging ring: dram-home columns copied into GPU memory ahead of their use (`copy_ahead`)."""

import torch

from hetero_attn.devices import Device
from hetero_attn.devices.copy_ahead import CopyAhead
from placement.plan.plan import Plan


class StagingRing(CopyAhead[torch.Tensor, torch.Tensor]):
    """`slots` buffers of `slot_bytes` in GPU memory for pieces of weights.

    Every piece is a uint8 tensor [blocks, block_bytes] in host memory of at most `slot_bytes`; it arrives in the same
    shape. Where the system refused to page-lock weights, each piece passes a small page-locked buffer of its slot,
    filled by the calling thread.
    """

    def __init__(self, device: Device, slots: int, slot_bytes: int) -> None:
        super().__init__(device, slots)
        self._bounce: list[torch.Tensor] = []
        self._slots: list[torch.Tensor] = []
        self._views: dict[tuple[int, torch.Size], torch.Tensor] = {}
        try:
            self._slots += (device.empty((slot_bytes,), torch.uint8, "staging") for _ in range(slots))
        except BaseException:
            self.close()
            raise

    def passes_caller(self, piece: torch.Tensor) -> bool:
        """Whether the calling thread fills a buffer for this piece, which a captured step cannot do again."""
        return self.device.is_refused(piece)

    def close(self) -> None:
        """Return the slots' memory; nothing queued may still use them."""
        self.reset()
        self._views.clear()
        while self._slots:
            self.device.release(self._slots.pop(), "staging")
        while self._bounce:
            self.device.host_release(self._bounce.pop(), "staging")

    def _copy(self, slot: int, piece: torch.Tensor) -> torch.Tensor:
        view = self._views.get((slot, piece.shape))
        if view is None:  # of few shapes: a linear's pieces are alike but for the last one
            view = self._views[slot, piece.shape] = self._slots[slot][: piece.numel()].view(piece.shape)
        if self.passes_caller(piece):
            piece = self._bounced(slot, piece)
        self.device.copy(view, piece, self.device.copies)
        self.copied_bytes += piece.numel()
        return view

    def _bounced(self, slot: int, piece: torch.Tensor) -> torch.Tensor:
        """The piece in the slot's page-locked buffer, once the buffer's last copy has left it."""
        if not self._bounce:
            self._bounce = [self.device.host_empty(slot.shape, slot.dtype, "staging") for slot in self._slots]
        self._await_copy(slot)
        target = self._bounce[slot][: piece.numel()].view(piece.shape)
        target.copy_(piece)
        return target


def make_ring(plan: Plan, device: Device) -> StagingRing | None:
    """Allocate the ring of a plan; None where nothing streams."""
    return StagingRing(device, plan.staging_slots, plan.staging_slot_bytes) if plan.staging_slots else None
