"""Text that arrives in pieces, broken at words instead of at the edge of the terminal."""

import re
from collections.abc import Callable

from rich.cells import cell_len

_PARTS = re.compile(r"\n|[^\S\n]+|\S+")


class WordWrap:
    """Passes text on to `write`, with line ends where a word would cross `width` columns.

    The last word is held back until its end is known, or until it is longer than a line. Lines that begin with spaces
    (code, lists) keep them.
    """

    def __init__(self, write: Callable[[str], None], width: int) -> None:
        self._write, self._width = write, width
        self._column = 0
        self._gap = ""
        self._word = ""

    def push(self, text: str) -> None:
        """Take the next piece."""
        for part in _PARTS.findall(text):
            if not part.isspace():
                self._word += part
                if cell_len(self._word) >= self._width:
                    self._end_word()
                continue
            self._end_word()
            if part == "\n":
                self._write("\n")
                self._column, self._gap = 0, ""
            else:
                self._gap += part

    def finish(self) -> None:
        """Write what is held back."""
        self._end_word()

    def _end_word(self) -> None:
        if not self._word:
            return
        length = cell_len(self._gap) + cell_len(self._word)
        if self._column and self._column + length > self._width:
            self._write("\n")
            self._column, self._gap, length = 0, "", cell_len(self._word)
        self._write(self._gap + self._word)
        self._column += length
        self._gap = self._word = ""
