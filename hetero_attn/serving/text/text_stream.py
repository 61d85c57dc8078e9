"""Text as it streams: token ids in, text out as soon as it is certain, up to a stop string."""

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"
# A character has at most 4 bytes, so 3 may be waiting for the rest; a decoder shows up to one replacement for each.
_MAX_UNFINISHED = 3
# With more replacement characters than this at the end, the bytes are garbage rather than the start of a character
# (a byte-fallback vocabulary shows the whole run of bytes, so the character before counts too).
_GARBAGE_RUN = 8


class TextStream:
    """Token ids in, text out as soon as it is certain: never half a character, never part of a stop string.

    Tokens are decoded in a window that starts one piece before what is not yet shown, because a decoder may treat the
    first token of a text specially (sentencepiece drops its leading space). The joined pieces equal the text of all
    tokens, up to the stop string.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str] = ()):
        """`decode` turns token ids into text; `stop` are the strings that end it."""
        self._decode = decode
        self._matcher = StopMatcher(stop)
        self._window: list[int] = []
        self._shown_tokens = 0  # tokens at the front of the window whose text is shown in full
        self._shown_chars = 0  # characters of the window's text that are shown

    @property
    def matched(self) -> str | None:
        """The stop string that ended the text, if one did."""
        return self._matcher.matched

    def copy(self) -> "TextStream":
        """One that goes on from here by itself."""
        twin = object.__new__(TextStream)
        twin.__dict__.update(self.__dict__)
        twin._matcher = self._matcher.copy()
        return twin

    def push(self, token_id: int) -> tuple[str, bool]:
        """Take one token; returns (text that became certain, whether a stop string ended it)."""
        self._window = [*self._window, token_id]
        text = self._decode(self._window)
        unfinished = len(text) - len(text.rstrip(REPLACEMENT))
        if unfinished > _GARBAGE_RUN:
            unfinished = _MAX_UNFINISHED
        piece = self._show(text, len(text) - unfinished)
        if not unfinished:
            self._slide()
        return self._matcher.push(piece), self._matcher.matched is not None

    def finish(self) -> str:
        """The text still held back, when no more tokens come; half a character comes out as U+FFFD."""
        text = self._decode(self._window)
        return self._matcher.push(self._show(text, len(text))) + self._matcher.finish()

    def _show(self, text: str, end: int) -> str:
        piece = text[self._shown_chars : end]
        self._shown_chars = max(self._shown_chars, end)
        return piece

    def _slide(self) -> None:
        """Let the window begin at the newest piece, unless that is empty and would not show how a text begins."""
        newest = self._window[self._shown_tokens :]
        if newest_text := self._decode(newest):
            self._window, self._shown_chars = newest, len(newest_text)
        self._shown_tokens = len(self._window)


class StopMatcher:
    """Finds stop strings in text that arrives in pieces, and holds back what may be the beginning of one.

    Attributes:
        matched: the stop string that ended the text, or None.
    """

    def __init__(self, stop: Sequence[str]):
        self.matched: str | None = None
        self._stop = tuple(text for text in stop if text)
        self._held = ""

    def copy(self) -> "StopMatcher":
        """One that goes on from here by itself."""
        if not self._stop:
            return self  # which nothing changes
        twin = StopMatcher(self._stop)
        twin.matched, twin._held = self.matched, self._held
        return twin

    def push(self, text: str) -> str:
        """Take a piece; returns what is certain not to belong to a stop string. Nothing after a match."""
        if not self._stop:
            return text
        if self.matched is not None:
            return ""
        text = self._held + text
        found = [(position, stop) for stop in self._stop if (position := text.find(stop)) >= 0]
        if found:
            position, self.matched = min(found)
            self._held = ""
            return text[:position]
        certain = len(text) - self._overlap(text)
        self._held = text[certain:]
        return text[:certain]

    def finish(self) -> str:
        """What is held back, when no more text comes."""
        held, self._held = self._held, ""
        return held

    def _overlap(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = max((len(stop) for stop in self._stop), default=0)
        for length in range(min(longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0
