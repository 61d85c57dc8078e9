"""Which request runs next: prompts join and leave a running batch at any step.

A request waits until a sequence slot is free, has its prompt computed chunk by chunk, and then decodes together with all
others that are at that stage. A slot reserves the whole context, so nothing admitted is ever evicted.
"""

import time
from collections import deque
from dataclasses import dataclass

from hetero_attn.engine import Engine
from hetero_attn.request import Request


@dataclass(frozen=True, slots=True)
class Progress:
    """What one step did: the request and the text that became certain (empty while a prompt is being computed)."""

    request: Request
    text: str


class Scheduler:
    """Drives an engine: `add` requests, call `step` until `has_work` is false, `abort` at any time between steps."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._waiting or self._running)

    def add(self, request: Request) -> None:
        """Queue a request."""
        self._waiting.append(request)

    def abort(self, request: Request) -> None:
        """End a request where it stands; what it generated stays readable. No effect on one that has ended."""
        if request in self._waiting:
            self._waiting.remove(request)
        if request.finish_reason is None:
            request.finish_reason = "abort"
        self._retire()

    def step(self) -> list[Progress]:
        """Compute one prompt chunk, or one token of every decoding request."""
        self._admit()
        prefilling = next((request for request in self._running if request.is_prefilling), None)
        progress = [self._prefill(prefilling)] if prefilling is not None else self._decode()
        self._retire()
        return progress

    def _admit(self) -> None:
        while self._waiting and self._engine.kv_cache.free_slots:
            request = self._waiting.popleft()
            request.sequence = self._engine.kv_cache.open()
            self._running.append(request)

    def _prefill(self, request: Request) -> Progress:
        started = time.perf_counter()
        chunk = request.prompt_token_ids[request.computed : request.computed + self._engine.prefill_chunk]
        logits = self._engine.prefill(request.sequence, chunk)
        request.computed += len(chunk)
        request.prefill_s += time.perf_counter() - started
        if request.is_prefilling:
            return Progress(request, "")
        return Progress(request, request.accept(request.sampler.sample(logits, request.prompt_token_ids, [])))

    def _decode(self) -> list[Progress]:
        requests = list(self._running)
        if not requests:
            return []
        logits = self._engine.decode_step([request.sequence for request in requests], [request.token_ids[-1] for request in requests])
        return [
            Progress(request, request.accept(request.sampler.sample(row, request.prompt_token_ids, request.token_ids)))
            for request, row in zip(requests, logits, strict=True)
        ]

    def _retire(self) -> None:
        for request in [request for request in self._running if request.finish_reason is not None]:
            self._running.remove(request)
            self._engine.kv_cache.close(request.sequence)
            request.sequence = None
