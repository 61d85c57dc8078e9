"""Headers of GGUF files that a start has read: it opens one file up to five times, for its sizes, formats, text and
weights, and a vocabulary of a quarter of a million words takes half a second each time.

What was read is handed on from planning to loading. A header is known again by its bytes, so a file that was written
anew is read anew.
"""

from dataclasses import dataclass
from typing import Any

from cpu_kernels.formats import GgufType
from hetero_attn.checkpoints.raw_file import RawFile

Entries = dict[str, tuple[GgufType, tuple[int, ...], int]]


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """A header that was checked: its bytes, and what they say."""

    text: bytes
    metadata: dict[str, Any]
    entries: Entries
    alignment: int

    def begins(self, file: RawFile) -> bool:
        """Whether the file begins with these bytes."""
        if file.size < len(self.text):
            return False
        start = bytearray(len(self.text))
        file.read_into(memoryview(start), 0)
        return start == self.text


class KnownHeaders:
    """The headers that one start has read; threads may share it. `forget` gives their memory back for good."""

    def __init__(self) -> None:
        self._headers: list[GgufHeader] = []
        self._keeps = True

    def of(self, file: RawFile) -> GgufHeader | None:
        """The header of a file, where it was read before."""
        return next((header for header in tuple(self._headers) if header.begins(file)), None)

    def remember(self, header: GgufHeader) -> None:
        """Keep a header, unless the start is over."""
        if self._keeps:
            self._headers.append(header)

    def forget(self) -> None:
        """End the start: let go of every header, and keep none that comes."""
        self._keeps = False
        self._headers.clear()
