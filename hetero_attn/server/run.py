"""A server from start to end: it answers at once, loads beside that, and finishes what runs when told to stop."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

import uvicorn

from hetero_attn.errors import EngineDeadError
from hetero_attn.server.app import make_app
from hetero_attn.server.banner import banner
from hetero_attn.server.connection import HEAD_BYTES, PatientConnection
from hetero_attn.server.driver import State
from hetero_attn.server.service import Service
from hetero_attn.server.settings import ServerSettings

if TYPE_CHECKING:  # it needs torch, whose import would keep a server from answering while it loads
    from hetero_attn.llm import LLM

AT_RUN_TIME = 5
KEEP_ALIVE_S = 75  # pooled clients meet closed sockets where it is short
LAST_WORDS_S = 1.0  # for what was written to leave
LAST_STEP_S = 0.5


class HeteroServer(uvicorn.Server):
    """uvicorn around one model.

    load: makes the model, on a thread of its own. say: called with the lines for the operator. The first signal takes
    nothing new, finishes what runs within `settings.drain_s` and ends the rest with an error; the second ends all with
    an error at once.

    Attributes:
        failure: what the model was lost to.
        is_held: whether a step, or the loading of the model, was still under way at the end.
    """

    def __init__(self, load: Callable[[], LLM], settings: ServerSettings, say: Callable[[str], None]) -> None:
        self.service = Service(load, settings, self._changed)
        self.settings, self._say = settings, say
        self.failure: BaseException | None = None
        self.is_held = False
        self._draining: asyncio.Task | None = None
        config = uvicorn.Config(
            make_app(self.service),
            http=PatientConnection,
            ws="none",
            lifespan="off",
            log_level="warning",
            proxy_headers=False,  # nothing here asks who the client is
            access_log=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=LAST_WORDS_S,
            server_header=False,
            h11_max_incomplete_event_size=HEAD_BYTES,
        )
        super().__init__(config)

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until told to stop."""
        self._loop = asyncio.get_running_loop()
        self.service.driver.start(self._loop)
        await super().serve(sockets)
        self.is_held = not self.service.driver.finish(LAST_STEP_S)
        self.service.close()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal came; called between any two bytecodes of the main thread."""
        self._loop.call_soon_threadsafe(self.stop)

    def stop(self) -> None:
        """Stop: gently the first time, at once the second."""
        if self._draining is None:
            self.service.driver.stop()
            self._draining = asyncio.ensure_future(self._drain())
        else:
            self._end()

    async def _drain(self) -> None:
        driver, end = self.service.driver, self._loop.time() + self.settings.drain_s
        while driver.live and self._loop.time() < end:
            await asyncio.sleep(0.05)
        self._end()

    def _end(self) -> None:
        self.service.driver.lose(EngineDeadError("the server is stopping; ask again later"))
        self.should_exit = True

    def _changed(self, state: State) -> None:
        if state is State.READY:
            self._say(banner(self.service.llm, self.settings))
        elif state is State.FAILED:
            self.failure = self.service.driver.failure
            self._loop.call_later(LAST_WORDS_S, self.stop)


def listen(settings: ServerSettings) -> socket.socket:
    """A socket that listens where the settings say. Raises OSError."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # With the protocol named asyncio sends small pieces at once; else each waits 40 ms for the one before to be read.
    found = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    found.bind((settings.host, settings.port))
    return found


def serve(load: Callable[[], LLM], settings: ServerSettings, say: Callable[[str], None], sock: socket.socket) -> None:
    """Serve a model on a socket until a signal comes. Raises what the model was lost to.

    Does not return where a step, or the loading of the model, is under way and lasts: then the process ends here.
    """
    server = HeteroServer(load, settings, say)
    asyncio.run(_serve(server, sock))
    if server.failure is not None:
        raise server.failure


async def _serve(server: HeteroServer, sock: socket.socket) -> None:
    await server.serve([sock])
    if server.is_held and server.failure is None:
        _end_process()


def _end_process() -> NoReturn:
    """End with code 0 and without the interpreter's own end, which waits for the step, or aborts where a thread is in
    torch's code. What is written to disk is written beside its name first, so nothing is left in halves."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, ValueError):  # there is none, or nobody reads it
            stream.flush()
    os._exit(0)
