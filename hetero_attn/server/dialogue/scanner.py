"""Markers in text that arrives in pieces."""

import re
from collections.abc import Iterable, Iterator
from functools import lru_cache


@lru_cache(maxsize=64)
def _compiled(markers: frozenset[str]) -> tuple[re.Pattern[str], frozenset[str], int]:
    pattern = re.compile("|".join(map(re.escape, sorted(markers, key=len, reverse=True))))
    beginnings = frozenset(marker[:length] for marker in markers for length in range(1, len(marker)))
    return pattern, beginnings, max(map(len, markers))


class Scanner:
    """Cuts text at markers. What may be the beginning of one is held back until that is certain.

    markers: texts, none of which begins another.
    """

    def __init__(self, markers: Iterable[str]) -> None:
        self._pattern, self._beginnings, self._longest = _compiled(frozenset(markers))
        self._held = ""

    def feed(self, text: str) -> Iterator[str]:
        """Markers, each by itself, and the text between them, as far as it is certain."""
        text, position = self._held + text, 0
        for found in self._pattern.finditer(text):
            if found.start() > position:
                yield text[position : found.start()]
            yield found.group()
            position = found.end()
        certain = len(text) - self._overlap(text[position:])
        self._held = text[certain:]
        if certain > position:
            yield text[position:certain]

    def finish(self) -> str:
        """Text that could have begun a marker and was held back; the scanner is empty after."""
        held, self._held = self._held, ""
        return held

    def _overlap(self, text: str) -> int:
        """Length of the longest end of a text that begins a marker."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            if text[-length:] in self._beginnings:
                return length
        return 0
