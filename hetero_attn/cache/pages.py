"""Pages of keys and values: the memory they are in, and one page as the sequences that share it see it."""

import heapq
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from cpu_kernels import HUGE_PAGE_BYTES, advise_small_pages, fresh_memory
from cpu_kernels.formats import pages as kv_layout
from hetero_attn.devices import Device
from hetero_attn.errors import MemoryBudgetError

Allocate = Callable[[tuple[int, ...], torch.dtype, str], torch.Tensor]
TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "q8": torch.int8, "q4": torch.uint8}


def host_empty(shape: tuple[int, ...], dtype: torch.dtype, kind: str) -> torch.Tensor:
    """Allocate ordinary host memory; pages are touched, and so counted by the system, only when they are written.

    It begins with small pages. A prompt's first tokens lie at the beginning of every layer's memory, and there the
    system would clear a huge page for a few KB of each: 120 MB, and a third of a second, for 30 layers of any size.
    """
    memory = fresh_memory(shape, dtype)
    if memory.nbytes >= HUGE_PAGE_BYTES:
        advise_small_pages(memory.view(-1).view(torch.uint8)[:HUGE_PAGE_BYTES])
    return memory


@dataclass(slots=True, eq=False)
class Page:
    """`page_size` consecutive tokens in all layers of a pool, from token `index * page_size` on.

    host, recent, spilled: its number in the stores of those names; a page of the GPU's KV heads is in one of the last
    two. holders: ids of the sequences that hold it. node: where the prefix tree remembers it, None where it does not.
    """

    index: int
    host: int | None = None
    recent: int | None = None
    spilled: int | None = None
    holders: set[int] = field(default_factory=set)
    node: "Node | None" = None


@dataclass(slots=True, eq=False)
class Node:
    """One page of tokens after its parent's in the prefix tree.

    pages: by pool, None where it is not stored any more.
    """

    parent: "Node | None"
    tokens: tuple[Hashable, ...]
    pages: list[Page | None]
    children: dict[tuple[Hashable, ...], "Node"] = field(default_factory=dict)


def runs(pages: Sequence[tuple[int, ...]]) -> Iterator[tuple[tuple[int, ...], int]]:
    """(first, length) of each run in which all numbers of a page go up by one from page to page: one copy moves it."""
    start = 0
    for index in range(1, len(pages) + 1):
        expected = tuple(number + index - start for number in pages[start])
        if index == len(pages) or pages[index] != expected:
            yield pages[start], index - start
            start = index


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreSizes:
    """How large a store is: pages of page_size tokens for kv_heads KV heads in each of a run of layers, and the page
    tables of max_batch sequences of at most max_pages pages."""

    layers: int
    kv_heads: int
    num_pages: int
    page_size: int
    head_dim: int
    kv_dtype: str
    max_batch: int
    max_pages: int


