"""Answers over HTTP that end when the client does: streams of server-sent events with pings, and plain JSON. They may
repeat what a body holds, so no text of a client's can fail them.

Whether the client is gone is watched by a task of ours: nobody else tells an answer that waits for a step.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

HEADERS = {
    b"content-type": b"text/event-stream; charset=utf-8",
    b"cache-control": b"no-store",
    b"x-accel-buffering": b"no",
}
_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
Result = TypeVar("Result")


class JsonAnswer(JSONResponse):
    """A JSON answer. As in streams, what is no Unicode in the text that it repeats is replaced."""

    def render(self, content: Any) -> bytes:
        """The answer's body as UTF-8."""
        return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


class ClientGone(Exception):
    """The client closed its connection; nobody waits for an answer."""


def frame(value: Any, event: str | None = None) -> bytes:
    """One server-sent event: a line of JSON, named where a protocol wants names."""
    data = _JSON.encode(value)
    return (f"event: {event}\n" if event else "").encode() + f"data: {data}\n\n".encode("utf-8", "replace")


class EventStream:
    """An answer that is a stream; an ASGI application, as Starlette's responses are.

    frames: what is sent, piece by piece; closed when the client is gone. ping: what is sent after `interval_s` of
    silence; 0 for never. blocked_s: how long a client may read nothing before it is taken for gone.
    """

    def __init__(
        self,
        frames: AsyncGenerator[bytes],
        ping: Callable[[], bytes],
        interval_s: float,
        blocked_s: float,
        content_type: bytes = HEADERS[b"content-type"],
    ) -> None:
        self._frames, self._ping, self._interval_s, self._blocked_s = frames, ping, interval_s, blocked_s
        self._headers = [*(HEADERS | {b"content-type": content_type}).items()]
        self._sending_since: float | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send headers at once, then frames as they come. Raises ClientGone when nothing is read for too long."""
        await send({"type": "http.response.start", "status": 200, "headers": self._headers})
        self._loop, self._turn = asyncio.get_running_loop(), asyncio.Lock()
        self._sent_at, self._sending_since = self._loop.time(), None
        gone, pumping = asyncio.ensure_future(disconnected(receive)), asyncio.ensure_future(self._pump(send))
        watching = asyncio.ensure_future(self._watch(send))
        tasks = (gone, pumping, watching)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in (pumping, watching):
                if task.done():
                    task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._frames.aclose()

    async def _pump(self, send: Send) -> None:
        async for data in self._frames:
            await self._deliver(send, data)
        await self._deliver(send, b"", more=False)

    async def _watch(self, send: Send) -> None:
        """End a silence, and a client that reads nothing; a timer of its own, so that frames need none each."""
        while True:
            now, look_s = self._loop.time(), self._blocked_s / 4
            if self._sending_since is not None:
                look_s = min(look_s, self._sending_since + self._blocked_s - now)
                if look_s <= 0:
                    raise ClientGone("the client reads nothing")
            elif self._interval_s:
                look_s = min(look_s, self._sent_at + self._interval_s - now)
            if look_s > 0:
                await asyncio.sleep(look_s)
                continue
            try:
                async with asyncio.timeout(self._blocked_s):
                    await self._deliver(send, self._ping())
            except TimeoutError as blocked:
                raise ClientGone("the client reads nothing") from blocked

    async def _deliver(self, send: Send, data: bytes, more: bool = True) -> None:
        async with self._turn:
            self._sending_since = self._loop.time()
            await send({"type": "http.response.body", "body": data, "more_body": more})
            self._sent_at, self._sending_since = self._loop.time(), None


async def disconnected(receive: Receive) -> None:
    """Return when the client is gone; the body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """What `work` returns; cancels it, and raises ClientGone, when the client goes first."""
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(disconnected(receive))
    try:
        await asyncio.wait({gone, working}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone("the client is gone")
        return working.result()
    finally:
        for task in (gone, working):
            task.cancel()
        await asyncio.gather(gone, working, return_exceptions=True)
