"""Copies of whole pages between GPU memory and DRAM, in the background of the steps that do not need them yet.

Pages whose numbers go up together in both stores are one copy. Moves are queued while a step is planned and start,
layer by layer, on the copy stream:

    compute stream  [work so far] --queued--> copies stream [layer 0] --done[0]--> [layer 1] --done[1]--> ...

so a page is copied after all work that wrote or read it, and a layer waits, just before its attention, only for its own
copies. What follows that wait on the compute stream may overwrite what was copied and read what arrived.
"""

from collections.abc import Iterator
from itertools import groupby

from hetero_attn.cache.pages import PagedStore, runs
from hetero_attn.devices import Device


class PageMoves:
    """The moves of one pool with `layers` layers."""

    def __init__(self, device: Device, layers: int) -> None:
        self._device = device
        self._queued: list[tuple[PagedStore, int, PagedStore, int]] = []
        self._done: list[object | None] = [None] * layers
        self.moved_pages = 0

    def queue(self, target: PagedStore, target_page: int, source: PagedStore, source_page: int) -> None:
        """Copy a page from one store to another when `start` is called; moves keep their order."""
        self._queued.append((target, target_page, source, source_page))

    def start(self) -> None:
        """Start what is queued; it follows all compute queued so far."""
        if not self._queued:
            return
        device, copies = self._device, list(self._copies())
        device.wait(device.copies, device.record(device.compute))
        for layer in range(len(self._done)):
            for target, to, source, frm in copies:
                device.copy(target.k[layer][to], source.k[layer][frm], device.copies)
                device.copy(target.v[layer][to], source.v[layer][frm], device.copies)
            self._done[layer] = device.record(device.copies)
        self.moved_pages += len(self._queued)
        self._queued = []

    def _copies(self) -> Iterator[tuple[PagedStore, slice, PagedStore, slice]]:
        """Target and its rows, source and its rows, of every copy that one layer needs; moves keep their order."""
        for _, between in groupby(self._queued, key=lambda move: (id(move[0]), id(move[2]))):
            moves = list(between)
            target, _, source, _ = moves[0]
            pages = [(move[1], move[3]) for move in moves]
            # Within one store a run might overlap itself.
            for (to, frm), length in runs(pages) if target is not source else ((page, 1) for page in pages):
                yield target, target.page_rows(to, length), source, source.page_rows(frm, length)

    def finish(self) -> None:
        """Start what is queued and block the caller until all moves have been made."""
        self.start()
        self._device.synchronize(self._device.record(self._device.copies))

    def wait(self, layer: int) -> None:
        """Let compute queued from now on find the layer's moves done."""
        if self._done[layer] is not None:
            self._device.wait(self._device.compute, self._done[layer])
            self._done[layer] = None
