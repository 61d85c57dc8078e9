"""Compiled grammars that are kept for later requests, as long as they fit: one may hold 150 MB, another 50 kB.

llguidance does not tell what a grammar takes, so it is what the process has allocated more when one is compiled. What
others allocate meanwhile counts too: then an older grammar goes too early, and is compiled again when it is asked for.
"""

import ctypes
from collections import OrderedDict
from threading import Lock
from typing import Any

KEPT_BYTES = 256 << 20  # `((a{1000}){100}){3}` takes 150 MB, a schema of 100 fields 0.7 MB
MOST_KEPT = 16


class KeptGrammars:
    """Matchers at their start by (kind, text), the latest asked for last; thread-safe.

    Together they take at most KEPT_BYTES; the newest is kept whatever it takes.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._kept: OrderedDict[tuple[str, str], tuple[Any, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, wanted: tuple[str, str]) -> Any:
        """The matcher of a grammar, not to be moved; None where it is not kept."""
        with self._lock:
            if wanted not in self._kept:
                return None
            self._kept.move_to_end(wanted)
            return self._kept[wanted][0]

    def keep(self, wanted: tuple[str, str], matcher: Any, nbytes: int) -> None:
        """Keep one that takes so many bytes, in the place of the oldest ones."""
        with self._lock:
            self._kept[wanted] = matcher, nbytes
            self._kept.move_to_end(wanted)
            while len(self._kept) > 1 and self._is_over():
                self._kept.popitem(last=False)

    def forget(self, wanted: tuple[str, str]) -> None:
        """Keep one no longer."""
        with self._lock:
            self._kept.pop(wanted, None)

    def _is_over(self) -> bool:
        return len(self._kept) > MOST_KEPT or sum(nbytes for _, nbytes in self._kept.values()) > KEPT_BYTES


class _Mallinfo2(ctypes.Structure):
    """The C library's struct of that name, in bytes: malloc.h."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


def allocated_bytes() -> int:
    """What this process has allocated, as glibc counts it; elsewhere the memory that it takes, which shrinks later."""
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo2 is None:
        import psutil  # compiles its patterns when it is imported

        return psutil.Process().memory_info().rss
    mallinfo2.restype = _Mallinfo2
    found = mallinfo2()
    return found.uordblks + found.hblkhd
