"""Which request runs next: prompts join and leave a running batch at any step.

A request waits, first come first served, until the pages of its prompt and of the longest answer that it may have can
be reserved, so nothing admitted is ever evicted. Its prompt is computed chunk by chunk, from where it stops being like an
earlier one; then it decodes together with all others at that stage. One prompt is computed at a time, so prompts that
begin alike compute what they share once. How far a request has come is derived from its own tokens at the start of each
step; an interrupted step leaves nothing to undo.
"""

import time
from collections import deque

from hetero_attn.engine.engine import Engine
from hetero_attn.serving.request import Request


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

    @property
    def tokens(self) -> int:
        """Tokens in the cache after the next step: those of every admitted request, and what the step may append."""
        return sum(request.cached_tokens + 1 for request in self._running) + self._engine.prefill_chunk * any(
            request.is_prefilling for request in (*self._running, *self._waiting)
        )

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

    def step(self) -> tuple[Request, ...]:
        """Compute one prompt chunk, or one token of every decoding request; returns the requests that took part.

        A request whose sampling fails ends with its `error` set. Whatever else is raised leaves every request as it was
        before the step, so that the step can be taken again.
        """
        with self._engine.lanes.torch_at_rest():
            return self._step()

    def _step(self) -> tuple[Request, ...]:
        self._admit()
        prefilling = next((request for request in self._running if request.is_prefilling), None)
        active = tuple(self._running) if prefilling is None else (prefilling,)
        if prefilling is not None:
            self._prefill(prefilling)
        else:
            self._decode(active)
        self._retire()
        return active

    def _admit(self) -> None:
        cache = self._engine.kv_cache
        while self._waiting and cache.has_room(self._waiting[0].most_tokens):
            request = self._waiting.popleft()
            request.sequence = cache.open(request.most_tokens)
            self._running.append(request)

    def _prefill(self, request: Request) -> None:
        started = time.perf_counter()
        if request.computed == 0:
            request.computed = request.reused = self._reuse(request)
        request.sequence.length = request.cached_tokens
        chunk = request.prompt_token_ids[request.computed : request.computed + self._engine.prefill_chunk]
        is_last = request.computed + len(chunk) == len(request.prompt_token_ids)
        logits = self._engine.prefill(request.sequence, chunk, logits=is_last)
        request.prefill_s += time.perf_counter() - started
        request.computed += len(chunk)
        if not request.is_prefilling:
            request.choose(logits)
        self._remember(request)

    def _reuse(self, request: Request) -> int:
        """Begin with what is known of the prompt, all but its last token, whose logits are wanted."""
        return self._engine.kv_cache.reuse(request.sequence, request.prompt_token_ids[:-1])

    def _remember(self, request: Request) -> None:
        if request.error is None:
            stored = (*request.prompt_token_ids[: request.computed], *request.token_ids)[: request.cached_tokens]
            self._engine.kv_cache.remember(request.sequence, stored)

    def _decode(self, requests: tuple[Request, ...]) -> None:
        if not requests:
            return
        for request in requests:
            request.sequence.length = request.cached_tokens
        sequences = [request.sequence for request in requests]
        logits = self._engine.decode_step(sequences, [request.token_ids[-1] for request in requests], copy=False)
        for request, row in zip(requests, logits, strict=True):
            request.choose(row)

    def _retire(self) -> None:
        for request in [request for request in self._running if request.finish_reason is not None]:
            self._running.remove(request)
            self._remember(request)
            self._engine.kv_cache.close(request.sequence)
            request.sequence = None
