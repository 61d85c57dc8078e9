"""Answers in gpt-oss's form, Harmony: messages with a header that names a channel, and the tool that is called.

<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>Hello<|return|>
<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"x": 1}<|call|>
"""

import re
from collections.abc import Iterable

from hetero_attn.server.dialogue.answer import CallPiece, Part, joined
from hetero_attn.server.dialogue.calls import read_calls
from hetero_attn.server.dialogue.scanner import Scanner
from hetero_attn.server.dialogue.tools import Tools, call_id

START, CHANNEL, MESSAGE, CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
ENDS = ("<|end|>", "<|call|>", "<|return|>")
MARKS = {START, CHANNEL, MESSAGE, CONSTRAIN, *ENDS}


class HarmonyParser:
    """Tells text, reasoning and calls apart; the prompt ends where a header begins."""

    def __init__(self, tools: Tools, unseen: Iterable[str] = ()) -> None:
        self._schemas, self._parallel, self._unseen = tools.schemas, tools.parallel, {*unseen} - MARKS
        self._scanner = Scanner(MARKS | self._unseen)
        self._header: str | None = ""  # None inside of a message
        self._channel, self._function = "", ""
        self._call = ""
        self._begun: set[str] = set()  # channels with words, and those of the message that is open
        self._is_new = True
        self._count = 0

    def feed(self, text: str) -> Part:
        """Take generated text; returns what has become certain."""
        return joined([self._take(piece) for piece in self._scanner.feed(text)])

    def finish(self, finish_reason: str) -> Part:
        """What is left when no more text comes."""
        parts = [self._take(rest)] if (rest := self._scanner.finish()) else []
        if self._header is None:
            parts.append(self._end(is_whole=finish_reason == "stop"))
        elif CHANNEL not in self._header and not self._begun and not self._count:
            parts.append(Part(self._header.removeprefix(START + "assistant")))  # no header, but words
        return joined(parts)

    def _take(self, piece: str) -> Part:
        if piece in ENDS or (piece == START and self._header is None):
            part = self._end(is_whole=True) if self._header is None else Part()
            self._header = piece if piece == START else ""
            return part
        if self._header is None:
            return self._inside(piece)
        if piece == MESSAGE:
            self._open(self._header)
        else:
            self._header += piece
        return Part()

    def _open(self, header: str) -> None:
        channel, called = re.search(r"<\|channel\|>\s*(\w+)", header), re.search(r"to=([^\s<]+)", header)
        self._function = called[1].removeprefix("functions.") if called and self._schemas else ""
        self._channel = "reasoning" if channel and channel[1] == "analysis" and not self._function else "text"
        self._header, self._call, self._is_new = None, "", True

    def _inside(self, piece: str) -> Part:
        if piece in self._unseen:
            return Part()
        if self._function:
            self._call += piece
            return Part()
        return self._words(piece)

    def _words(self, words: str) -> Part:
        if self._is_new and self._channel in self._begun:
            words = "\n\n" + words
        self._is_new = False
        self._begun.add(self._channel)
        return Part(reasoning=words) if self._channel == "reasoning" else Part(words)

    def _end(self, is_whole: bool) -> Part:
        """A message has ended; one that is a call is told now."""
        if not self._function:
            return Part()
        name, self._function = self._function, ""
        found = read_calls(f"{name}[ARGS]{self._call}", self._schemas) if is_whole else None
        if found is None:
            return self._words(self._call)
        if self._count and not self._parallel:
            return Part()
        self._count += 1
        return Part(calls=(CallPiece(self._count - 1, found[0].arguments, name, call_id(0)),))
