"""The stream lane's staging ring: dram-home columns copied into GPU memory ahead of their use (`copy_ahead`)."""

from collections.abc import Iterator

import torch

from hetero_attn.devices import Device
from hetero_attn.devices.copy_ahead import CopyAhead
from placement.plan.plan import Plan

Piece = tuple[torch.Tensor, ...]


class StagingRing(CopyAhead[Piece, torch.Tensor]):
    """`buffers` pieces of `buffer_bytes` each in GPU memory for pieces of weights.

    Every piece is some runs of one weight's blocks, uint8 [blocks, block_bytes] in host memory, of at most
    `buffer_bytes` together; they arrive as one tensor, one run behind the other. Where the system refused to page-lock
    weights, each piece passes a small page-locked buffer of its own, filled by the calling thread.
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

    def passes_caller(self, piece: Piece) -> bool:
        """Whether the calling thread fills a buffer for this piece, which a captured step cannot do again."""
        return self.device.is_refused(piece[0])

    def close(self) -> None:
        """Return the buffers' memory; nothing queued may still use them."""
        self.reset()
        self._views.clear()
        while self._buffers:
            self.device.release(self._buffers.pop(), "staging")
        while self._bounce:
            self.device.host_release(self._bounce.pop(), "staging")

    def _copy(self, buffer: int, piece: Piece) -> torch.Tensor:
        shape = torch.Size((sum([run.shape[0] for run in piece]), piece[0].shape[1]))
        view = self._views.get((buffer, shape))
        if view is None:  # of few shapes: a linear's pieces are alike but for the last one
            view = self._views[buffer, shape] = self._buffers[buffer][: shape.numel()].view(shape)
        if self.passes_caller(piece):
            piece = (self._bounced(buffer, piece, shape),)
        for target, run in _places(view, piece):
            self.device.copy(target, run, self.device.copies)
        self.copied_bytes += shape.numel()
        return view

    def _bounced(self, buffer: int, piece: Piece, shape: torch.Size) -> torch.Tensor:
        """The piece in the buffer's page-locked counterpart, once the buffer's last copy has left it."""
        if not self._bounce:
            self._bounce = [self.device.host_empty(buffer.shape, buffer.dtype, "staging") for buffer in self._buffers]
        self._await_copy(buffer)
        gathered = self._bounce[buffer][: shape.numel()].view(shape)
        for target, run in _places(gathered, piece):
            target.copy_(run)
        return gathered


def _places(view: torch.Tensor, piece: Piece) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Where each run of a piece goes, and the run."""
    if len(piece) == 1:
        yield view, piece[0]
        return
    yield from zip(view.split([run.shape[0] for run in piece]), piece, strict=True)


def make_ring(plan: Plan, device: Device) -> StagingRing | None:
    """Allocate the ring of a plan; None where nothing streams."""
    return StagingRing(device, plan.staging_slots, plan.staging_slot_bytes) if plan.staging_slots else None
