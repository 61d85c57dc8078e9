"""The example with two replicas of the shipped model: streams go through, and a replica that is killed is replaced."""

import asyncio
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

from tests.support.server.http_server import free_port

ROOT = Path(__file__).resolve().parents[3]
pytestmark = [
    pytest.mark.soak,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None, reason="ray is not installed: pip install '.[replicas]'"
    ),
]
BODY = {"prompt": "A list is", "max_tokens": 60, "temperature": 0, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def replicas(tmp_path_factory):
    """The example's address and process."""
    port = free_port()
    search_path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    log = tmp_path_factory.mktemp("ray") / "log"
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "examples" / "ray_serve.py"), "--port", str(port)],
        env=os.environ | {"PYTHONPATH": search_path, "RAY_USAGE_STATS_ENABLED": "0"},
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
    )
    url = f"http://localhost:{port}"
    try:
        wait_for(lambda: len(workers(process)) == 2 and are_ready(url), 400, log)
        yield url, process
    finally:
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
        for child in psutil.wait_procs(children, timeout=10)[1]:
            child.kill()


def wait_for(condition, wait_s: float, log: Path | None = None) -> None:
    end = time.monotonic() + wait_s
    while not condition():
        assert time.monotonic() < end, log and log.read_text()[-3000:]
        time.sleep(0.5)


def are_ready(url: str) -> bool:
    try:
        return all(httpx.get(url + "/health", trust_env=False, timeout=20).status_code == 200 for _ in range(8))
    except httpx.HTTPError:
        return False


def workers(process: subprocess.Popen) -> list[psutil.Process]:
    """Processes of replicas."""
    return [p for p in psutil.process_iter() if _name(p).startswith("ray::ServeReplica") and process.pid in _parents(p)]


def _name(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _parents(process: psutil.Process) -> list[int]:
    try:
        return [parent.pid for parent in process.parents()]
    except psutil.Error:
        return []


async def stream(client: httpx.AsyncClient) -> str:
    """ "whole", "error" where the client was told of one, or "cut" where an answer ended as if it were whole."""
    try:
        async with client.stream("POST", "/v1/completions", json=BODY) as answer:
            text = (await answer.aread()).decode()
    except httpx.HTTPError:
        return "error"
    if answer.status_code != 200 or '"error"' in text:
        return "error"
    return "whole" if text.endswith("data: [DONE]\n\n") and '"length"' in text else "cut"


def test_answers_stream_through_and_both_replicas_give_the_same(replicas):
    url, _ = replicas
    found = []
    for _ in range(6):
        arrivals = []
        with httpx.stream("POST", url + "/v1/completions", json=BODY, trust_env=False, timeout=120) as answer:
            chunks = []
            for piece in answer.iter_text():
                arrivals.append(time.monotonic())
                chunks.append(piece)
        frames = [json.loads(line[6:]) for line in "".join(chunks).splitlines() if line.startswith("data: {")]
        found.append("".join(frame["choices"][0]["text"] for frame in frames if frame["choices"]))

    assert len(set(found)) == 1 and len(arrivals) > 3


def test_a_killed_replica_loses_no_request_silently_and_is_replaced(replicas):
    url, process = replicas
    before = {worker.pid for worker in workers(process)}

    async def load() -> list[str]:
        limits = httpx.Limits(max_connections=40)
        async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits, trust_env=False) as client:
            tasks = [asyncio.create_task(stream(client)) for _ in range(24)]
            await asyncio.sleep(0.4)
            os.kill(min(before), signal.SIGKILL)
            return await asyncio.gather(*tasks)

    ended = asyncio.run(load())
    wait_for(lambda: len(workers(process)) == 2 and {w.pid for w in workers(process)} != before and are_ready(url), 200)

    assert "cut" not in ended and "whole" in ended, ended
    assert asyncio.run(_one(url)) == "whole"


async def _one(url: str) -> str:
    async with httpx.AsyncClient(base_url=url, timeout=120, trust_env=False) as client:
        return await stream(client)
