"""A refusal takes little, the first one as any other: counted in what is looked at and imported, not in milliseconds."""

import asyncio
import json
import re
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import h11
import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from hetero_attn.server import app as application
from hetero_attn.server import service as services
from hetero_attn.server.app import Door
from hetero_attn.server.connection import PatientConnection, plain_post
from hetero_attn.server.driver import State
from hetero_attn.server.service import Service
from hetero_attn.server.settings import ServerSettings
from tests.support.server.http_server import RunningServer, load_tiny

ROOT = Path(__file__).resolve().parents[2]


class CountedLive(dict):
    """Requests that count how often somebody goes through all of them."""

    looks = 0

    def __iter__(self):
        self.looks += 1
        return super().__iter__()


@pytest.fixture
def full(server):
    """An application with the server's model, in whose queue nobody finds room, and its service."""
    service = Service(lambda: None, ServerSettings(max_waiting=0, api_key="k"))
    service.driver.llm, service.driver.state = server.llm, State.READY
    service.driver.live = CountedLive()
    service._entering = 10_000
    with TestClient(application.make_app(service), base_url="http://localhost") as client:
        yield client, service
    service.close()


@pytest.mark.parametrize("path", [path for _, path, _ in application.COMPUTED])
def test_a_refusal_goes_past_nothing_but_the_guard(full, monkeypatch, path):
    client, service = full
    entered = []
    monkeypatch.setattr(Starlette, "__call__", lambda self, scope, receive, send: entered.append(scope["path"]))
    answer = client.post(path, content=b"{", headers={"x-api-key": "k"})
    stranger = client.post(path, content=b"{")

    assert answer.status_code == 429 and 1 <= int(answer.headers["retry-after"]) <= 120
    assert stranger.status_code == 401 and entered == []
    assert service.metrics._refused.labels(429)._value.get() == 1


def test_a_refusal_that_is_told_again_is_in_the_form_and_of_the_number_of_who_asks(full):
    client, service = full
    paths = ["/v1/messages", "/v1/completions", "/v1/completions", "/v1/messages"]
    told = [client.post(path, content=b"{", headers={"x-api-key": "k"}).json() for path in paths]
    service._entering = 20_000
    more = client.post(paths[-1], content=b"{", headers={"x-api-key": "k"}).json()

    assert told[0] == told[3] and told[1] == told[2] and told[0]["type"] == "error" and "type" not in told[1]
    assert "10000 requests" in told[0]["error"]["message"] and "20000 requests" in more["error"]["message"]


def test_a_thousand_refusals_look_through_the_queue_once(full, monkeypatch):
    client, service = full
    monkeypatch.setattr(services, "RETRY_HOLDS_S", 600.0)
    for _ in range(1000):
        with pytest.raises(services.ApiError) as refused:
            service.check_room()
        assert refused.value.status == 429

    assert service.driver.live.looks == 1
    assert client.get("/v1/models", headers={"x-api-key": "k"}).status_code == 200, "what takes no place is answered"


PLAIN = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX-Api-Key: k\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\n{}"


def test_the_plainest_request_is_refused_before_it_is_parsed():
    head = plain_post(PLAIN)
    assert head is not None and head.path == "/v1/completions" and (b"x-api-key", b"k") in head.headers


@pytest.mark.parametrize(
    ("part", "other"),
    [
        (b"POST", b"GET"),
        (b"1.1", b"1.0"),
        (b"Length: 2", b"Length: 3"),
        (b"Length: 2", b"Length: 1"),
        (b"Length: 2", b"Length: +2"),
        (b"Length: 2", b"Length: 2\r\nContent-Length: 2"),
        (b"Host: localhost\r\n", b""),
        (b"Host: localhost", b"Host: localhost\r\nHost: other"),
        (b"Host:", b"Host :"),
        (b"X-Api-Key: k", b"X-Api-Key"),
        (b"X-Api-Key: k", b"X: k\r\n more"),
        (b"X-Api-Key: k", b"X: k\nTransfer-Encoding: chunked"),
        (b"X-Api-Key: k", b"Transfer-Encoding: chunked"),
        (b"X-Api-Key: k", b"Expect: 100-continue"),
        (b"X-Api-Key: k", b"Origin: http://localhost"),
        (b"keep-alive", b"close"),
        (b"\r\n\r\n{}", b"\r\n{}"),
    ],
)
def test_what_is_less_plain_is_left_to_the_parser(part, other):
    assert part in PLAIN and plain_post(PLAIN.replace(part, other)) is None


