"""Copies of whole pages between GPU memory and DRAM, in the background of the steps that do not need them yet.

Moves are queued while a step is planned and start, layer by layer, on the copy stream:

    compute stream  [work so far] --queued--> copies stream [layer 0] --done[0]--> [layer 1] --done[1]--> ...

so a page is copied after all work that wrote or read it, and a layer waits, just before its attention, only for its own
copies. What follows that wait on the compute stream may overwrite what was copied and read what arrived.
"""

from hetero_attn.cache.pages import PagedStore
from hetero_attn.devices import Device


class PageMoves:
    """The moves of one layer group with `layers` layers."""

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
        device, moves = self._device, self._queued
        device.wait(device.copies, device.record(device.compute))
        for layer in range(len(self._done)):
            for target, target_page, source, source_page in moves:
                to, frm = target.page_rows(target_page), source.page_rows(source_page)
                device.copy(target.k[layer][to], source.k[layer][frm], device.copies)
                device.copy(target.v[layer][to], source.v[layer][frm], device.copies)
            self._done[layer] = device.record(device.copies)
        self.moved_pages += len(moves)
        self._queued = []

    def finish(self) -> None:
        """Start what is queued and block the caller until all moves have been made."""
        self.start()
        self._device.synchronize(self._device.record(self._device.copies))

    def wait(self, layer: int) -> None:
        """Let compute queued from now on find the layer's moves done."""
        if self._done[layer] is not None:
            self._device.wait(self._device.compute, self._done[layer])
            self._done[layer] = None
