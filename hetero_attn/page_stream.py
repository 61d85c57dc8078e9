"""Older keys and values on their way to the GPU: a prompt's chunk attends them there, block by block.

A step announces, in order, every block of pages that its layers will read; two buffers take turns, so the next block
arrives while the last one is attended. As in the staging ring, ownership of a buffer passes by events alone:

    copies stream   [pages -> buffer]  --ready-->  compute stream  [attention reads buffer]  --free-->  copies stream

Every buffer is a small store of its own: page p of group g is row p * widest + g, and one constant table says so.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from cpu_kernels.kv_layout import row_items
from hetero_attn.devices import Device
from hetero_attn.kv_pages import TORCH_DTYPES, PagedStore
from placement.memory import KV_STAGING_BUFFERS, kv_staging_pages
from placement.workload import Workload


@dataclass(frozen=True, slots=True)
class PageBlock:
    """Consecutive logical pages of one sequence in one layer: where they are, and which logical page is the first."""

    store: PagedStore
    layer: int
    first: int
    pages: tuple[int, ...]


class PageStream:
    """The buffers of a plan, each of `block_pages` pages of as many KV-head groups as the widest layer has."""

    def __init__(self, device: Device, workload: Workload) -> None:
        self._device = device
        self._pending: deque[PageBlock] = deque()
        self._arriving: deque[tuple[int, object]] = deque()
        self._free: list[object | None] = [None] * KV_STAGING_BUFFERS
        self.block_pages = kv_staging_pages(workload)
        self._widest = max(shard.groups for shard in workload.kv)
        shape = (self.block_pages * self._widest, workload.page_size, row_items(workload.kv_dtype, workload.head_dim))
        dtype = TORCH_DTYPES[workload.kv_dtype]
        self._k = [device.empty(shape, dtype, "resident") for _ in range(KV_STAGING_BUFFERS)]
        self._v = [device.empty(shape, dtype, "resident") for _ in range(KV_STAGING_BUFFERS)]
        rows = torch.arange(self.block_pages * self._widest, dtype=torch.int32)
        self._table = device.empty((self._widest, self.block_pages), torch.int32, "resident")
        self._rows = rows.view(self.block_pages, self._widest).T.contiguous()  # lives as long as its copy may take
        device.copy(self._table, self._rows, device.compute)
        self.copied_bytes = 0

    def table(self, groups: int) -> torch.Tensor:
        """Where a buffer has each page of a block: int32 [groups, block_pages] in device memory."""
        return self._table[:groups]

    def announce(self, blocks: Iterable[PageBlock]) -> None:
        """Say what the coming step will read, in order, and start the first copies."""
        self._pending.extend(blocks)
        for buffer in range(KV_STAGING_BUFFERS):
            self._fill(buffer)

    def take(self) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of the next block, rows as `table` says; compute queued from now on sees them complete."""
        buffer, ready = self._arriving[0]
        self._device.wait(self._device.compute, ready)
        return self._k[buffer], self._v[buffer]

    def give_back(self) -> None:
        """Say that all compute queued so far is the last to read the block; starts the next copy into its buffer."""
        buffer, _ = self._arriving.popleft()
        self._free[buffer] = self._device.record(self._device.compute)
        self._fill(buffer)

    def settle(self) -> None:
        """Say that all queued work has ended, so nothing needs to be waited for."""
        self._free = [None] * KV_STAGING_BUFFERS

    def reset(self) -> None:
        """Forget what was announced; for a step that was given up half-way, after all queued work has ended."""
        self._pending.clear()
        self._arriving.clear()
        self.settle()

    def _fill(self, buffer: int) -> None:
        if not self._pending:
            return
        device, block = self._device, self._pending.popleft()
        if self._free[buffer] is not None:
            device.wait(device.copies, self._free[buffer])
        for place, page in enumerate(block.pages):
            to = slice(place * self._widest, place * self._widest + block.store.groups)
            frm = block.store.page_rows(page)
            device.copy(self._k[buffer][to], block.store.k[block.layer][frm], device.copies)
            device.copy(self._v[buffer][to], block.store.v[block.layer][frm], device.copies)
            self.copied_bytes += 2 * self._k[buffer][to].nbytes
        self._arriving.append((buffer, device.record(device.copies)))
