"""Silence and slow readers by a clock that jumps: a minute passes at once, and nothing depends on the machine."""

import asyncio
from collections.abc import AsyncGenerator

import pytest

from hetero_attn.server.sse import ClientGone, EventStream


class JumpingLoop(asyncio.SelectorEventLoop):
    """A loop whose time passes only where it would wait."""

    def __init__(self) -> None:
        super().__init__()
        self._now, select = 0.0, self._selector.select

        def jump(timeout: float | None = None) -> list:
            self._now += timeout or 0.0
            return select(0)

        self._selector.select = jump

    def time(self) -> float:
        """Seconds since the start."""
        return self._now


def run(scenario):
    """What a coroutine function returns, in jumping time."""
    loop = JumpingLoop()
    try:
        return loop.run_until_complete(scenario())
    finally:
        loop.close()


async def never() -> dict:
    await asyncio.Event().wait()
    return {}


@pytest.mark.parametrize(("interval_s", "pings"), [(15.0, [15, 30, 45]), (0.0, []), (25.0, [25, 50])])
def test_a_minute_of_silence_is_broken_by_the_clock(interval_s, pings):
    async def scenario() -> list[tuple[float, dict]]:
        sent = []

        async def frames() -> AsyncGenerator[bytes]:
            await asyncio.sleep(59)
            yield b"data: 1\n\n"

        async def send(message: dict) -> None:
            sent.append((asyncio.get_running_loop().time(), message))

        await EventStream(frames(), lambda: b": ping\n\n", interval_s, 60)({}, never, send)
        return sent

    sent = run(scenario)
    assert (sent[0][0], sent[0][1]["type"], sent[0][1]["status"]) == (0, "http.response.start", 200)
    assert [round(at) for at, message in sent if message.get("body") == b": ping\n\n"] == pings
    assert [round(at) for at, message in sent if message.get("body") == b"data: 1\n\n"] == [59]


def test_pings_count_from_the_last_word():
    async def scenario() -> list[float]:
        pinged = []

        async def frames() -> AsyncGenerator[bytes]:
            for _ in range(3):
                await asyncio.sleep(10)
                yield b"data: 1\n\n"
            await asyncio.sleep(20)
            yield b"data: 2\n\n"

        async def send(message: dict) -> None:
            if message.get("body") == b"ping":
                pinged.append(asyncio.get_running_loop().time())

        await EventStream(frames(), lambda: b"ping", 15, 60)({}, never, send)
        return pinged

    assert [round(at) for at in run(scenario)] == [45]


def test_a_reader_that_takes_nothing_for_a_minute_is_taken_for_gone():
    async def scenario() -> tuple[float, bool]:
        closed = []

        async def frames() -> AsyncGenerator[bytes]:
            try:
                while True:
                    yield b"data: 1\n\n"
            finally:
                closed.append(True)

        async def send(message: dict) -> None:
            if message["type"] == "http.response.body":
                await asyncio.Event().wait()

        with pytest.raises(ClientGone):
            await EventStream(frames(), lambda: b"", 15, 60)({}, never, send)
        return asyncio.get_running_loop().time(), bool(closed)

    at, is_closed = run(scenario)
    assert round(at) == 60 and is_closed


def test_every_protocol_breaks_the_silence_in_its_own_form(server, http):
    import json

    from hetero_attn.server.generation import Generation
    from hetero_attn.server.protocols.chat import Body, ChatWriter
    from hetero_attn.server.protocols.messages_events import MessageWriter
    from hetero_attn.server.protocols.ollama_lines import OllamaWriter
    from hetero_attn.server.protocols.responses_events import ResponseWriter

    async def make() -> dict[str, bytes]:
        request = server.llm.add("A list", None)
        server.llm.abort(request)
        generation = Generation((request,), lambda generation: None)
        body = Body(messages=[{"role": "user", "content": "a"}])
        return {
            "chat": ChatWriter(server.service, body, generation, 1).ping(),
            "messages": MessageWriter(generation, "m").ping(),
            "responses": ResponseWriter(generation, {}).ping(),
            "ollama": OllamaWriter(generation, "m", True).ping(),
        }

    pings = asyncio.run(make())
    assert pings["chat"] == b": ping 0/3\n\n"
    assert pings["messages"] == b'event: ping\ndata: {"type":"ping"}\n\n'
    assert pings["responses"].startswith(b'event: response.in_progress\ndata: {"type":"response.in_progress"')
    line = json.loads(pings["ollama"])
    assert line["message"] == {"role": "assistant", "content": ""} and line["done"] is False
