"""A server of the shipped model on a thread of this process, and steps that last as long as a test wants."""

import asyncio
import contextlib
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import httpx

from hetero_attn.llm import LLM
from hetero_attn.server.driver import warmed
from hetero_attn.server.run import HeteroServer, listen
from hetero_attn.server.settings import ServerSettings

TINY = str(Path(__file__).resolve().parents[3] / "examples" / "tiny")
READY_S = 120


def load_tiny(batch: int = 4, context: int = 512, model: str = TINY, **more: object) -> LLM:
    """The shipped model, or a copy of it, on one CPU thread."""
    return LLM(model, device="cpu", num_threads=1, max_context=context, max_batch=batch, progress=False, **more)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def await_health(process: subprocess.Popen, port: int, wanted: int = 200) -> None:
    """Wait until a server in a process of its own has loaded its model, or answers with another status."""
    end, status = time.monotonic() + READY_S, None
    while status != wanted and time.monotonic() < end and process.poll() is None:
        time.sleep(0.1)
        try:
            status = httpx.get(f"http://localhost:{port}/health", trust_env=False, timeout=10).status_code
        except httpx.TransportError:
            status = None
    assert status == wanted, process.poll()


class RunningServer:
    """A server on a free port; a context manager. said: what it printed. llm: its model."""

    def __init__(self, load: Callable[[], LLM] = load_tiny, step_s: float = 0.0, **settings: object) -> None:
        wishes = ServerSettings(**{"port": 0, "drain_s": 5.0, **settings})
        sock = listen(wishes)
        self.port = sock.getsockname()[1]
        self.url = f"http://localhost:{self.port}"
        self.said: list[str] = []
        self.step_s = step_s

        def load_slow() -> LLM:
            llm = warmed(load())
            step = llm.step

            def slow_step() -> object:
                time.sleep(self.step_s if llm._turns.waiting or llm._scheduler.has_work else 0)
                return step()

            llm.step = slow_step
            return llm

        self.server = HeteroServer(load_slow, replace(wishes, port=self.port), self.said.append)
        self._thread = threading.Thread(target=lambda: asyncio.run(self.server.serve([sock])), daemon=True)
        self._thread.start()

    @property
    def service(self):
        """What the server's handlers use."""
        return self.server.service

    @property
    def llm(self) -> LLM:
        """The model."""
        return self.service.driver.llm

    def wait_until(self, condition: Callable[[], bool], wait_s: float = READY_S) -> None:
        """Wait for something; raises AssertionError if it does not come."""
        end = time.monotonic() + wait_s
        while not condition():
            assert time.monotonic() < end, "it did not come"
            time.sleep(0.01)

    def __enter__(self) -> "RunningServer":
        self.wait_until(lambda: bool(self.said))
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(RuntimeError):  # it has ended by itself
            self.server._loop.call_soon_threadsafe(self.server.stop)
        self._thread.join(30)
        assert not self._thread.is_alive(), "the server did not end"
