"""The KV cache: per layer and KV-head group, a sequence cut into segments in GPU memory and in DRAM.

Layers whose plan places their cache alike form a `LayerGroup`, which keeps up to three stores of pages:

    host     the KV-head groups the CPU owns: every token, DRAM
    recent   the KV-head groups the GPU owns: the newest tokens, GPU memory
    spilled  the same groups: the older tokens, DRAM

so a GPU group's sequence is the segment [0, boundary) in `spilled` and [boundary, length) in `recent`. When the newest
tokens would not fit, whole pages move from `recent` to `spilled` and the boundary with them. A page holds `page_size`
tokens of every group of its store, for one layer of the group; all layers of a group share page numbers and tables.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from cpu_kernels import advise_huge_pages, kv_layout
from hetero_attn.errors import MemoryBudgetError
from placement.plan import KvPlacement, Plan

Allocate = Callable[[tuple[int, ...], torch.dtype, str], torch.Tensor]
Release = Callable[[torch.Tensor, str], None]
Copy = Callable[[torch.Tensor, torch.Tensor], None]
TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "q8": torch.int8, "q4": torch.uint8}


def host_empty(shape: tuple[int, ...], dtype: torch.dtype, kind: str) -> torch.Tensor:
    """Allocate host memory; pages are touched, and so counted by the system, only when they are written."""
    pages = torch.empty(shape, dtype=dtype)
    advise_huge_pages(pages)
    return pages


def host_release(tensor: torch.Tensor, kind: str) -> None:
    """Nothing to count: host memory goes back with its last reference."""


@dataclass(slots=True)
class SequenceState:
    """One sequence in the cache: the slot of its page tables and how many of its tokens are stored."""

    slot: int
    length: int = 0
    boundaries: list[int] = field(default_factory=list)


class PagedStore:
    """Pages of `groups` KV-head groups for a run of layers, in one memory.

    k[i], v[i]: [num_pages * groups, page_size, row_items] of the run's i-th layer, laid out as cpu_kernels.kv_layout
    says for the KV dtype; page p of group g is row p * groups + g. table: int32 [max_batch, groups, pages of max_context] in host memory, the row number of each logical page.
    """

    def __init__(
        self,
        allocate: Allocate,
        release: Release,
        *,
        layers: int,
        groups: int,
        num_pages: int,
        page_size: int,
        head_dim: int,
        kv_dtype: str,
        max_batch: int,
        max_pages: int,
    ) -> None:
        self._allocate, self._release = allocate, release
        self._page_shape, self._dtype = (page_size, kv_layout.row_items(kv_dtype, head_dim)), TORCH_DTYPES[kv_dtype]
        self._parked: list[torch.Tensor] | None = None
        self.groups = groups
        self.num_pages = num_pages
        self.page_size = page_size
        self.max_batch = max_batch
        self.k = [self._new_pages() for _ in range(layers)]
        self.v = [self._new_pages() for _ in range(layers)]
        self.table = torch.zeros((max_batch, groups, max_pages), dtype=torch.int32)
        self._free = list(range(num_pages - 1, -1, -1))
        self._held: list[dict[int, int]] = [{} for _ in range(max_batch)]
        self._group_rows = torch.arange(groups, dtype=torch.int32)

    @property
    def is_parked(self) -> bool:
        """Whether the held pages wait in host memory for a `resize` that fits."""
        return self._parked is not None

    @property
    def held_pages(self) -> int:
        """Pages that some sequence holds."""
        return len({page for pages in self._held for page in pages.values()})

    @property
    def free_pages(self) -> int:
        """Pages that no sequence holds."""
        return len(self._free)

    def holds(self, slot: int, logical_page: int) -> bool:
        """Whether a sequence has a page for its tokens [logical_page * page_size, ...)."""
        return logical_page in self._held[slot]

    def hold(self, slot: int, logical_page: int) -> int:
        """Give a sequence a page for its tokens [logical_page * page_size, ...); returns the page, kept if already held."""
        held = self._held[slot]
        if logical_page not in held:
            if not self._free:
                raise MemoryBudgetError("the KV cache has no free page; raise max_context or max_batch at load")
            held[logical_page] = self._free.pop()
            self.table[slot, :, logical_page] = held[logical_page] * self.groups + self._group_rows
        return held[logical_page]

    def drop(self, slot: int, logical_page: int) -> None:
        """Take a page back."""
        self._free.append(self._held[slot].pop(logical_page))

    def drop_from(self, slot: int, first_logical_page: int) -> None:
        """Take back a sequence's pages from `first_logical_page` on."""
        for logical_page in [page for page in self._held[slot] if page >= first_logical_page]:
            self.drop(slot, logical_page)

    def resize(self, num_pages: int) -> None:
        """Keep `num_pages` pages from now on, at least those that are held; no queued work may use the store.

        The held pages wait in host memory while the old pages are given back before the new ones are allocated. Where
        those do not fit, MemoryBudgetError is raised and the held pages go on waiting for a `resize` that fits.
        """
        held = sorted({page for pages in self._held for page in pages.values()})
        assert len(held) <= num_pages, (held, num_pages)
        self._park(held)
        self.num_pages = num_pages
        self._unpark()
        self._renumber({page: number for number, page in enumerate(held)})

    def _park(self, held: list[int]) -> None:
        """Move the held pages of every layer to host memory and give the store's memory back."""
        if self._parked is None:
            rows = [slice.start + group for slice in map(self.page_rows, held) for group in range(self.groups)]
            self._parked = [pages.cpu()[rows] for pages in (*self.k, *self.v)]
        for pages in (*self.k, *self.v):
            self._release(pages, "kv")
        self.k, self.v = [], []

    def _unpark(self) -> None:
        layers = len(self._parked) // 2
        for parked, pages in [(rows, self.k) for rows in self._parked[:layers]] + [
            (rows, self.v) for rows in self._parked[layers:]
        ]:
            pages.append(self._new_pages())
            pages[-1][: parked.shape[0]].copy_(parked)
        self._parked = None

    def _renumber(self, number_of: dict[int, int]) -> None:
        for slot, pages in enumerate(self._held):
            for logical_page, page in pages.items():
                pages[logical_page] = number_of[page]
                self.table[slot, :, logical_page] = number_of[page] * self.groups + self._group_rows
        self._free = list(range(self.num_pages - 1, len(number_of) - 1, -1))

    def _new_pages(self) -> torch.Tensor:
        return self._allocate((self.num_pages * self.groups, *self._page_shape), self._dtype, "kv")

    def page_rows(self, page: int) -> slice:
        """Rows of k and v that hold this page, all groups."""
        return slice(page * self.groups, (page + 1) * self.groups)

    def slots(self, slot: int, positions: torch.Tensor) -> torch.Tensor:
        """Where the tokens at `positions` int64 [n] of a sequence are written: int64 [n, groups] into k viewed as tokens."""
        pages = self.table[slot, :, positions // self.page_size].T.long()  # [n, groups]
        return pages * self.page_size + (positions % self.page_size)[:, None]


class LayerGroup:
    """The stores of the layers that one `KvPlacement` shape and one window describe."""

    def __init__(
        self,
        plan: Plan,
        layers: Sequence[int],
        groups: int,
        window: int,
        head_dim: int,
        device_empty: Allocate,
        device_release: Release,
    ) -> None:
        placement: KvPlacement = plan.kv[layers[0]]
        self.layers = tuple(layers)
        self.window = window
        self.page_size = plan.page_size
        self.gpu_groups = placement.gpu_groups
        max_pages = -(-plan.max_context // plan.page_size)
        self._all_pages = max_pages * plan.max_batch
        recent_pages = self._recent_pages(placement.gpu_tokens)

        def store(
            count: int, num_pages: int, allocate: Allocate = host_empty, release: Release = host_release
        ) -> PagedStore | None:
            if count == 0 or num_pages == 0:
                return None
            return PagedStore(
                allocate,
                release,
                layers=len(self.layers),
                groups=count,
                num_pages=num_pages,
                page_size=plan.page_size,
                head_dim=head_dim,
                kv_dtype=plan.workload.kv_dtype,
                max_batch=plan.max_batch,
                max_pages=max_pages,
            )

        self.host = store(groups - self.gpu_groups, self._all_pages)
        self.recent = store(self.gpu_groups, recent_pages, device_empty, device_release)
        may_spill = recent_pages < self._all_pages or plan.workload.elastic
        self.spilled = store(self.gpu_groups, self._all_pages if may_spill else 0)

    def _recent_pages(self, gpu_tokens: int) -> int:
        return min(-(-gpu_tokens // self.page_size), self._all_pages)

    @property
    def stores(self) -> tuple[PagedStore, ...]:
        """The stores that exist."""
        return tuple(store for store in (self.host, self.recent, self.spilled) if store is not None)

    @property
    def max_new_tokens(self) -> int | None:
        """The most tokens of one append, None without a limit: every other sequence keeps the page it is writing to."""
        return None if self.spilled is None else (self.recent.num_pages - self.recent.max_batch) * self.recent.page_size

    def make_room(
        self, index: int, sequence: SequenceState, new_tokens: int, others: Sequence[SequenceState], copy: Copy
    ) -> None:
        """Hold pages for `new_tokens` more of `sequence`, moving the oldest pages of the fullest sequences to DRAM as
        needed.

        index: of this group in `SequenceState.boundaries`, which are moved in place. others: every open sequence.
        `copy(target, source)` moves one page of one layer from GPU memory to host memory.
        """
        stop = -(-(sequence.length + new_tokens) // self.page_size)
        pages = range(sequence.length // self.page_size, stop)
        if self.recent is not None:
            wanted = sum(not self.recent.holds(sequence.slot, page) for page in pages)
            while self.recent.free_pages < wanted:
                self._spill_one(index, others, copy)
        for store in (self.host, self.recent):
            if store is not None:
                for page in pages:
                    store.hold(sequence.slot, page)

    def shrink(self, index: int, gpu_tokens: int, sequences: Sequence[SequenceState], copy: Copy) -> None:
        """Keep no more than `gpu_tokens` in GPU memory; older pages move to DRAM as needed."""
        pages = self._recent_pages(gpu_tokens)
        if self.recent is not None and pages < self.recent.num_pages:
            while self.recent.held_pages > pages:
                self._spill_one(index, sequences, copy)
            self.recent.resize(pages)

    def grow(self, index: int, gpu_tokens: int, sequences: Sequence[SequenceState], copy: Copy) -> None:
        """Keep up to `gpu_tokens` in GPU memory; the newest pages in DRAM come back."""
        pages = self._recent_pages(gpu_tokens)
        if self.recent is not None and (pages > self.recent.num_pages or self.recent.is_parked):
            self.recent.resize(pages)
            while self.recent.free_pages and any(sequence.boundaries[index] for sequence in sequences):
                self._promote_one(index, sequences, copy)

    def _promote_one(self, index: int, sequences: Sequence[SequenceState], copy: Copy) -> None:
        oldest = max(sequences, key=lambda sequence: sequence.boundaries[index])
        boundary = oldest.boundaries[index] - self.page_size
        self._move(self.spilled, self.recent, oldest.slot, boundary // self.page_size, copy)
        oldest.boundaries[index] = boundary

    def _spill_one(self, index: int, sequences: Sequence[SequenceState], copy: Copy) -> None:
        def full_pages(sequence: SequenceState) -> int:
            return (sequence.length - sequence.boundaries[index]) // self.page_size

        fullest = max(sequences, key=full_pages)
        if full_pages(fullest) == 0 or self.spilled is None:
            raise MemoryBudgetError(
                f"the KV cache keeps {self.recent.num_pages} pages of {self.page_size} tokens in GPU memory and none is left "
                "to move to DRAM; give the plan more kv gpu_tokens, or fewer sequences at once"
            )
        self._move(self.recent, self.spilled, fullest.slot, fullest.boundaries[index] // self.page_size, copy)
        fullest.boundaries[index] += self.page_size

    def _move(self, source: PagedStore, target: PagedStore, slot: int, logical_page: int, copy: Copy) -> None:
        source_rows = source.page_rows(source.hold(slot, logical_page))
        target_rows = target.page_rows(target.hold(slot, logical_page))
        try:
            for layer in range(len(self.layers)):
                copy(target.k[layer][target_rows], source.k[layer][source_rows])
                copy(target.v[layer][target_rows], source.v[layer][source_rows])
        except BaseException:
            target.drop(slot, logical_page)
            raise
        source.drop(slot, logical_page)


class KVCache:
    """Every layer's keys and values for up to `plan.max_batch` sequences of up to `plan.max_context` tokens.

    `device_empty(shape, dtype, kind)` allocates GPU memory, `device_release(tensor, kind)` returns it; `copy(target,
    source)` moves a page between GPU and host memory, in order with the GPU's compute.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        num_kv_heads: int,
        head_dim: int,
        windows: Sequence[int],
        device_empty: Allocate,
        device_release: Release,
        copy: Copy,
    ) -> None:
        self._copy = copy
        self._max_context = plan.max_context
        self._free_slots = list(range(plan.max_batch - 1, -1, -1))
        self._open: dict[int, SequenceState] = {}
        kinds: dict[tuple[int, int, int], list[int]] = {}
        for layer, placement in enumerate(plan.kv):
            kinds.setdefault((placement.gpu_groups, placement.gpu_tokens, windows[layer]), []).append(layer)
        self.layer_groups = tuple(
            LayerGroup(plan, layers, num_kv_heads, window, head_dim, device_empty, device_release)
            for (_, _, window), layers in kinds.items()
        )
        # layer -> (index of its layer group, its place in that group)
        self.places = {
            layer: (index, place)
            for index, group in enumerate(self.layer_groups)
            for place, layer in enumerate(group.layers)
        }

    @property
    def free_slots(self) -> int:
        """How many more sequences can be opened."""
        return len(self._free_slots)

    @property
    def max_new_tokens(self) -> int:
        """The most tokens of one sequence that a single step may append."""
        limits = [limit for group in self.layer_groups if (limit := group.max_new_tokens) is not None]
        return min(limits, default=self._max_context)

    def open(self) -> SequenceState:
        """Start an empty sequence; raises MemoryBudgetError when `max_batch` are open."""
        if not self._free_slots:
            raise MemoryBudgetError("every sequence of the plan is in use; close one or raise max_batch at load")
        sequence = SequenceState(self._free_slots.pop(), boundaries=[0] * len(self.layer_groups))
        self._open[sequence.slot] = sequence
        return sequence

    def close(self, sequence: SequenceState) -> None:
        """End a sequence and take back its pages."""
        for store in self._stores():
            store.drop_from(sequence.slot, 0)
        del self._open[sequence.slot]
        self._free_slots.append(sequence.slot)

    def rewind(self, sequence: SequenceState, length: int) -> bool:
        """Forget the tokens from `length` on; False, and nothing is done, where that would undo a move to DRAM."""
        if length < max(sequence.boundaries):
            return False
        for store in self._stores():
            store.drop_from(sequence.slot, -(-length // store.page_size))
        sequence.length = length
        return True

    def shrink(self, plan: Plan) -> None:
        """Give back GPU memory beyond what this plan keeps; nothing queued may use the cache."""
        for index, group in enumerate(self.layer_groups):
            group.shrink(index, self._gpu_tokens(group, plan), tuple(self._open.values()), self._copy)

    def grow(self, plan: Plan) -> None:
        """Take the GPU memory that this plan keeps; nothing queued may use the cache. Raises MemoryBudgetError."""
        for index, group in enumerate(self.layer_groups):
            group.grow(index, self._gpu_tokens(group, plan), tuple(self._open.values()), self._copy)

    @staticmethod
    def _gpu_tokens(group: LayerGroup, plan: Plan) -> int:
        return min(plan.kv[layer].gpu_tokens for layer in group.layers)

    def _stores(self) -> tuple[PagedStore, ...]:
        return tuple(store for group in self.layer_groups for store in group.stores)

    def make_room(self, sequence: SequenceState, new_tokens: int) -> None:
        """Hold pages for `new_tokens` more of this sequence; `length` itself moves when the step has written them."""
        for index, group in enumerate(self.layer_groups):
            group.make_room(index, sequence, new_tokens, tuple(self._open.values()), self._copy)
