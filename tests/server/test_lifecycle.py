"""Beginning, silence, load, clients that leave, and the end."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import threading
import time

import httpx
import pytest

from hetero_attn.errors import ArgumentError, EngineDeadError
from hetero_attn.server.metrics import ServerMetrics
from hetero_attn.server.settings import ServerSettings
from tests.support.processes.command import ROOT, run
from tests.support.processes.quick_python import quick_python
from tests.support.server.http_server import TINY, RunningServer, await_health, free_port, load_tiny

MESSAGES = [{"role": "user", "content": "What is a list?"}]
LONG = {"messages": MESSAGES, "max_tokens": 400, "ignore_eos": True, "temperature": 0}


def gauges(url: str) -> dict[str, float]:
    """What /metrics says, by name and labels."""
    lines = httpx.get(url + "/metrics", trust_env=False).text.splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line and line[0] != "#"}


def at_rest(server: RunningServer) -> bool:
    found = gauges(server.url)
    return found["vllm:num_requests_running"] == found["vllm:num_requests_waiting"] == 0


def is_empty(server: RunningServer) -> bool:
    """Whether no connection is open and no request is anywhere: one whose body is being read is in no gauge yet.

    One that the server has not accepted is in neither; a request that is answered, as `at_rest` asks, comes after it.
    """
    service, state = server.service, server.server.server_state
    return not (state.connections or state.tasks or service.driver.live or service._entering)


def raw(server: RunningServer, path: str, body: dict) -> socket.socket:
    """A connection whose request is sent and whose answer nobody reads yet."""
    data = json.dumps(body).encode()
    found = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(data)}\r\n\r\n"
    found.sendall(head.encode() + data)
    return found


def read_until(sock: socket.socket, end: bytes) -> bytes:
    found = b""
    while end not in found:
        data = sock.recv(65536)
        assert data, found
        found += data
    return found


@pytest.fixture
def slow():
    with RunningServer(step_s=0.05, max_waiting=16, ping_interval_s=0.3, drain_s=30.0) as server:
        yield server


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("clients", [1, 8], ids=["decoding", "queued"])
def test_a_client_that_leaves_ends_its_requests(slow, stream, clients):
    socks = [raw(slow, "/v1/chat/completions", {**LONG, "stream": stream}) for _ in range(clients)]
    slow.wait_until(lambda: len(slow.service.driver.live) == clients)
    for sock in socks:
        sock.close()
    slow.wait_until(lambda: at_rest(slow), 30)

    assert gauges(slow.url)['hetero_requests_aborted_total{cause="client"}'] == clients
    assert all(pool.free_pages == pool.capacity for pool in slow.llm.engine.kv_cache.pools)


def test_connections_that_come_and_drop_leave_nothing(slow):
    for _ in range(60):
        raw(slow, "/v1/chat/completions", {**LONG, "stream": True}).close()
    slow.wait_until(lambda: at_rest(slow), 60)
    slow.wait_until(lambda: is_empty(slow), 60)

    assert all(pool.free_pages == pool.capacity for pool in slow.llm.engine.kv_cache.pools)


def after_step(server: RunningServer) -> None:
    """Return once whatever the step under way announces has been looked at."""
    driver, looked = server.service.driver, threading.Event()
    driver.between_steps(lambda: None).result(60)
    server.server._loop.call_soon_threadsafe(looked.set)
    assert looked.wait(60)


def test_an_answer_that_is_whole_before_its_turn_is_live_leaves_nothing(monkeypatch):
    """Beside others a short answer may end in the step that begins before the loop hears of it: its place in the queue
    was taken for ever, and it was in no counter."""
    with RunningServer() as server:
        add = server.llm.add

        def added(*arguments, **options):
            request = add(*arguments, **options)
            while request.finish_reason is None:
                after_step(server)
            after_step(server)
            return request

        monkeypatch.setattr(server.llm, "add", added)
        answer = httpx.post(server.url + "/v1/completions", json={"prompt": "A", "max_tokens": 2}, trust_env=False)
        counted = gauges(server.url)

        assert answer.json()["usage"]["completion_tokens"] == counted["vllm:generation_tokens_total"] == 2
        assert sum(n for name, n in counted.items() if name.startswith("vllm:request_success_total")) == 1
        assert at_rest(server) and not server.service.driver.live


def test_tokens_that_come_while_others_are_counted_are_counted(monkeypatch):
    """Tokens and end were read one after the other of a request that a step changes: those in between were in no
    counter."""
    moved = ServerMetrics.moved

    def moved_and_ended(self, request, *tokens):
        moved(self, request, *tokens)
        if request.progress.tokens:
            server.wait_until(lambda: request.finish_reason is not None)

    monkeypatch.setattr(ServerMetrics, "moved", moved_and_ended)
    with RunningServer() as server:
        body = {"prompt": "A", "max_tokens": 5, "ignore_eos": True}
        answer = httpx.post(server.url + "/v1/completions", json=body, trust_env=False)
        counted = gauges(server.url)

    assert answer.json()["usage"]["completion_tokens"] == counted["vllm:generation_tokens_total"] == 5


def test_silence_is_broken_by_comments_and_the_loop_never_waits_for_a_step():
    with RunningServer(step_s=0.8, ping_interval_s=0.15) as server:
        lags: list[float] = []

        async def measure() -> None:
            while True:
                start = time.perf_counter()
                await asyncio.sleep(0.01)
                lags.append(time.perf_counter() - start - 0.01)

        asyncio.run_coroutine_threadsafe(measure(), server.server._loop)
        sock = raw(server, "/v1/chat/completions", {**LONG, "max_tokens": 2, "stream": True})
        head = read_until(sock, b"\r\n\r\n")
        told = read_until(sock, b"[DONE]\n\n")
        sock.close()

    assert head.startswith(b"HTTP/1.1 200") and b"text/event-stream" in head
    before_first_token = told.partition(b"data:")[0]
    assert before_first_token.count(b": ping ") >= 2 and before_first_token.count(b"/11") >= 2
    assert sorted(lags)[len(lags) // 2] < 0.1, "the loop answers whatever a step takes"


def test_a_full_queue_is_429_and_the_others_are_answered():
    with RunningServer(max_waiting=8, step_s=0.1) as server:

        async def ask_all() -> list[httpx.Response]:
            limits = httpx.Limits(max_connections=40)
            async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits, trust_env=False) as client:
                body = {"prompt": "A list is", "max_tokens": 8, "ignore_eos": True}
                return await asyncio.gather(*(client.post("/v1/completions", json=body) for _ in range(40)))

        answers = asyncio.run(ask_all())
        counted = gauges(server.url)
        is_at_rest = at_rest(server)

    served = [each for each in answers if each.status_code == 200]
    refused = [each for each in answers if each.status_code == 429]
    assert len(served) >= 12 and len(served) + len(refused) == 40 and refused
    assert all(1 <= int(each.headers["retry-after"]) <= 120 for each in refused)
    assert all(each.json()["error"]["code"] == "queue_full" for each in refused)
    assert is_at_rest
    assert counted["vllm:generation_tokens_total"] == 8 * len(served)
    assert counted['vllm:request_success_total{finished_reason="length"}'] == len(served)
    assert counted['hetero_requests_refused_total{status="429"}'] == len(refused)


def test_while_it_loads_it_says_so():
    may_load = threading.Event()

    def load():
        may_load.wait(60)
        return load_tiny()

    server = RunningServer(load)
    try:
        health = httpx.get(server.url + "/health", trust_env=False, timeout=30)
        chat = httpx.post(server.url + "/v1/chat/completions", json={"messages": MESSAGES}, trust_env=False, timeout=30)
    finally:
        may_load.set()
    with server:
        ready = httpx.get(server.url + "/health", trust_env=False, timeout=30)

    assert (health.status_code, health.json()["status"]) == (503, "loading")
    assert chat.status_code == 503 and chat.headers["retry-after"] == "5"
    assert ready.status_code == 200
    assert "--context 2048 would take about" in server.said[0]
    assert re.search(r"expected: [\d,.]+ tokens/s of a prompt, [\d,.]+ tokens/s", server.said[0])
    assert "context 512 tokens" in server.said[0] and server.said[0].count(f":{server.port}/v1") >= 5


def test_a_model_that_cannot_be_loaded_says_so_once(caplog):
    """The log said it, too."""
    result = run("serve", str(ROOT / "tests"), "--port", "0", "--device", "cpu")
    said = result.stderr.partition("error: ")[2].strip()[:60]

    assert result.exit_code == 3 and "config.json" in result.stderr
    assert said and (caplog.text + result.stderr).count(said) == 1


def test_a_dead_engine_ends_streams_with_an_error_and_the_server():
    server = RunningServer(step_s=0.05)
    with server:
        sock = raw(server, "/v1/chat/completions", {**LONG, "stream": True})
        read_until(sock, b"data:")

        def die():
            raise EngineDeadError("a lane is gone")

        server.llm.step = die
        told = read_until(sock, b'"error"')
        server.wait_until(lambda: server.service.driver.failure is not None, 10)

    assert b"engine" in told
    assert isinstance(server.server.failure, EngineDeadError)


def test_told_to_stop_it_finishes_what_runs_and_takes_nothing_new(slow):
    sock = raw(slow, "/v1/chat/completions", {**LONG, "max_tokens": 30, "stream": True})
    read_until(sock, b"data:")
    slow.server._loop.call_soon_threadsafe(slow.server.stop)
    slow.wait_until(lambda: slow.service.driver.state.value == "stopping", 10)
    refused = httpx.post(slow.url + "/v1/chat/completions", json=LONG, trust_env=False)
    told = read_until(sock, b"[DONE]\n\n")

    assert refused.status_code == 503 and b'"finish_reason":"length"' in told


def test_what_does_not_finish_in_time_ends_with_an_error():
    with RunningServer(step_s=0.2, drain_s=0.2) as server:
        sock = raw(server, "/v1/chat/completions", {**LONG, "stream": True})
        read_until(sock, b"data:")
        server.server._loop.call_soon_threadsafe(server.server.stop)
        told = read_until(sock, b'"error"')

    assert b"stopping" in told


def test_the_command_serves_until_a_signal(tmp_path):
    """The key is needed, nothing of a prompt is logged, and SIGTERM ends it with exit code 0."""
    key = tmp_path / "key"
    key.write_text("secret\n")
    port = free_port()
    wishes = ("--device", "cpu", "--threads", 1, "--context", 256, "--port", port, "--api-key-file", key)
    process = subprocess.Popen(
        quick_python("-m", "hetero_attn", "serve", TINY, *wishes),
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        await_health(process, port)
        url, body = (
            f"http://localhost:{port}/v1/chat/completions",
            {"messages": [{"role": "user", "content": "zebra crossing"}]},
        )
        statuses = [
            httpx.post(url, json={**body, "max_tokens": 2}, headers=headers, trust_env=False, timeout=60).status_code
            for headers in (
                {},
                {"authorization": "Bearer wrong"},
                {"authorization": "Bearer secret"},
                {"api-key": "secret"},
                {"x-api-key": "secret"},
            )
        ]
        httpx.post(url, json={**body, "n": "zebra"}, headers={"api-key": "secret"}, trust_env=False)
        os.kill(process.pid, signal.SIGTERM)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()

    assert statuses == [401, 401, 200, 200, 200]
    assert process.returncode == 0, stderr
    assert "tiny is served on" in stderr and "zebra" not in stdout + stderr and "secret" not in stderr


def test_others_may_not_reach_it_without_a_key():
    with pytest.raises(ArgumentError, match="--api-key-file"):
        ServerSettings(host="0.0.0.0")
    assert not ServerSettings(host="0.0.0.0", api_key="k").is_local
