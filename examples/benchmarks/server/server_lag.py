"""How late a server's event loop and its `/health` are while steps take long: 8 streams, in milliseconds.

    python examples/benchmarks/server/server_lag.py [MODEL] [--step-s 2] [--seconds 12] [--out FILE]

Twice: with steps that are made to last `--step-s` without computing anything, and with long prompts, whose chunks
compute on every thread that the model has. The loop's lag is how much later than asked a timer of 5 ms fires; `/health`
is asked by another process, 50 times a second. Wanted: lag p99 at most 20 ms and at most 100 ever, `/health` p99 at
most 50 ms.
"""

import argparse
import asyncio
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hetero_attn import LLM
from hetero_attn.server.driver import warmed
from hetero_attn.server.run import HeteroServer, listen
from hetero_attn.server.settings import ServerSettings
from placement.machine.fingerprint import cpu_name

STREAMS = 8
CONTEXT = 2048
TIMER_S = 0.005
ASKING = """
import http.client, json, sys, time
port, seconds = int(sys.argv[1]), float(sys.argv[2])
connection, took, end = http.client.HTTPConnection("localhost", port), [], time.monotonic() + seconds
while time.monotonic() < end:
    start = time.perf_counter()
    connection.request("GET", "/health")
    assert connection.getresponse().read()
    took.append(time.perf_counter() - start)
    time.sleep(0.02)
print(json.dumps(took))
"""


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Milliseconds at the middle, at 99 of 100 and at most."""
    ordered = sorted(1e3 * each for each in seconds)
    return {"p50_ms": ordered[len(ordered) // 2], "p99_ms": ordered[len(ordered) * 99 // 100], "most_ms": ordered[-1]}


class Running:
    """A server of a model on a thread of this process. step_s: what each step takes beside what it computes."""

    def __init__(self, model: str, threads: int) -> None:
        settings = ServerSettings(port=0)
        sock, ready = listen(settings), threading.Event()
        self.port, self.step_s = sock.getsockname()[1], 0.0
        options = {"max_context": CONTEXT, "max_batch": STREAMS, "num_threads": threads, "prefix_cache": False}

        def load() -> LLM:
            llm = warmed(LLM(model, device="cpu", progress=False, **options))
            step = llm.step
            llm.step = lambda: (time.sleep(self.step_s), step())[1]
            return llm

        self.server = HeteroServer(load, replace(settings, port=self.port), lambda text: ready.set())
        self.thread = threading.Thread(target=lambda: asyncio.run(self.server.serve([sock])))
        self.thread.start()
        ready.wait()

    def lag(self, seconds: float) -> list[float]:
        """How late a timer of the loop is, again and again."""

        async def measure() -> list[float]:
            found, end = [], time.monotonic() + seconds
            while time.monotonic() < end:
                start = time.perf_counter()
                await asyncio.sleep(TIMER_S)
                found.append(time.perf_counter() - start - TIMER_S)
            return found

        return asyncio.run_coroutine_threadsafe(measure(), self.server._loop).result()

    def observed(self, seconds: float) -> dict[str, dict[str, float]]:
        """The loop's lag and how long `/health` takes, at the same time."""
        command = [sys.executable, "-c", ASKING, str(self.port), str(seconds)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as asking:
            lag = self.lag(seconds)
            health = json.loads(asking.communicate()[0])
        return {"lag": percentiles(lag), "health": percentiles(health)}

    def stream(self, prompts: Sequence[str], tokens: int) -> subprocess.Popen:
        """Clients that stream an answer to each prompt, in a process of their own."""
        code = """
import asyncio, json, sys, httpx
async def ask(client, body):
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        async for _ in answer.aiter_raw():
            pass
async def main():
    async with httpx.AsyncClient(base_url=sys.argv[1], timeout=600, trust_env=False) as client:
        await asyncio.gather(*(ask(client, body) for body in json.load(sys.stdin)))
asyncio.run(main())
"""
        bodies = [{"prompt": text, "max_tokens": tokens, "ignore_eos": True, "stream": True} for text in prompts]
        command = [sys.executable, "-c", code, f"http://localhost:{self.port}"]
        clients = subprocess.Popen(command, stdin=subprocess.PIPE, text=True, stderr=subprocess.DEVNULL)
        clients.stdin.write(json.dumps(bodies))
        clients.stdin.close()
        while len(self.server.service.driver.live) < len(prompts):
            time.sleep(0.01)
        return clients

    def stop(self) -> None:
        """End it."""
        self.server._loop.call_soon_threadsafe(self.server.stop)
        self.server._loop.call_soon_threadsafe(self.server.stop)
        self.thread.join()


def main() -> None:
    """Measure, print, and write where asked to."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default=str(Path(__file__).resolve().parents[2] / "tiny"))
    parser.add_argument("--step-s", type=float, default=2.0)
    parser.add_argument("--seconds", type=float, default=12.0)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    running, found = Running(given.model, given.threads), {}
    try:
        name = f"steps of {given.step_s:g} s"
        running.step_s = given.step_s
        clients = running.stream([f"{number}: A list is" for number in range(STREAMS)], CONTEXT // 2)
        found[name] = running.observed(given.seconds)
        clients.kill()
        running.step_s = 0.0
        while running.server.service.driver.live:
            time.sleep(0.01)
        words = "The with statement is used to wrap the execution of a block. " * 100
        clients = running.stream([f"{number}: {words}" for number in range(STREAMS)], CONTEXT // 4)
        found["prompts and answers"] = running.observed(given.seconds)
        clients.kill()
    finally:
        running.stop()
    for name, parts in found.items():
        told = [f"{part} p99 {each['p99_ms']:.1f} ms, most {each['most_ms']:.1f}" for part, each in parts.items()]
        print(f"{name}: {', '.join(told)}")
    record = {
        "benchmark": "server_lag",
        "model": given.model,
        "threads": given.threads,
        "streams": STREAMS,
        "machine": {"cpu": cpu_name(), "usable_cpus": len(os.sched_getaffinity(0)), "system": platform.platform()},
        "ms": found,
    }
    if given.out is not None:
        given.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
