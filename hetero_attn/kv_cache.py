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
Copy = Callable[[torch.Tensor, torch.Tensor], None]
TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "q8": torch.int8, "q4": torch.uint8}


def host_empty(shape: tuple[int, ...], dtype: torch.dtype, kind: str) -> torch.Tensor:
    """Allocate host memory; pages are touched, and so counted by the system, only when they are written."""
    pages = torch.empty(shape, dtype=dtype)
    advise_huge_pages(pages)
    return pages


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
        shape = (num_pages * groups, page_size, kv_layout.row_items(kv_dtype, head_dim))
        dtype = TORCH_DTYPES[kv_dtype]
        self.groups = groups
        self.num_pages = num_pages
        self.page_size = page_size
        self.max_batch = max_batch
        self.k = [allocate(shape, dtype, "kv") for _ in range(layers)]
        self.v = [allocate(shape, dtype, "kv") for _ in range(layers)]
        self.table = torch.zeros((max_batch, groups, max_pages), dtype=torch.int32)
        self._free = list(range(num_pages - 1, -1, -1))
        self._held: list[dict[int, int]] = [{} for _ in range(max_batch)]
        self._group_rows = torch.arange(groups, dtype=torch.int32)

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
    ) -> None:
        placement: KvPlacement = plan.kv[layers[0]]
        self.layers = tuple(layers)
        self.window = window
        self.page_size = plan.page_size
        self.gpu_groups = placement.gpu_groups
        max_pages = -(-plan.max_context // plan.page_size)
        all_pages = max_pages * plan.max_batch
        recent_pages = min(-(-placement.gpu_tokens // plan.page_size), all_pages)

        def store(count: int, num_pages: int, allocate: Allocate) -> PagedStore | None:
            if count == 0 or num_pages == 0:
                return None
            return PagedStore(
                allocate,
                layers=len(self.layers),
                groups=count,
                num_pages=num_pages,
                page_size=plan.page_size,
                head_dim=head_dim,
                kv_dtype=plan.workload.kv_dtype,
                max_batch=plan.max_batch,
                max_pages=max_pages,
            )

        self.host = store(groups - self.gpu_groups, all_pages, host_empty)
        self.recent = store(self.gpu_groups, recent_pages, device_empty)
        self.spilled = store(self.gpu_groups, all_pages if recent_pages < all_pages else 0, host_empty)

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

    def _spill_one(self, index: int, sequences: Sequence[SequenceState], copy: Copy) -> None:
        def full_pages(sequence: SequenceState) -> int:
            return (sequence.length - sequence.boundaries[index]) // self.page_size

        fullest = max(sequences, key=full_pages)
        if full_pages(fullest) == 0 or self.spilled is None:
            raise MemoryBudgetError(
                f"the KV cache keeps {self.recent.num_pages} pages of {self.page_size} tokens in GPU memory and none is left "
                "to move to DRAM; give the plan more kv gpu_tokens, or fewer sequences at once"
            )
        self._spill(fullest.slot, fullest.boundaries[index] // self.page_size, copy)
        fullest.boundaries[index] += self.page_size

    def _spill(self, slot: int, logical_page: int, copy: Copy) -> None:
        source = self.recent.page_rows(self.recent.hold(slot, logical_page))
        target = self.spilled.page_rows(self.spilled.hold(slot, logical_page))
        for layer in range(len(self.layers)):
            copy(self.spilled.k[layer][target], self.recent.k[layer][source])
            copy(self.spilled.v[layer][target], self.recent.v[layer][source])
        self.recent.drop(slot, logical_page)


class KVCache:
    """Every layer's keys and values for up to `plan.max_batch` sequences of up to `plan.max_context` tokens.

    `device_empty(shape, dtype, kind)` allocates GPU memory; `copy(target, source)` moves a page to host memory, in
    order with the GPU's compute.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        num_kv_heads: int,
        head_dim: int,
        windows: Sequence[int],
        device_empty: Allocate,
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
            LayerGroup(plan, layers, num_kv_heads, window, head_dim, device_empty)
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

    def _stores(self) -> tuple[PagedStore, ...]:
        return tuple(store for group in self.layer_groups for store in group.stores)

    def make_room(self, sequence: SequenceState, new_tokens: int) -> None:
        """Hold pages for `new_tokens` more of this sequence; `length` itself moves when the step has written them."""
        for index, group in enumerate(self.layer_groups):
            group.make_room(index, sequence, new_tokens, tuple(self._open.values()), self._copy)