class PagedStore:
    """Pages of `kv_heads` KV heads for a run of layers, in one memory.

    k[i], v[i]: [num_pages * kv_heads, page_size, row_items] of the run's i-th layer, laid out as
    cpu_kernels.formats.pages says for the KV dtype; page p of KV head h is row p * kv_heads + h. table: int32
    [max_batch, kv_heads, max_pages] in host memory, the row number of each logical page. allocate: where k and v come
    from, called with (shape, dtype, "kv"). device: whose memory that is, None for host memory.
    """

    def __init__(self, sizes: StoreSizes, allocate: Allocate, device: Device | None = None) -> None:
        kv_heads = self.kv_heads = sizes.kv_heads
        self.page_size = sizes.page_size
        self.max_batch = sizes.max_batch
        self.num_pages = sizes.num_pages
        self._allocate = allocate
        self._device = device
        self._parked: list[torch.Tensor] | None = None
        self._row_shape = (sizes.page_size, kv_layout.row_items(sizes.kv_dtype, sizes.head_dim))
        self._dtype = TORCH_DTYPES[sizes.kv_dtype]
        self.k = [self._new_pages() for _ in range(sizes.layers)]
        self.v = [self._new_pages() for _ in range(sizes.layers)]
        self.table = torch.zeros((sizes.max_batch, kv_heads, sizes.max_pages), dtype=torch.int32, device="cpu")
        self._numbers = self.table.numpy()
        self._free = list(range(sizes.num_pages))  # a heap: what is taken together lies together
        self._head_rows = np.arange(kv_heads, dtype=np.int32)
        self._head_slots = sizes.page_size * np.arange(kv_heads)  # of a page's first token, from its first row's on
        self._placed = [0] * sizes.max_batch

    @property
    def is_parked(self) -> bool:
        """Whether the pages in use wait in host memory for a `resize` that fits."""
        return self._parked is not None

    @property
    def free_pages(self) -> int:
        """Pages that are in no use."""
        return len(self._free)

    def acquire(self) -> int:
        """Take a free page; raises MemoryBudgetError when there is none."""
        if not self._free:
            raise MemoryBudgetError("the KV cache has no free page; raise kv_tokens, max_context or max_batch at load")
        return heapq.heappop(self._free)

    def free(self, page: int) -> None:
        """Take a page back."""
        heapq.heappush(self._free, page)

    def place(self, sequence_id: int, logical_page: int, page: int) -> None:
        """Let a sequence find its tokens [logical_page * page_size, ...) in a page."""
        self._numbers[sequence_id, :, logical_page] = page * self.kv_heads + self._head_rows
        self._placed[sequence_id] += 1

    def placed(self, sequence_id: int) -> int:
        """How often a page was placed for a sequence of this id; its line of the table is the same while this is."""
        return self._placed[sequence_id]

    def page_rows(self, page: int, pages: int = 1) -> slice:
        """Rows of k and v that hold this page, all KV heads, and those that follow it, `pages` together."""
        return slice(page * self.kv_heads, (page + pages) * self.kv_heads)

    def slots(self, sequence_ids: int | list[int], positions: torch.Tensor) -> torch.Tensor:
        """Where tokens at `positions` int64 [n] of a sequence, or each of another, are written.

        Returns int64 [n, kv_heads] into k viewed as tokens.
        """
        if len(positions) == 1:
            return self._slots_of_one(sequence_ids if isinstance(sequence_ids, int) else sequence_ids[0], positions)
        # numpy's calls cost a fifth of torch's on a few numbers.
        logical, inside = np.divmod(positions.numpy(), self.page_size)
        pages = self._numbers[sequence_ids, :, logical]  # [n, kv_heads]
        first = np.multiply(pages, self.page_size, dtype=np.int64, order="C")
        return torch.from_numpy(first + inside[:, None])

    def _slots_of_one(self, sequence_id: int, positions: torch.Tensor) -> torch.Tensor:
        """As `slots`, of one token: numpy's calls, whose code a step has pushed out of the caches, cost 5 us each."""
        logical, inside = divmod(positions.item(), self.page_size)
        rows = self._numbers[sequence_id, :, logical].tolist()
        return torch.from_numpy(np.array([[row * self.page_size + inside for row in rows]], np.int64))

    def write_slots(self, sequence_id: int, position: int, into: np.ndarray) -> None:
        """`slots` of one token of a sequence into int64 [kv_heads]."""
        logical, inside = divmod(position, self.page_size)
        first = self._numbers.item(sequence_id, 0, logical)
        np.add(self._head_slots, first * self.page_size + inside, into)

    def write_table(self, sequence_id: int, into: np.ndarray) -> None:
        """A sequence's line of `table` into int32 [kv_heads, max_pages]."""
        into[:] = self._numbers[sequence_id]

    def tables(self, sequence_ids: list[int]) -> torch.Tensor:
        """A copy of the page tables of some sequences, int32 [len(sequence_ids), kv_heads, pages]."""
        if len(sequence_ids) == 1:
            return torch.from_numpy(self._numbers[sequence_ids[0]][None].copy())
        return torch.from_numpy(self._numbers[sequence_ids])

    def resize(self, num_pages: int, used: list[int]) -> None:
        """Keep `num_pages` pages from now on: those in `used`, numbered from 0 in that order, and free ones.

        Only a store in GPU memory is resized: those in DRAM have room for every token from the start. No queued work
        may use the store. The pages wait in host memory while the old ones are given back before the new ones are
        allocated. Where those do not fit, MemoryBudgetError is raised and the pages go on waiting for a `resize` that
        fits.
        """
        assert self._device is not None and len(used) <= num_pages, (self._device, used, num_pages)
        self._park(used)
        self.num_pages = num_pages
        layers = len(self._parked) // 2
        for index, parked in enumerate(self._parked):
            pages = self._new_pages()
            (self.k if index < layers else self.v).append(pages)
            self._copy(pages[: parked.shape[0]], parked)
        self._finish_copies()
        self._parked = None
        self._free = list(range(len(used), num_pages))

    def _park(self, used: list[int]) -> None:
        """Move the used pages of every layer to host memory and give the store's memory back."""
        if self._parked is None:
            parked = [self._in_host_memory(pages, used) for pages in (*self.k, *self.v)]
            self._finish_copies()
            self._parked = parked
        for pages in (*self.k, *self.v):
            self._device.release(pages, "kv")
        self.k, self.v = [], []

    def _in_host_memory(self, pages: torch.Tensor, used: list[int]) -> torch.Tensor:
        parked = torch.empty((len(used) * self.kv_heads, *self._row_shape), dtype=self._dtype, device="cpu")
        for number, page in enumerate(used):
            self._copy(parked[self.page_rows(number)], pages[self.page_rows(page)])
        return parked

    def _copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        if source.numel():
            self._device.copy(target, source, self._device.compute)

    def _finish_copies(self) -> None:
        self._device.synchronize(self._device.record(self._device.compute))

    def _new_pages(self) -> torch.Tensor:
        return self._allocate((self.num_pages * self.kv_heads, *self._row_shape), self._dtype, "kv")
