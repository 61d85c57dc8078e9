"""The stream lane's staging ring: dram-home columns copied into GPU memory ahead of their use (`copy_ahead`)."""

import torch

from hetero_attn.devices import Device
from hetero_attn.devices.copy_ahead import CopyAhead
from placement.plan.plan import Plan


class StagingRing(CopyAhead[torch.Tensor, torch.Tensor]):
    """`buffers` pieces of `buffer_bytes` each in GPU memory for pieces of weights.

    Every piece is a uint8 tensor [blocks, block_bytes] in host memory of at most `buffer_bytes`; it arrives in the same
    shape. Where the system refused to page-lock weights, each piece passes a small page-locked buffer of its own,
    filled by the calling thread.
    """

    def __init__(self, device: Device, buffers: int, buffer_bytes: int) -> None:
        super().__init__(device, buffers)
        self._bounce: list[torch.Tensor] = []
        self._buffers: list[torch.Tensor] = []
        self._views: dict[tuple[int, torch.Size], torch.Tensor] = {}
        try:
            self._buffers += (device.empty((buffer_bytes,), torch.uint8, "staging") for _ in range(buffers))
        except BaseException:
            self.close()
            raise

    def passes_caller(self, piece: torch.Tensor) -> bool:
        """Whether the calling thread fills a buffer for this piece, which a captured step cannot do again."""
        return self.device.is_refused(piece)

    def close(self) -> None:
        """Return the buffers' memory; nothing queued may still use them."""
        self.reset()
        self._views.clear()
        while self._buffers:
            self.device.release(self._buffers.pop(), "staging")
        while self._bounce:
            self.device.host_release(self._bounce.pop(), "staging")

    def _copy(self, buffer: int, piece: torch.Tensor) -> torch.Tensor:
        view = self._views.get((buffer, piece.shape))
        if view is None:  # of few shapes: a linear's pieces are alike but for the last one
            view = self._views[buffer, piece.shape] = self._buffers[buffer][: piece.numel()].view(piece.shape)
        if self.passes_caller(piece):
            piece = self._bounced(buffer, piece)
        self.device.copy(view, piece, self.device.copies)
        self.copied_bytes += piece.numel()
        return view

    def _bounced(self, buffer: int, piece: torch.Tensor) -> torch.Tensor:
        """The piece in the buffer's page-locked counterpart, once the buffer's last copy has left it."""
        if not self._bounce:
            self._bounce = [self.device.host_empty(buffer.shape, buffer.dtype, "staging") for buffer in self._buffers]
        self._await_copy(buffer)
        target = self._bounce[buffer][: piece.numel()].view(piece.shape)
        target.copy_(piece)
        return target


def make_ring(plan: Plan, device: Device) -> StagingRing | None:
    """Allocate the ring of a plan; None where nothing streams."""
    return StagingRing(device, plan.staging_slots, plan.staging_slot_bytes) if plan.staging_slots else None
