"""An answer as it arrives: pieces of text, of reasoning and of tool calls, and all of them together."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from hetero_attn.server.generation import Generation


class CallPiece(NamedTuple):
    """Part of a tool call: its place in the answer, its name and id in the first part only, text of its arguments."""

    place: int
    arguments: str = ""
    name: str | None = None
    id: str | None = None


class Part(NamedTuple):
    """What a stretch of generated text means."""

    text: str = ""
    reasoning: str = ""
    calls: tuple[CallPiece, ...] = ()


def joined(parts: Sequence[Part]) -> Part:
    """Parts one after another as one."""
    return Part(
        "".join(part.text for part in parts),
        "".join(part.reasoning for part in parts),
        tuple(call for part in parts for call in part.calls),
    )


class Piece(NamedTuple):
    """A part of the answer of one choice; its tokens are [first, last) of the request's."""

    choice: int
    part: Part
    first: int
    last: int
    finish_reason: str | None


class Parser(Protocol):
    """Tells text, reasoning and calls apart; one for each choice."""

    def feed(self, text: str) -> Part:
        """Take generated text; returns what has become certain."""

    def finish(self, finish_reason: str) -> Part:
        """What is left when no more text comes."""


class PlainText:
    """A parser for answers that are text and nothing else."""

    def feed(self, text: str) -> Part:
        """The text as a part: there is nothing to tell apart."""
        return Part(text)

    def finish(self, finish_reason: str) -> Part:
        """An empty part, because nothing was held back."""
        return Part()


@dataclass(slots=True)
class Call:
    """A whole tool call. arguments: text of a JSON object."""

    id: str
    name: str
    arguments: str = ""


@dataclass(slots=True)
class Answer:
    """All pieces of one choice together."""

    text: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)
    tokens: int = 0
    finish_reason: str | None = None

    def take(self, piece: Piece) -> None:
        """Append what a piece brings; arguments go to the call that they belong to."""
        self.text += piece.part.text
        self.reasoning += piece.part.reasoning
        for call in piece.part.calls:
            if call.name is not None:
                self.calls.append(Call(call.id or "", call.name))
            self.calls[call.place].arguments += call.arguments
        self.tokens, self.finish_reason = piece.last, piece.finish_reason


async def read(generation: Generation, parsers: Sequence[Parser]) -> AsyncGenerator[Piece, None]:
    """The pieces of a generation. An answer that calls tools finishes with "tool_calls"."""
    called = [False] * len(parsers)
    async for move in generation.moves():
        parser, finish_reason = parsers[move.choice], move.finish_reason
        parts = [parser.feed(move.text)]
        if finish_reason is not None:
            parts.append(parser.finish(finish_reason))
        part = joined(parts)
        called[move.choice] |= bool(part.calls)
        if finish_reason == "stop" and called[move.choice]:
            finish_reason = "tool_calls"
        yield Piece(move.choice, part, move.first, move.last, finish_reason)
