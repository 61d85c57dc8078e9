"""While a step is under way everything but its tokens goes on: here a step is held until all else is done, so whatever
waited for it would never come back. Milliseconds are for examples/benchmarks/server/server_lag.py."""

import asyncio
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest

from hetero_attn.llm import LLM
from hetero_attn.server.protocols.messages_events import MessageWriter
from hetero_attn.server.protocols.ollama_lines import OllamaWriter
from hetero_attn.server.protocols.openai import OpenAIWriter
from hetero_attn.server.protocols.responses_events import ResponseWriter
from hetero_attn.serving.sampling_params import SamplingParams
from tests.server.test_lifecycle import LONG, MESSAGES, at_rest, raw, read_until
from tests.support.server.http_server import READY_S, RunningServer


@contextmanager
def held(server: RunningServer) -> Iterator[None]:
    """No step of the server ends before this does: it has the turn at the engine, and keeps it."""
    may_end, scheduler = threading.Event(), server.llm._scheduler
    step = scheduler.step

    def waiting() -> object:
        assert may_end.wait(READY_S), "nobody let the step go"
        return step()

    scheduler.step = waiting
    try:
        yield
    finally:
        may_end.set()
        scheduler.step = step


def test_small_pieces_are_sent_at_once():
    """They waited for the client's acknowledgement of the piece before, 40 ms each, on every connection that is kept."""
    options = []
    with RunningServer() as server:
        made = server.server.config.http_protocol_class.connection_made

        def watched(self: object, transport: asyncio.Transport) -> None:
            sock = transport.get_extra_info("socket")
            options.append(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            made(self, transport)

        server.server.config.http_protocol_class.connection_made = watched
        try:
            httpx.get(server.url + "/health", trust_env=False)
        finally:
            server.server.config.http_protocol_class.connection_made = made

    assert options == [1]


@pytest.fixture
def threads_of_calls(monkeypatch):
    """By the name of a call to the model, the threads that it came from."""
    found: dict[str, set[int]] = {}

    def watch(name: str) -> None:
        original = getattr(LLM, name)

        def watched(self: LLM, *arguments: object, **more: object) -> object:
            found.setdefault(name, set()).add(threading.get_ident())
            return original(self, *arguments, **more)

        monkeypatch.setattr(LLM, name, watched)

    for name in ("add", "add_scoring", "abort", "step", "resize"):
        watch(name)
    return found


def test_nothing_but_tokens_waits_for_a_step(threads_of_calls):
    short = {"prompt": "a", "max_tokens": 2, "stream": True}
    told = {"/health": 0, "/metrics": 0, "/v1/models": 0, "/hetero/report": 0, "/api/tags": 0, "/": 0}
    asked = {
        "/tokenize": {"prompt": "A list"},
        "/v1/messages/count_tokens": {"messages": MESSAGES},
        "/api/show": {},
        "/detokenize": {"tokens": [5000]},
    }
    with RunningServer(max_waiting=8) as server:
        with held(server):
            streams = [raw(server, "/v1/chat/completions", {**LONG, "max_tokens": 3, "stream": True})]
            streams += [raw(server, "/v1/completions", short) for _ in range(11)]
            heads = [read_until(sock, b"\r\n\r\n") for sock in streams]
            with httpx.Client(base_url=server.url, timeout=READY_S, trust_env=False) as http:
                told = {path: http.get(path).status_code for path in told}
                told |= {path: http.post(path, json=body).status_code for path, body in asked.items()}
                healthy = Counter(http.get("/health").status_code for _ in range(50))
                full = http.post("/v1/completions", json=short)
            streams.pop().close()
            server.wait_until(lambda: len(server.service.driver._notes) == 1)
            generated = sum(len(request.token_ids) for request in server.service.driver.live)
        ends = [read_until(sock, b"[DONE]\n\n") for sock in streams]
        server.wait_until(lambda: at_rest(server))
        loop_thread = server._thread.ident

    assert generated == 0 and all(b" 200 OK" in head for head in heads), "headers came while the first step was held"
    assert healthy == {200: 50} and full.status_code == 429
    assert told == dict.fromkeys(told, 200) | {"/detokenize": 400}
    assert len(ends) == 11 and {"add", "abort", "step"} <= threads_of_calls.keys()
    assert all(loop_thread not in threads for threads in threads_of_calls.values())


def test_an_end_tells_streams_though_a_step_is_held():
    """They were told by the thread that takes the step, so only after it."""
    with RunningServer(drain_s=0.05) as server, held(server):
        sock = raw(server, "/v1/chat/completions", {**LONG, "stream": True})
        whole = raw(server, "/v1/chat/completions", LONG)
        read_until(sock, b"\r\n\r\n")
        server.wait_until(lambda: len(server.service.driver.live) == 2)
        server.server._loop.call_soon_threadsafe(server.server.stop)
        told, answer = read_until(sock, b"0\r\n\r\n"), read_until(whole, b"stopping")
        server._thread.join(READY_S)

        assert server.server.is_held and not server._thread.is_alive()
    assert b'"error"' in told and b"stopping" in told and answer.startswith(b"HTTP/1.1 503")


GREEDY = {"temperature": 0}


def openai_chat(url: str) -> str:
    from openai import OpenAI

    client = OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)
    stream = client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=0, max_tokens=9, stream=True)
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream)


def openai_responses(url: str) -> str:
    from openai import OpenAI

    client = OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)
    text = MESSAGES[0]["content"]
    with client.responses.stream(model="tiny", input=text, temperature=0, max_output_tokens=9) as stream:
        return "".join(event.delta for event in stream if event.type == "response.output_text.delta")


def anthropic_messages(url: str) -> str:
    from anthropic import Anthropic

    client = Anthropic(base_url=url, api_key="none", max_retries=0)
    with client.messages.stream(model="tiny", max_tokens=9, messages=MESSAGES, extra_body=GREEDY) as stream:
        return "".join(stream.text_stream)


def ollama_chat(url: str) -> str:
    from ollama import Client

    options = {"temperature": 0, "num_predict": 9}
    return "".join(
        part.message.content for part in Client(host=url).chat("tiny", MESSAGES, stream=True, options=options)
    )


CLIENTS = {
    "openai": (openai_chat, OpenAIWriter),
    "openai.types.responses": (openai_responses, ResponseWriter),
    "anthropic": (anthropic_messages, MessageWriter),
    "ollama": (ollama_chat, OllamaWriter),
}


@pytest.mark.parametrize("package", CLIENTS)
def test_a_client_waits_as_long_as_it_is_pinged(package, monkeypatch):
    """The first step is held until the client has been pinged many times; then it reads the answer as if at once."""
    pytest.importorskip(package, reason=f"the package {package.partition('.')[0]} is not installed")
    ask, writer = CLIENTS[package]
    pings, ping = [], writer.ping
    monkeypatch.setattr(writer, "ping", lambda self: pings.append(1) or ping(self))
    with RunningServer(ping_interval_s=0.02) as server, ThreadPoolExecutor(1) as pool:
        expected = server.llm.chat(MESSAGES, SamplingParams(temperature=0.0, max_tokens=9)).text
        with held(server):
            answer = pool.submit(ask, server.url)
            server.wait_until(lambda: len(pings) >= 20 or answer.done())
            assert not answer.done(), answer.result()
        assert answer.result(READY_S) == expected
