"""Answers whose reasoning and calls stand between markers, as most families write them."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from hetero_attn.server.dialogue.answer import CallPiece, Part, joined
from hetero_attn.server.dialogue.blanks import Blanks
from hetero_attn.server.dialogue.calls import read_calls
from hetero_attn.server.dialogue.scanner import Scanner
from hetero_attn.server.dialogue.tools import Tools, call_id

CALL_KEYS = ("name", "type", "function", "id", "parameters", "arguments")
LONGEST_HEAD = 200  # characters, within which a bare call shows that it is one
NO_MARKS = ("", "")  # no text that comes is empty


@dataclass(frozen=True, slots=True)
class Marks:
    """Markers of one family. thought: around reasoning. call: around calls; without an end, one lasts until the next
    begins or the answer ends. bare: an answer that begins with "{" may be a call. unseen: left out of texts.
    id_letters: length of a call's id, 0 for any."""

    thought: tuple[str, str] | None = None
    call: tuple[str, str | None] | None = None
    bare: bool = False
    unseen: tuple[str, ...] = ()
    id_letters: int = 0

    @property
    def all(self) -> set[str]:
        """Every marker that the text is searched for, those left out of it included."""
        return {mark for mark in (*(self.thought or ()), *(self.call or ()), *self.unseen) if mark}


class MarkedParser:
    """Tells text, reasoning and calls apart. A call is told once it is whole; one that is cut off or malformed is text.

    is_thinking: whether the prompt has opened the reasoning. unseen: further markers to leave out.
    """

    def __init__(self, marks: Marks, tools: Tools, is_thinking: bool, unseen: Iterable[str] = ()) -> None:
        self._marks, self._schemas, self._parallel = marks, tools.schemas, tools.parallel
        self._unseen = {*marks.unseen, *unseen}
        self._scanner = Scanner(marks.all | self._unseen)
        self._is_thinking, self._has_thought = is_thinking, False
        self._call: str | None = None  # what is written of a call, without its first marker
        self._opening = ""  # of that call
        self._blanks = Blanks()  # at the end of what was said: between calls they are nothing
        self._has_text = False
        self._count = 0
        self._parts: list[Part] = []

    def feed(self, text: str) -> Part:
        """Take generated text; returns what has become certain."""
        for piece in self._scanner.feed(text):
            self._take(piece)
        return self._certain()

    def finish(self, finish_reason: str) -> Part:
        """What is left when no more text comes."""
        if rest := self._scanner.finish():
            self._take(rest)
        if self._call is not None:
            self._end_call("", is_whole=finish_reason == "stop")
        if self._blanks.left and not self._count and not self._is_thinking:
            self._parts.append(Part(self._blanks.left))
        return self._certain()

    def _certain(self) -> Part:
        parts, self._parts = self._parts, []
        return joined(parts)

    def _take(self, piece: str) -> None:
        if self._call is not None:
            self._go_on_calling(piece)
        elif self._is_thinking:
            self._think(piece)
        elif piece == (self._marks.thought or NO_MARKS)[0] and not self._has_text:
            self._is_thinking, self._blanks.left = True, ""
        elif piece == (self._marks.call or NO_MARKS)[0] and self._schemas:
            self._call, self._opening = "", piece
        elif piece not in self._unseen:
            self._say(piece)

    def _go_on_calling(self, piece: str) -> None:
        opening, end = self._marks.call or NO_MARKS
        if piece == end:
            self._end_call(piece, is_whole=True)
        elif piece == opening and end is None:
            self._end_call("", is_whole=True)
            self._call, self._opening = "", piece
        else:
            self._call += piece
            if not self._opening and not _may_be_call(self._call):
                self._give_back("")

    def _think(self, piece: str) -> None:
        if piece == (self._marks.thought or NO_MARKS)[1]:
            self._is_thinking, self._has_thought, self._blanks.left = False, True, ""
        elif piece not in self._unseen:
            if thought := self._blanks.without(piece, is_first=not self._has_thought):
                self._has_thought = True
                self._parts.append(Part(reasoning=thought))

    def _say(self, text: str) -> None:
        said = self._blanks.without(text, is_first=self._has_thought and not self._has_text)
        if not said:
            return
        if self._marks.bare and self._schemas and not self._has_text and not self._count and said.lstrip()[0] == "{":
            self._call, self._opening, self._blanks.left = said + self._blanks.left, "", ""
            if not _may_be_call(self._call):
                self._give_back("")
            return
        self._has_text = True
        self._parts.append(Part(said))

    def _end_call(self, end: str, is_whole: bool) -> None:
        found = read_calls(self._call, self._schemas) if is_whole else None
        if found and not self._opening and any(call.name not in self._schemas for call in found):
            found = None  # an ordinary answer in JSON
        if found is None:
            self._give_back(end)
            return
        self._call, self._blanks.left = None, ""
        for call in found if self._parallel else found[: 1 - self._count]:
            name = call_id(self._marks.id_letters) if call.id is None else call.id
            self._parts.append(Part(calls=(CallPiece(self._count, call.arguments, call.name, name),)))
            self._count += 1

    def _give_back(self, end: str) -> None:
        """What looked like a call is text."""
        text, self._call = f"{self._opening}{self._call}{end}", None
        said = self._blanks.without(text, is_first=False)
        self._has_text = True
        self._parts.append(Part(said))


def _may_be_call(text: str) -> bool:
    """Whether a begun JSON object may be a call: its first key tells, and comes soon."""
    key = re.match(r'\s*\{\s*"([^"]*)("?)', text[:LONGEST_HEAD])
    if key is None:
        return len(text) < LONGEST_HEAD and re.fullmatch(r"\s*\{\s*", text) is not None
    return key[1] in CALL_KEYS if key[2] else any(each.startswith(key[1]) for each in CALL_KEYS)
