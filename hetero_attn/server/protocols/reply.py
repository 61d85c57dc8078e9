"""From a generation to an answer over HTTP, the same way for every protocol: a stream or one JSON object."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing
from typing import Any, NamedTuple, Protocol

from starlette.requests import Request
from starlette.responses import Response

from hetero_attn.server.dialogue.answer import Answer, Parser, Piece, read
from hetero_attn.server.failures import ApiError, as_api_error
from hetero_attn.server.generation import Generation
from hetero_attn.server.service import Service
from hetero_attn.server.sse import EventStream, JsonAnswer, unless_gone
from hetero_attn.server.turn import Turn


class Usage(NamedTuple):
    """Tokens of a turn: of its prompts (each counted once), of those found in the cache, of its answers, and of those
    that are reasoning: 0 until the answers are whole."""

    prompt: int
    cached: int
    generated: int
    reasoning: int


def usage_of(generation: Generation, choices: int) -> Usage:
    """What a turn has cost so far."""
    requests = generation.requests
    return Usage(
        sum(len(request.prompt_token_ids) for request in requests[::choices]),
        sum(request.reused for request in requests[::choices]),
        sum(request.progress.tokens for request in requests),
        generation.thoughts or 0,
    )


class Writer(Protocol):
    """What a protocol makes of an answer. One is made for each answer, and may remember what it has written."""

    def opening(self) -> Iterable[bytes]:
        """What a stream begins with, before anything is computed."""

    def piece(self, piece: Piece) -> Iterable[bytes]:
        """What a stream gets for a piece of an answer; may be nothing."""

    def closing(self) -> Iterable[bytes]:
        """What a stream ends with when the answer is whole."""

    def ping(self) -> bytes:
        """What keeps a silent stream alive."""

    def failure(self, error: ApiError) -> Iterable[bytes]:
        """What a stream ends with when something went wrong after its headers."""

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The body of an answer that is no stream."""


async def reply(
    service: Service,
    request: Request,
    turn: Turn,
    make_writer: Callable[[Generation], Writer],
    is_stream: bool,
    content_type: bytes | None = None,
) -> Response | EventStream:
    """Have a turn computed and answer the request with it; it ends when the client is gone. Raises as `begin`."""
    generation = await service.begin(turn)
    writer, parsers = make_writer(generation), service.parsers(turn, generation)

    def count_thoughts() -> None:
        generation.thoughts = service.thoughts_of(turn, generation)

    if is_stream:
        frames = _frames(generation, writer, parsers, count_thoughts)
        settings = service.settings
        more = {} if content_type is None else {"content_type": content_type}
        return EventStream(frames, writer.ping, settings.ping_interval_s, settings.blocked_s, **more)
    try:
        answers = await unless_gone(request.receive, _collect(generation, parsers))
    finally:
        generation.close()
    count_thoughts()
    return JsonAnswer(writer.whole(answers))


async def _collect(generation: Generation, parsers: Sequence[Parser]) -> list[Answer]:
    answers = [Answer() for _ in generation.requests]
    async for piece in read(generation, parsers):
        answers[piece.choice].take(piece)
    return answers


async def _frames(
    generation: Generation, writer: Writer, parsers: Sequence[Parser], at_end: Callable[[], None]
) -> AsyncGenerator[bytes]:
    try:
        for frame in writer.opening():
            yield frame
        async with aclosing(read(generation, parsers)) as pieces:
            async for piece in pieces:
                if data := b"".join(writer.piece(piece)):
                    yield data
        at_end()
        yield b"".join(writer.closing())
    except Exception as error:
        yield b"".join(writer.failure(as_api_error(error)))
    finally:
        generation.close()
