"""Headers of GGUF files that were read last: a start opens one file up to five times, for its sizes, formats, text and
weights, and a vocabulary of a quarter of a million words takes half a second each time.

A header is known again by its bytes, so a file that was written anew is read anew.
"""

from collections import deque
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


_RECENT: deque[GgufHeader] = deque(maxlen=2)  # a model's and a drafter's


def known_header(file: RawFile) -> GgufHeader | None:
    """The header of a file, where it was read lately."""
    return next((header for header in tuple(_RECENT) if header.begins(file)), None)


def remember_header(header: GgufHeader) -> None:
    """Keep a header until two others were read."""
    _RECENT.append(header)


def forget_headers() -> None:
    """Give back the memory of what is remembered, once models are loaded."""
    _RECENT.clear()
