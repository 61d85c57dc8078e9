"""What the server costs: tokens a second of 8 streams over loopback, beside the same requests through `llm.step`.

    python examples/benchmarks/server/server_overhead.py [MODEL ...] [--rounds 3] [--tokens 512] [--out FILE]

The ceiling is the second; both are run in turns in one process, the clients in another. The aim is 0.95 of it, in the
medians. Where every core computes, clients and server take theirs from the steps: leave them one, as --threads does.
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import torch

from hetero_attn import LLM, SamplingParams
from hetero_attn.server.driver import warmed
from hetero_attn.server.run import HeteroServer, listen
from hetero_attn.server.settings import ServerSettings
from placement.machine.fingerprint import cpu_name

STREAMS = 8
CLIENTS = """
import asyncio, json, sys, httpx
url, streams, tokens = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
async def ask(client, number):
    body = dict(prompt=f"{number}: A list is", max_tokens=tokens, ignore_eos=True, temperature=0, stream=True)
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        async for _ in answer.aiter_raw():
            pass
async def rounds():
    async with httpx.AsyncClient(base_url=url, timeout=600, trust_env=False, verify=False) as client:
        while await asyncio.to_thread(sys.stdin.readline):
            await asyncio.gather(*(ask(client, number) for number in range(streams)))
            print("done", flush=True)
asyncio.run(rounds())
"""


def by_step(llm: LLM, tokens: int) -> float:
    """Tokens a second through `llm.step`."""
    params = SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0.0)
    start = time.perf_counter()
    requests = [llm.add(f"{number}: A list is", params) for number in range(STREAMS)]
    while any(request.finish_reason is None for request in requests):
        llm.step()
    return STREAMS * tokens / (time.perf_counter() - start)


def by_server(clients: subprocess.Popen, tokens: int) -> float:
    """Tokens a second over loopback."""
    start = time.perf_counter()
    clients.stdin.write("go\n")
    clients.stdin.flush()
    clients.stdout.readline()
    return STREAMS * tokens / (time.perf_counter() - start)


def measure(model: str, rounds: int, tokens: int, threads: int) -> dict[str, object]:
    """Both rates of one model, in turns."""
    settings = ServerSettings(port=0)
    sock, ready = listen(settings), threading.Event()
    port = sock.getsockname()[1]

    def load() -> LLM:
        limits = {"max_context": tokens + 64, "max_batch": STREAMS, "num_threads": threads}
        return warmed(LLM(model, device="cpu", prefix_cache=False, progress=False, **limits))

    server = HeteroServer(load, replace(settings, port=port), lambda text: ready.set())
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([sock])))
    thread.start()
    ready.wait()
    llm = server.service.llm
    command = [sys.executable, "-c", CLIENTS, f"http://localhost:{port}", str(STREAMS), str(tokens)]
    rates: dict[str, list[float]] = {"step": [], "server": []}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as clients:
        by_step(llm, tokens)
        by_server(clients, tokens)
        for _ in range(rounds):
            rates["step"].append(by_step(llm, tokens))
            rates["server"].append(by_server(clients, tokens))
        clients.stdin.close()
    server._loop.call_soon_threadsafe(server.stop)
    thread.join()
    step, served = (statistics.median(rates[name]) for name in ("step", "server"))
    print(
        f"{llm.plan.model}, {STREAMS} streams: llm.step {step:.1f} tokens/s, server {served:.1f}: {served / step:.3f}"
    )
    return {"model": llm.plan.model, "streams": STREAMS, "tokens": tokens, "threads": threads} | {
        "ratio": served / step,
        "tokens_per_s": rates,
    }


def main() -> None:
    """Measure, print, and write where asked to."""
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="*", default=[str(Path(__file__).resolve().parents[2] / "tiny")])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--threads", type=int, default=max(1, len(os.sched_getaffinity(0)) - 1))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    record = {
        "benchmark": "server_overhead",
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"cpu": cpu_name(), "usable_cpus": len(os.sched_getaffinity(0)), "system": platform.platform()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "models": [measure(model, given.rounds, given.tokens, given.threads) for model in given.models],
    }
    if given.out is not None:
        given.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
