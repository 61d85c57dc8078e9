"""The KV cache of the layers that one placement and one window describe: who holds which page, and in which store.

Its stores are `host`, `recent` and `spilled` (`stores.py`). A sequence of a KV head of the GPU is the segment
[first, boundary) in `spilled` and [boundary, length) in `recent`. A page that several sequences hold has one place for
all of them, so moving it moves their boundaries together. When the
newest tokens would not fit, idle pages leave `recent` first and then the oldest page of the fullest sequence. Pages
wholly older than a sliding window are let go as the sequence grows. A page that nobody holds stays, idle, while the
prefix tree remembers it and nobody needs its memory; the one idle for longest goes first.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from hetero_attn.cache.pages import Page, PagedStore
from hetero_attn.cache.stores import PageStores
from hetero_attn.devices import Device
from hetero_attn.errors import MemoryBudgetError
from placement.plan.plan import Plan


@dataclass(slots=True)
class SequenceState:
    """One sequence in the cache: the number of its page tables, in 0..max_batch - 1, and how many of its tokens are
    stored."""

    id: int
    length: int = 0


class CachePool:
    """Pages of up to `plan.max_batch` sequences for some layers of a plan; see the module docstring.

    device: None without a GPU. idle: remembered pages that no sequence holds, the one idle for longest first. forget:
    set to what is called before a remembered page is taken for something else.
    """

    def __init__(self, plan: Plan, layers: Sequence[int], device: Device | None) -> None:
        workload, shard, placement = plan.workload, plan.workload.kv[layers[0]], plan.kv[layers[0]]
        self.layers = tuple(layers)
        self.window = shard.window
        self.page_size = plan.page_size
        self.gpu_kv_heads = placement.gpu_kv_heads
        self.capacity = workload.layer_tokens(shard) // self.page_size
        self.forget: Callable[[Page], None] = lambda page: None
        self._sequence_pages = workload.sequence_tokens(shard) // self.page_size
        self._held: list[dict[int, Page]] = [{} for _ in range(plan.max_batch)]
        self._reserved = [0] * plan.max_batch
        self._boundary = [0] * plan.max_batch  # in pages
        self.idle: dict[Page, None] = {}
        self._stores = PageStores(plan, layers, device)
        self.host, self.recent, self.spilled = self._stores.host, self._stores.recent, self._stores.spilled
        self.moves = self._stores.moves

    @property
    def stores(self) -> dict[str, PagedStore]:
        """The stores that exist, by name."""
        return self._stores.by_name

    @property
    def max_new_pages(self) -> int | None:
        """The most pages that one step may begin, None without a limit: every sequence keeps the one it writes to.

        A sequence's first new token needs none of them, since what it fills last can leave then; n tokens may begin
        `new_pages(n)`.
        """
        return None if self.spilled is None else self.recent.num_pages - self.recent.max_batch

    @property
    def free_pages(self) -> int:
        """Pages that no sequence has reserved."""
        return self.capacity - sum(self._reserved)

    def pages_for(self, tokens: int) -> int:
        """Most pages that a sequence of `tokens` tokens ever holds."""
        return min(-(-tokens // self.page_size), self._sequence_pages)

    def first_visible(self, length: int) -> int:
        """The first token that a new one at position `length` attends to."""
        return max(0, length + 1 - self.window) if self.window else 0

    def boundary(self, sequence_id: int) -> int:
        """The first token of a sequence that is in `recent`."""
        return self._boundary[sequence_id] * self.page_size

    def held(self, sequence_id: int) -> dict[int, Page]:
        """The pages of a sequence by logical number; not to be changed."""
        return self._held[sequence_id]

    def reserved(self, sequence_id: int) -> int:
        """Pages set aside for a sequence."""
        return self._reserved[sequence_id]

    def reserve(self, sequence_id: int, tokens: int) -> None:
        """Set pages aside for a sequence of at most `tokens` tokens; `free_pages` must allow it."""
        self._reserved[sequence_id] = self.pages_for(tokens)

    def make_room(self, sequence: SequenceState, new_tokens: int, others: Iterable[SequenceState]) -> None:
        """Hold pages for `new_tokens` more; lets go of pages that the window has passed.

        others: every open sequence. Raises MemoryBudgetError beyond the reservation.
        """
        sequence_id, held = sequence.id, self._held[sequence.id]
        first = self.first_visible(sequence.length) // self.page_size
        if first:
            for logical in [logical for logical in held if logical < first]:
                self._let_go(sequence_id, logical)
            self._boundary[sequence_id] = max(self._boundary[sequence_id], first)
        stop = -(-(sequence.length + new_tokens) // self.page_size)
        missing = [logical for logical in range(sequence.length // self.page_size, stop) if logical not in held]
        if len(held) + len(missing) > self._reserved[sequence_id]:
            raise MemoryBudgetError(
                f"the sequence reserved {self._reserved[sequence_id]} pages of {self.page_size} tokens and needs "
                f"{len(held) + len(missing)}; reserve more when it is opened"
            )
        for logical in missing:
            self._hold(sequence_id, self._new_page(logical, others))
        self._stores.start_moves()

    def share(self, sequence_id: int, pages: Iterable[Page]) -> None:
        """Let a sequence hold pages that exist, in order and before any of its own."""
        pages = list(pages)
        for page in pages:
            self.idle.pop(page, None)
            self._hold(sequence_id, page)
        self._boundary[sequence_id] = pages[0].index if pages else 0
        older = [page.index for page in pages if page.recent is None]
        if self.recent is not None and older:
            self._boundary[sequence_id] = max(older) + 1
            for page in pages:
                if page.recent is not None and page.index <= max(older):
                    self._spill(page)
        self._stores.start_moves()

    def own_tail(self, sequence: SequenceState, others: Iterable[SequenceState]) -> None:
        """Make the page that a sequence writes to next, if it is partly filled, its own and, on the GPU, recent."""
        sequence_id, logical = sequence.id, sequence.length // self.page_size
        self._boundary[sequence_id] = min(self._boundary[sequence_id], logical)
        if sequence.length % self.page_size == 0:
            return
        page = self._held[sequence_id][logical]
        if page.holders == {sequence_id}:
            self._forget(page)
            if self.recent is not None and page.recent is None:
                self._fetch(page, others)
        else:
            self._copy_for(sequence_id, page, others)
        self._stores.start_moves()

    def cut(self, sequence_id: int, length: int) -> None:
        """Let go of the pages of the tokens from `length` on."""
        first = -(-length // self.page_size)
        for logical in sorted((logical for logical in self._held[sequence_id] if logical >= first), reverse=True):
            self._let_go(sequence_id, logical)
        self._boundary[sequence_id] = min(self._boundary[sequence_id], length // self.page_size)

    def end(self, sequence_id: int) -> None:
        """Let go of everything that a sequence holds or has reserved."""
        self.cut(sequence_id, 0)
        self._reserved[sequence_id] = 0

    def drop(self, page: Page) -> None:
        """Free a page that the prefix tree no longer remembers, unless a sequence holds it."""
        if not page.holders:
            self.idle.pop(page, None)
            self._stores.free(page)

    def shrink(self, gpu_tokens: int, others: Iterable[SequenceState]) -> None:
        """Keep no more than `gpu_tokens` in GPU memory; older pages move to DRAM as needed."""
        pages = self._recent_pages(gpu_tokens)
        if self.recent is not None and pages < self.recent.num_pages:
            while self.recent.num_pages - self.recent.free_pages > pages:
                self._vacate_recent(others)
            self._resize_recent(pages)

    def grow(self, gpu_tokens: int, others: Iterable[SequenceState], anew: bool = False) -> None:
        """Keep up to `gpu_tokens` in GPU memory; the newest pages in DRAM come back. Raises MemoryBudgetError.

        anew: give the store another place even if its size stays, where GPU memory is in pieces.
        """
        pages = self._recent_pages(gpu_tokens)
        if self.recent is not None and (anew or pages > self.recent.num_pages or self.recent.is_parked):
            self._resize_recent(pages)
            while self.recent.free_pages and (page := self._newest_spilled(others)) is not None:
                self._fetch(page, others)
            self._stores.start_moves()

    def _recent_pages(self, gpu_tokens: int) -> int:
        return min(-(-gpu_tokens // self.page_size), self.capacity)

    def _resize_recent(self, num_pages: int) -> None:
        pages = {page: None for held in self._held for page in held.values() if page.recent is not None}
        pages |= {page: None for page in self.idle if page.recent is not None}
        self._stores.resize_recent(num_pages, list(pages))

    def _newest_spilled(self, sequences: Iterable[SequenceState]) -> Page | None:
        """The last page in DRAM of the sequence with the most there; its sharers have their boundary behind it too."""
        sequence_id = max(
            (sequence.id for sequence in sequences), key=lambda sequence_id: self._boundary[sequence_id], default=None
        )
        return None if sequence_id is None else self._held[sequence_id].get(self._boundary[sequence_id] - 1)

    def _new_page(self, logical: int, others: Iterable[SequenceState]) -> Page:
        page = Page(logical)
        try:
            if self.host is not None:
                page.host = self._acquire(self.host, "host")
            if self.recent is not None:
                page.recent = self._acquire_recent(others)
        except BaseException:
            self._stores.free(page)
            raise
        return page

    def _hold(self, sequence_id: int, page: Page) -> None:
        page.holders.add(sequence_id)
        self._held[sequence_id][page.index] = page
        self._stores.hold(sequence_id, page)

    def _let_go(self, sequence_id: int, logical: int) -> None:
        page = self._held[sequence_id].pop(logical)
        page.holders.discard(sequence_id)
        if not page.holders:
            if page.node is None:
                self._stores.free(page)
            else:
                self.idle[page] = None

    def _forget(self, page: Page) -> None:
        if page.node is not None:
            self.forget(page)

    def _acquire(self, store: PagedStore, name: str) -> int:
        """A free page of a store, taken from the page idle for longest if need be."""
        while not store.free_pages and (idle := self._longest_idle(name)) is not None:
            self._forget(idle)
        return store.acquire()

    def _longest_idle(self, name: str) -> Page | None:
        return next((page for page in self.idle if getattr(page, name) is not None), None)

    def _acquire_recent(self, others: Iterable[SequenceState]) -> int:
        while not self.recent.free_pages:
            self._vacate_recent(others)
        return self.recent.acquire()

    def _vacate_recent(self, others: Iterable[SequenceState]) -> None:
        """Take a page out of GPU memory: the one idle for longest, else the oldest of the fullest sequence."""
        idle = self._longest_idle("recent")
        if idle is None:
            self._spill_oldest(others)
        elif self.spilled is not None and self.spilled.free_pages:
            self._spill(idle)
        else:
            self._forget(idle)

    def _spill_oldest(self, sequences: Iterable[SequenceState]) -> None:
        """Move the oldest recent page of the sequence with the most full ones to DRAM."""

        def full_pages(sequence: SequenceState) -> int:
            return sequence.length // self.page_size - self._boundary[sequence.id]

        fullest = max(sequences, key=full_pages)
        if full_pages(fullest) <= 0 or self.spilled is None:
            raise MemoryBudgetError(
                f"the KV cache keeps {self.recent.num_pages} pages of {self.page_size} tokens in GPU memory and none "
                "is left to move to DRAM; give the plan more kv gpu_tokens, or fewer sequences at once"
            )
        self._spill(self._held[fullest.id][self._boundary[fullest.id]])

    def _spill(self, page: Page) -> None:
        """Move a page to DRAM, after every older one of its sequences: one whose window is behind may hold some."""
        for sequence_id in page.holders:
            for logical in range(self._boundary[sequence_id], page.index):
                if logical in self._held[sequence_id] and self._held[sequence_id][logical].recent is not None:
                    self._spill(self._held[sequence_id][logical])
        self._stores.spill(page, self._acquire(self.spilled, "spilled"))
        for sequence_id in page.holders:
            self._boundary[sequence_id] = max(self._boundary[sequence_id], page.index + 1)

    def _fetch(self, page: Page, others: Iterable[SequenceState]) -> None:
        """Bring a page back, the last in DRAM of every sequence that holds it."""
        self._stores.fetch(page, self._acquire_recent(others))
        for sequence_id in page.holders:
            self._boundary[sequence_id] = page.index

    def _copy_for(self, sequence_id: int, page: Page, others: Iterable[SequenceState]) -> None:
        """Give a sequence a copy of a page that it shares."""
        copy = self._new_page(page.index, others)
        self._stores.copy(page, copy)
        page.holders.discard(sequence_id)
        self._hold(sequence_id, copy)
