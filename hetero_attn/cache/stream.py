"""Older keys and values on their way to the GPU: a prompt's chunk attends them there, block by block.

A step announces, in order, every block of pages that its layers will read; two buffers take turns, so the next block
arrives while the last one is attended (`copy_ahead`). Pages that are neighbours in their store are one copy.

Every buffer is a small store of its own: page p of KV head h is row p * widest + h, and one constant table says so.
"""

from dataclasses import dataclass

import torch

from cpu_kernels.formats.pages import row_items
from hetero_attn.cache.pages import TORCH_DTYPES, PagedStore, runs
from hetero_attn.devices import Device
from hetero_attn.devices.copy_ahead import CopyAhead
from placement.plan.memory import KV_STAGING_BUFFERS, kv_staging_pages
from placement.plan.workload import Workload


@dataclass(frozen=True, slots=True)
class PageBlock:
    """Consecutive logical pages of one sequence in one layer: where they are, and which logical page is the first."""

    store: PagedStore
    layer: int
    first: int
    pages: tuple[int, ...]


class PageStream(CopyAhead[PageBlock, tuple[torch.Tensor, torch.Tensor]]):
    """The buffers of a plan, each of `block_pages` pages of as many KV heads as the widest layer has.

    What arrives is K and V of a block, rows as `table` says, of the width that the block's layer has; the buffers have
    room for the widest.
    """

    def __init__(self, device: Device, workload: Workload) -> None:
        super().__init__(device, KV_STAGING_BUFFERS)
        self.block_pages = kv_staging_pages(workload)
        self._widest = max((shard.kv_heads for shard in workload.kv), default=0)
        shape = (self.block_pages * self._widest, workload.page_size, row_items(workload.kv_dtype, workload.head_dim))
        dtype = TORCH_DTYPES[workload.kv_dtype]
        self._k = [device.empty(shape, dtype, "resident") for _ in range(KV_STAGING_BUFFERS)]
        self._v = [device.empty(shape, dtype, "resident") for _ in range(KV_STAGING_BUFFERS)]
        rows = torch.arange(self.block_pages * self._widest, dtype=torch.int32, device="cpu")
        self._table = device.empty((self._widest, self.block_pages), torch.int32, "resident")
        self._rows = rows.view(self.block_pages, self._widest).T.contiguous()  # lives as long as its copy may take
        device.copy(self._table, self._rows, device.compute)

    def table(self, kv_heads: int) -> torch.Tensor:
        """Where a buffer has each page of a block: int32 [kv_heads, block_pages] in device memory."""
        return self._table[:kv_heads]

    def _copy(self, buffer: int, block: PageBlock) -> tuple[torch.Tensor, torch.Tensor]:
        device, place = self.device, 0
        k, v = (_as_wide(pages[buffer], block.store.k[block.layer]) for pages in (self._k, self._v))
        for (page,), length in runs([(page,) for page in block.pages]):
            rows = block.store.page_rows(page, length)
            for buffer_pages, store_pages in ((k, block.store.k), (v, block.store.v)):
                source = store_pages[block.layer][rows].view(length, -1)
                target = buffer_pages.view(self.block_pages, -1)[place : place + length, : source.shape[1]]
                device.copy(target, source, device.copies)
                self.copied_bytes += source.nbytes
            place += length
        return k, v


def _as_wide(buffer: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
    """The front of a buffer [rows, page_size, items] with rows of as many items as those of a store."""
    rows, page_size, _ = buffer.shape
    items = pages.shape[-1]
    return buffer.view(-1)[: rows * page_size * items].view(rows, page_size, items)