def test_a_connection_goes_on_behind_a_refusal_that_nobody_parsed(monkeypatch):
    """The same connection is refused twice and then answered; who may not ask is told so, not that there is no room."""
    parsed = []
    receive = h11.Connection.receive_data
    with RunningServer(api_key="k") as server, socket.create_connection(("127.0.0.1", server.port), 60) as sock:
        monkeypatch.setattr(
            h11.Connection, "receive_data", lambda self, data: parsed.append(data) or receive(self, data)
        )
        server.service._entering = 10_000
        told = [_asked(sock, PLAIN), _asked(sock, PLAIN)]
        assert parsed == []
        stranger = _asked(sock, PLAIN.replace(b"Key: k", b"Key: no"))
        in_parts = _asked(sock, PLAIN[:-1], PLAIN[-1:])
        server.service._entering = 0
        answered = _asked(
            sock, PLAIN.replace(b"Length: 2\r\n\r\n{}", b'Length: 29\r\n\r\n{"prompt":"A","max_tokens":2}')
        )
        refused = server.service.metrics._refused.labels("429")._value.get()

    assert all(answer.startswith(b"HTTP/1.1 429 Too Many Requests\r\n") for answer in (*told, in_parts)), told
    assert b"\r\nretry-after: " in told[0] and b"\r\ndate: " in told[0] and told[0].count(b"content-length") == 1
    assert json.loads(told[1].partition(b"\r\n\r\n")[2])["error"]["code"] == "queue_full"
    assert stranger.startswith(b"HTTP/1.1 401 ") and answered.startswith(b"HTTP/1.1 200 ") and refused == 3


def test_of_those_who_come_in_one_turn_no_more_are_begun_than_find_room(monkeypatch):
    """All of a crowd are there before the first of them is let in; what is begun for the rest, all others wait for."""
    begun = []
    take = PatientConnection._take
    monkeypatch.setattr(PatientConnection, "_take", lambda self, data: begun.append(data) or take(self, data))
    body = b'{"prompt":"A","max_tokens":2}'
    request = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    with RunningServer(lambda: load_tiny(batch=1), max_waiting=3) as server:
        held, going = threading.Event(), threading.Event()
        socks = [socket.create_connection(("127.0.0.1", server.port), 60) for _ in range(20)]
        server.server._loop.call_soon_threadsafe(lambda: (held.set(), going.wait(60)))
        assert held.wait(60)
        for sock in socks:
            sock.sendall(request)
        going.set()
        told = [_asked(sock) for sock in socks]
        count = len(begun)
        assert _asked(socks[0], request).startswith(b"HTTP/1.1 200 "), "nobody is expected any more"
        for sock in socks:
            sock.close()

    statuses = sorted(answer[9:12] for answer in told)
    assert statuses == [b"200"] * 4 + [b"429"] * 16 and count == 4


def test_requests_of_one_connection_are_answered_in_their_order(monkeypatch):
    """What came behind a request that waited for its turn to be begun went to the parser before it: the client took the
    one's answer for the other's, and half of a request was read as the begin of the other."""
    waiting, received = [], []
    receive = PatientConnection.data_received
    monkeypatch.setattr(Door, "on_arrival", lambda self, path, begin: waiting.append(begin))
    monkeypatch.setattr(PatientConnection, "data_received", lambda self, data: received.append(receive(self, data)))
    body = b'{"prompt":"A","max_tokens":2}'
    first = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    with RunningServer() as server, socket.create_connection(("127.0.0.1", server.port), 60) as sock:
        sock.sendall(first)
        server.wait_until(lambda: len(received) == 1)
        sock.sendall(b"GET /health HTTP/1.1\r\n")
        server.wait_until(lambda: len(received) == 2)
        server.server._loop.call_soon_threadsafe(waiting.pop())
        answer = _asked(sock)
        health = _asked(sock, b"Host: localhost\r\n\r\n")

    assert b'"text_completion"' in answer and health.endswith(b'{"status":"ready"}')


