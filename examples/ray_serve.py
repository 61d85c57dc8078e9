"""Replicas of one model behind Ray Serve: one address, requests spread over them, a lost one replaced.

    pip install 'hetero-attn[replicas]'
    python examples/ray_serve.py [MODEL] [--replicas 2] [--port 8000]

Each replica is a process with a model of its own, on this machine or on others of the Ray cluster. Answers stream
through. A replica that dies takes its running requests with it: their clients see an error, never a cut answer that
looks whole. Ray starts another one, and the rest goes on.
"""

import argparse
import asyncio
from pathlib import Path

from ray import serve

from hetero_attn.server.app import make_app
from hetero_attn.server.driver import State, warmed
from hetero_attn.server.service import Service
from hetero_attn.server.settings import ServerSettings

TINY = str(Path(__file__).resolve().parent / "tiny")


class Replica:
    """An ASGI application that loads its model when it is first asked; `/health` is 503 until it is there."""

    def __init__(self, model: str, **options: object) -> None:
        def load():  # on the driver's thread: importing torch takes seconds
            from hetero_attn import LLM

            return warmed(LLM(model, progress=False, **options))

        self.service = Service(load, ServerSettings())
        self._app, self._is_started = make_app(self.service), False

    async def __call__(self, scope, receive, send) -> None:
        """Answer one request."""
        self.start()
        await self._app(scope, receive, send)

    def start(self) -> None:
        """Start loading, in the loop that answers."""
        if not self._is_started:
            self._is_started = True
            self.service.driver.start(asyncio.get_running_loop())


def deployment(model: str, replicas: int, cpus: float, **options: object) -> serve.Application:
    """The application that Ray Serve runs; options are those of `LLM`."""

    replica: list[Replica] = []

    def build() -> Replica:
        replica.append(Replica(model, **options))
        return replica[-1]

    @serve.deployment(
        num_replicas=replicas,
        max_ongoing_requests=260,  # beyond what a replica computes and lets wait, Ray keeps them
        health_check_period_s=2,
        graceful_shutdown_timeout_s=35,
        ray_actor_options={"num_cpus": cpus},
    )
    @serve.ingress(build)
    class HeteroAttn:
        """One replica."""

        async def check_health(self) -> None:
            """Tell Ray whether to replace this replica."""
            replica[0].start()
            if replica[0].service.driver.state is State.FAILED:
                raise RuntimeError("the model is lost")

    return HeteroAttn.bind()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default=TINY)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each replica")
    given = parser.parse_args()
    serve.start(http_options={"host": "127.0.0.1", "port": given.port})
    limits = {"max_context": given.context, "max_batch": 4, "num_threads": given.threads}
    serve.run(deployment(given.model, given.replicas, given.threads, **limits), name="hetero_attn")
    print(f"{given.replicas} replicas answer on http://localhost:{given.port}/v1", flush=True)
    try:
        while True:
            asyncio.run(asyncio.sleep(3600))
    except KeyboardInterrupt:
        serve.shutdown()
