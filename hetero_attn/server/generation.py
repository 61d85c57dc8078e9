"""The requests of one turn as its handler sees them: what is new, whenever something is, until all have ended.

Text, tokens and log-probabilities of a request only grow, so nothing is queued: a handler remembers how far it has
shown and takes the difference. A slow reader gets longer pieces, and memory is bounded by the answer. Lives on the
event loop; only `progress` and `computed` of a request are written elsewhere, each as one value.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from hetero_attn.errors import EngineDeadError

if TYPE_CHECKING:  # it needs torch, whose import would keep a server from answering while it loads
    from hetero_attn.serving.request import Request


class Move(NamedTuple):
    """What one request made since the last look: its number, its new text, its tokens [first, last), how it ended."""

    choice: int
    text: str
    first: int
    last: int
    finish_reason: str | None


class Generation:
    """Requests that one client waits for. leave: called once when nobody waits any more."""

    def __init__(self, requests: Sequence[Request], leave: Callable[[Generation], None]) -> None:
        self.requests = tuple(requests)
        self.error: Exception | None = None
        self.thoughts: int | None = None  # tokens of reasoning, once somebody has counted them
        self._leave = leave
        self._has_moved = asyncio.Event()

    def wake(self) -> None:
        """Let `moves` look at the requests again; called on the loop."""
        self._has_moved.set()

    def fail(self, error: Exception) -> None:
        """End the turn with an error."""
        self.error = error
        self.wake()

    def close(self) -> None:
        """Give up what has not ended; idempotent."""
        self._leave(self)

    async def moves(self) -> AsyncIterator[Move]:
        """What is new, request by request, until all have ended. Raises what ended one early."""
        shown = [(0, 0)] * len(self.requests)
        unfinished = set(range(len(self.requests)))
        while unfinished:
            self._has_moved.clear()
            for choice in sorted(unfinished):
                (chars, tokens), now = shown[choice], self.requests[choice].progress
                if now.finish_reason is None and now.tokens == tokens:
                    continue
                shown[choice] = now.chars, now.tokens
                if now.finish_reason is not None:
                    self._check(self.requests[choice])
                    unfinished.discard(choice)
                yield Move(choice, now.text[chars:], tokens, now.tokens, now.finish_reason)
            if not unfinished:
                return
            if self.error is not None:
                raise self.error
            await self._has_moved.wait()

    async def ended(self) -> None:
        """Wait until all have ended. Raises what ended one early."""
        async for _ in self.moves():
            pass

    def _check(self, request: Request) -> None:
        error = self.error or request.error
        if request.finish_reason == "abort":
            raise error or EngineDeadError("the request was ended by the server, which is stopping; ask again later")

    @property
    def prompt_progress(self) -> tuple[int, int]:
        """How many tokens of the prompts are computed, and of how many."""
        done = sum(min(request.computed, len(request.prompt_token_ids)) for request in self.requests)
        return done, sum(len(request.prompt_token_ids) for request in self.requests)
