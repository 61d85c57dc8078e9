"""A refusal takes little, the first one as any other: counted in what is looked at and imported, not in milliseconds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from hetero_attn.server import app as application
from hetero_attn.server import service as services
from hetero_attn.server.driver import State
from hetero_attn.server.service import Service
from hetero_attn.server.settings import ServerSettings

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


def test_a_thousand_refusals_look_through_the_queue_once(full, monkeypatch):
    client, service = full
    monkeypatch.setattr(services, "RETRY_HOLDS_S", 600.0)
    for _ in range(1000):
        with pytest.raises(services.ApiError) as refused:
            service.check_room()
        assert refused.value.status == 429

    assert service.driver.live.looks == 1
    assert client.get("/v1/models", headers={"x-api-key": "k"}).status_code == 200, "what takes no place is answered"


FIRST = """
import json, sys, threading
import httpx
from tests.support.http_server import RunningServer
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
