"""The stores of one pool, and what becomes of a page in them: held, moved between GPU memory and DRAM, copied, freed.

    host     the KV heads the CPU owns: every token, DRAM
    recent   the KV heads the GPU owns: the newest tokens, GPU memory
    spilled  the same KV heads: the older tokens, DRAM, page-locked because they come from the GPU and go back there

Which page goes where, and when, the pool decides.
"""

from collections.abc import Sequence
from dataclasses import replace

from hetero_attn.cache.moves import PageMoves
from hetero_attn.cache.pages import Page, PagedStore, StoreSizes, host_empty
from hetero_attn.devices import Device
from placement.plan.memory import kv_recent_tokens, kv_spilled_tokens
from placement.plan.plan import Plan


class PageStores:
    """Stores for some layers of a plan, None each where it would hold nothing; moves: None without a GPU."""

    def __init__(self, plan: Plan, layers: Sequence[int], device: Device | None) -> None:
        workload, shard, placement = plan.workload, plan.workload.kv[layers[0]], plan.kv[layers[0]]
        self.moves = None if device is None else PageMoves(device, len(layers))
        self.host = self.recent = self.spilled = None
        on_gpu = StoreSizes(
            layers=len(layers),
            kv_heads=placement.gpu_kv_heads,
            num_pages=0,
            page_size=plan.page_size,
            head_dim=workload.head_dim_of(shard),
            kv_dtype=workload.kv_dtype,
            max_batch=plan.max_batch,
            max_pages=-(-plan.max_context // plan.page_size),
        )
        on_host = replace(on_gpu, kv_heads=shard.kv_heads - placement.gpu_kv_heads)
        tokens, recent, spilled = (
            workload.layer_tokens(shard),
            kv_recent_tokens(workload, shard, placement.gpu_tokens),
            kv_spilled_tokens(workload, shard, placement.gpu_tokens),
        )
        if on_host.kv_heads and tokens:
            self.host = PagedStore(replace(on_host, num_pages=tokens // plan.page_size), host_empty)
        if device is not None and on_gpu.kv_heads and recent:
            self.recent = PagedStore(replace(on_gpu, num_pages=recent // plan.page_size), device.empty, device)
        if device is not None and on_gpu.kv_heads and spilled:
            self.spilled = PagedStore(replace(on_gpu, num_pages=spilled // plan.page_size), device.host_empty)

    @property
    def by_name(self) -> dict[str, PagedStore]:
        """The stores that exist."""
        named = {"host": self.host, "recent": self.recent, "spilled": self.spilled}
        return {name: store for name, store in named.items() if store is not None}

    def hold(self, sequence_id: int, page: Page) -> None:
        """Let a sequence find a page where it is."""
        for name, store in self.by_name.items():
            if getattr(page, name) is not None:
                store.place(sequence_id, page.index, getattr(page, name))

    def free(self, page: Page) -> None:
        """Take a page's memory back wherever it has some."""
        for name, store in self.by_name.items():
            if getattr(page, name) is not None:
                store.free(getattr(page, name))
                setattr(page, name, None)

    def spill(self, page: Page, number: int) -> None:
        """Move a page from GPU memory to this number in DRAM, for all its holders."""
        page.spilled = number
        self.moves.queue(self.spilled, page.spilled, self.recent, page.recent)
        self.recent.free(page.recent)
        page.recent = None
        for sequence_id in page.holders:
            self.spilled.place(sequence_id, page.index, page.spilled)

    def fetch(self, page: Page, number: int) -> None:
        """Move a page from DRAM to this number in GPU memory, for all its holders."""
        page.recent = number
        self.moves.queue(self.recent, page.recent, self.spilled, page.spilled)
        self.spilled.free(page.spilled)
        page.spilled = None
        for sequence_id in page.holders:
            self.recent.place(sequence_id, page.index, page.recent)

    def copy(self, page: Page, into: Page) -> None:
        """Copy a page's keys and values into a new page, which is recent where there is a GPU."""
        if self.host is not None:
            to, frm = self.host.page_rows(into.host), self.host.page_rows(page.host)
            for pages in (*self.host.k, *self.host.v):
                pages[to] = pages[frm]
        if self.recent is not None:
            in_dram = page.recent is None
            source, number = (self.spilled, page.spilled) if in_dram else (self.recent, page.recent)
            self.moves.queue(self.recent, into.recent, source, number)

    def resize_recent(self, num_pages: int, pages: Sequence[Page]) -> None:
        """Keep `num_pages` in GPU memory from now on, among them these, which are all that are there."""
        self.moves.finish()
        self.recent.resize(num_pages, [page.recent for page in pages])
        for number, page in enumerate(pages):
            page.recent = number
            for sequence_id in page.holders:
                self.recent.place(sequence_id, page.index, number)

    def start_moves(self) -> None:
        """Begin what is queued."""
        if self.moves is not None:
            self.moves.start()