def test_of_a_crowd_one_is_begun_in_a_turn_of_the_event_loop():
    """What comes between is read, and told if there is no room, before the next one is parsed."""
    begun, counted = [], []
    door = Door(None, SimpleNamespace(check_room=lambda arriving: counted.append(arriving)))

    async def turns() -> None:
        for name in "abc":
            assert door.on_arrival("/v1/completions", partial(begun.append, name)) is None
        for _ in range(4):
            begun.append("turn")
            await asyncio.sleep(0)
        door.on_arrival("/tokenize", partial(begun.append, "at once"))
        assert door.on_arrival("/v1/completions", partial(begun.append, "later")) is None

    asyncio.run(turns())
    assert begun == ["turn", "a", "turn", "b", "turn", "c", "turn", "at once", "later"]
    assert counted == [0, 1, 2, 0], "those that have come are counted until their tasks begin"


def test_a_request_that_cannot_be_begun_stops_none_behind_it():
    begun, failed = [], []
    door = Door(None, SimpleNamespace(check_room=lambda arriving: None))

    async def turns() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: failed.append(context["exception"]))
        for begin in (lambda: 1 / 0, partial(begun.append, "a"), partial(begun.append, "b")):
            door.on_arrival("/v1/completions", begin)
        for _ in range(4):
            await asyncio.sleep(0)
        door.on_arrival("/v1/completions", partial(begun.append, "c"))
        await asyncio.sleep(0)

    asyncio.run(turns())
    assert begun == ["a", "b", "c"] and [type(error) for error in failed] == [ZeroDivisionError]


def _asked(sock: socket.socket, *parts: bytes) -> bytes:
    """A whole answer to a request that is sent in so many parts."""
    for part in parts:
        sock.sendall(part)
        time.sleep(0.05)
    found, body, length = b"", b"", None
    while length is None or len(body) < int(length[1]):
        found += sock.recv(65536) or pytest.fail(f"the connection ended behind {found!r}")
        head, _, body = found.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head)
    return found


FIRST = """
import json, sys, threading
import httpx
from tests.support.server.http_server import RunningServer, load_tiny
talk = [{"role": "user", "content": "Hi"}]
asked = [
    ("/v1/completions", {"prompt": "A", "max_tokens": 2}),
    ("/v1/completions", {"prompt": "A", "max_tokens": 2, "stream": True}),
    ("/v1/chat/completions", {"messages": talk, "max_tokens": 2, "stream": True}),
    ("/v1/messages", {"messages": talk, "max_tokens": 2}),
    ("/v1/responses", {"input": "Hi", "max_output_tokens": 2}),
    ("/api/chat", {"messages": talk, "options": {"num_predict": 2}}),
    ("/v1/chat/completions", {"messages": []}),
    ("/nothing", {}),
]
with RunningServer() as server, httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client:
    client.get("/health")
    before = set(sys.modules)
    statuses = [client.post(path, json=body).status_code for path, body in asked]
    server.service._entering = 10_000
    statuses.append(client.post("/v1/completions", json={"prompt": "A"}).status_code)
    server.service._entering = 0
    print(json.dumps([statuses, sorted(set(sys.modules) - before)]))
"""


def test_nothing_is_imported_by_the_first_request_of_any_kind():
    done = subprocess.run([sys.executable, "-c", FIRST], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    statuses, imported = json.loads(done.stdout.splitlines()[-1])

    assert statuses == [200] * 6 + [400, 404, 429]
    assert [name for name in imported if not name.startswith("encodings")] == []
