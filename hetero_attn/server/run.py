"""A server from start to end: it answers at once, loads beside that, and finishes what runs when told to stop."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from hetero_attn.errors import EngineDeadError
from hetero_attn.server.app import make_app
from hetero_attn.server.banner import banner
from hetero_attn.server.connection import PatientConnection
from hetero_attn.server.driver import State
from hetero_attn.server.service import Service
from hetero_attn.server.settings import ServerSettings

if TYPE_CHECKING:  # it needs torch, whose import would keep a server from answering while it loads
    from hetero_attn.llm import LLM

AT_RUN_TIME = 5
KEEP_ALIVE_S = 75  # pooled clients meet closed sockets where it is short
LAST_WORDS_S = 2.0  # for error frames to leave
STEP_WAIT_S = 5.0


class HeteroServer(uvicorn.Server):
    """uvicorn around one model.

    load: makes the model, on a thread of its own. say: called with the lines for the operator. The first signal takes
    nothing new, finishes what runs within `settings.drain_s` and ends; the second ends at once.
    """

    def __init__(self, load: Callable[[], LLM], settings: ServerSettings, say: Callable[[str], None]) -> None:
        self.service = Service(load, settings, self._changed)
        self.settings, self._say = settings, say
        self.failure: BaseException | None = None
        self._draining: asyncio.Task | None = None
        config = uvicorn.Config(
            make_app(self.service),
            http=PatientConnection,
            ws="none",
            lifespan="off",
            log_level="warning",
            access_log=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=3,
            server_header=False,
        )
        super().__init__(config)

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until told to stop. Raises what the model was lost to."""
        self._loop = asyncio.get_running_loop()
        self.service.driver.start(self._loop)
        await super().serve(sockets)
        self.service.driver.finish(0.0 if self.force_exit else STEP_WAIT_S)
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
            self.force_exit = self.should_exit = True

    async def _drain(self) -> None:
        driver, end = self.service.driver, self._loop.time() + self.settings.drain_s
        while driver.live and self._loop.time() < end:
            await asyncio.sleep(0.05)
        if driver.live:
            driver.give_up(list(driver.live), EngineDeadError("the server is stopping; ask again later"))
        end = self._loop.time() + LAST_WORDS_S
        while driver.live and self._loop.time() < end:
            await asyncio.sleep(0.05)
        self.should_exit = True

    def _changed(self, state: State) -> None:
        if state is State.READY:
            self._say(banner(self.service.llm, self.settings))
        elif state is State.FAILED:
            self.failure = self.service.driver.failure
            self._loop.call_later(LAST_WORDS_S / 2, self.stop)


def listen(settings: ServerSettings) -> socket.socket:
    """A socket that listens where the settings say. Raises OSError."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # With the protocol named asyncio sends small pieces at once; else each waits 40 ms for the one before to be read.
    found = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    found.bind((settings.host, settings.port))
    return found


def serve(load: Callable[[], LLM], settings: ServerSettings, say: Callable[[str], None], sock: socket.socket) -> None:
    """Serve a model on a socket until a signal comes. Raises what the model was lost to."""
    server = HeteroServer(load, settings, say)
    asyncio.run(server.serve([sock]))
    if server.failure is not None:
        raise server.failure
