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
from hetero_attn.errors import HeteroError
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
    def waiting(self) -> int:
        """Requests that wait for a place."""
        return len(self._waiting)

    @property
    def tokens(self) -> int:
        """Tokens in the cache after the next step: those of every admitted request, and what the step may append."""
        return sum(request.cached_tokens + 1 for request in self._running) + self._engine.prefill_chunk * any(
            request.is_prefilling for request in (*self._running, *self._waiting)
        )

    def add(self, request: Request) -> None:
        """Queue a request; no effect on one that is here or has ended."""
        if request.finish_reason is None and request not in self._waiting and request not in self._running:
            self._waiting.append(request)

    def abort(self, request: Request, error: HeteroError | None = None) -> None:
        """End a request where it stands; what it generated stays readable. No effect on one that has ended."""
        request.end("abort", error)
        self._retire()

    def abort_all(self, error: HeteroError) -> None:
        """End every request with an error."""
        for request in (*self._waiting, *self._running):
            self.abort(request, error)

    def step(self) -> tuple[Request, ...]:
        """Compute one prompt chunk, or one token of every decoding request; returns the requests that took part.

        A request whose sampling fails ends with its `error` set. Whatever else is raised leaves every request as it was
        before the step, so that the step can be taken again.
        """
        with self._engine.lanes.torch_at_rest():
            return self._step()

    def _step(self) -> tuple[Request, ...]:
        self._retire()
        for request in self._running:
            request.recover()
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
        while self._waiting and (cache.has_room(self._waiting[0].most_tokens) or not self._running):
            request = self._waiting[0]
            if request not in self._running:
                request.sequence = request.sequence or cache.open(request.most_tokens)
                self._running.append(request)
            self._waiting.popleft()

    def _prefill(self, request: Request) -> None:
        started = time.perf_counter()
        if request.computed == 0 and request.scores is None:
            request.computed = request.reused = self._reuse(request)
        request.sequence.length = request.cached_tokens
        chunk = request.prompt_token_ids[request.computed : request.computed + self._engine.prefill_chunk]
        stop = request.computed + len(chunk)
        is_last = stop == len(request.prompt_token_ids)
        if request.scores is None:
            logits = self._engine.prefill(request.sequence, chunk, logits=is_last)
        else:
            request.scores.append(self._engine.prefill_logits(request.sequence, chunk))
        request.computed = stop
        if is_last and request.scores is None:
            request.choose(logits)
        elif is_last:
            request.end("length")
        request.prefill_s += time.perf_counter() - started
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
        """Let go of what has ended, each of them whole before the next."""
        for request in [request for request in self._waiting if request.finish_reason is not None]:
            self._waiting.remove(request)
        for request in [request for request in self._running if request.finish_reason is not None]:
            if request.sequence is not None:
                self._remember(request)
                self._engine.kv_cache.close(request.sequence)
                request.sequence = None
            self._running.remove(request)
