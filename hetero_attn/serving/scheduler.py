"""Which request runs next: prompts join and leave a running batch at any step.

A request waits, by priority and then first come first served, until it can have the pages it needs: those of its prompt
and of the longest answer that it may have, or, where nobody said how long that is, of its prompt and one token. Such a
request takes pages as it grows. When they run out, the youngest of the lowest priority is put back into the queue; it
resumes by computing its prompt and its answer so far again, from where the prefix cache ends. The oldest always goes
on.

A prompt is computed chunk by chunk, from where it stops being like an earlier one, one prompt at a time, so that
prompts that begin alike compute what they share once. While others decode, chunks and their tokens take turns, and a
chunk that would take longer than CHUNK_S is cut short while anybody waits for it. How far a request has come is derived
from its own tokens at the start of each step; an interrupted step leaves nothing to undo.
"""

import time
from bisect import insort
from itertools import count

from hetero_attn.engine.engine import Engine
from hetero_attn.errors import HeteroError
from hetero_attn.serving.request import Request
from placement.plan.plan import Plan

CHUNK_S = 1.0
LEAST_CHUNK = 16  # rows; shorter ones cost a pass over the weights each and help nobody


class Scheduler:
    """Drives an engine: `add` requests, call `step` until `has_work` is false, `abort` at any time between steps."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._waiting: list[Request] = []
        self._running: list[Request] = []
        self._arrivals = count()
        self._chunk_is_next = True

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
            request.arrival = next(self._arrivals)
            insort(self._waiting, request, key=_rank)

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

        Where some decode and a prompt is to be computed, two steps are one of each.

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
        active = () if self._chunk_is_next and self._prompts else self._with_pages()
        if active:
            self._chunk_is_next = True
            self._decode(active)
        else:
            self._chunk_is_next = False
            self._admit()
            active = self._prompts[:1]
            for request in active:
                self._prefill(request)
        self._retire()
        return active

    def _admit(self) -> None:
        cache = self._engine.kv_cache
        while self._waiting and (cache.has_room(self._wanted_tokens(self._waiting[0])) or not self._running):
            request = self._waiting[0]
            request.sequence = cache.open(request.reserved_tokens)
            insort(self._running, request, key=_rank)
            self._waiting.pop(0)

    def _wanted_tokens(self, request: Request) -> int:
        """What must be free before a request joins others: one that grows leaves each of them a page to grow into."""
        room = self._engine.plan.page_size * len(self._running) if request.grows else 0
        return min(request.reserved_tokens + room, self._engine.plan.max_context)

    @property
    def _prompts(self) -> tuple[Request, ...]:
        """Who is still computed chunk by chunk, the first first."""
        return tuple(request for request in self._running if request.is_prefilling)

    def _with_pages(self) -> tuple[Request, ...]:
        """Those that decode and have a page for their next token, the first of them at any other's cost."""
        ready = []
        for request in [request for request in self._running if not request.is_prefilling]:
            while request.sequence is not None and not self._has_page(request):
                self._put_back(self._running[-1])
            if request.sequence is not None:
                ready.append(request)
        return tuple(ready)

    def _has_page(self, request: Request) -> bool:
        return not request.grows or self._engine.kv_cache.extend(request.sequence, request.cached_tokens + 1)

    def _put_back(self, request: Request) -> None:
        self._remember(request)
        self._engine.kv_cache.close(request.sequence)
        self._running.remove(request)
        request.put_back()
        insort(self._waiting, request, key=_rank)

    def _prefill(self, request: Request) -> None:
        started = time.perf_counter()
        if request.computed == 0 and request.scores is None:
            request.computed = self._reuse(request)
            request.reused = request.reused if request.replayed else request.computed
        request.sequence.length = request.cached_tokens
        token_ids = request.chunk_ids
        chunk = token_ids[request.computed : request.computed + self._chunk_rows()]
        stop = request.computed + len(chunk)
        is_last = stop == len(token_ids)
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

    def _chunk_rows(self) -> int:
        """Rows of the next chunk: as many as fit a step, or CHUNK_S where anybody else waits for its end."""
        most = self._engine.prefill_chunk
        return (
            min(most, rows_within(self._engine.plan, CHUNK_S)) if len(self._running) + len(self._waiting) > 1 else most
        )

    def _reuse(self, request: Request) -> int:
        """Begin with what is known of the prompt, all but its last token, whose logits are wanted."""
        return self._engine.kv_cache.reuse(request.sequence, request.chunk_ids[:-1])

    def _remember(self, request: Request) -> None:
        if request.error is None:
            stored = (*request.prompt_token_ids, *request.token_ids)[: request.cached_tokens]
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


def rows_within(plan: Plan, seconds: float) -> int:
    """Prompt rows that a plan is expected to compute in so many seconds; all of a chunk where shorter is no faster.

    A pass costs its weights' way whatever it computes, as one row's time shows; only what rows add can be saved.
    """
    if plan.predicted is None:
        return plan.prefill_chunk
    one_s, rows = plan.predicted.decode.seconds, min(plan.prefill_chunk, plan.predicted.prefill.rows)
    chunk_s = plan.predicted.prefill.seconds * rows / plan.predicted.prefill.rows
    if chunk_s <= seconds or one_s >= seconds or chunk_s <= one_s:
        return plan.prefill_chunk
    return max(LEAST_CHUNK, int(rows * (seconds - one_s) / (chunk_s - one_s)))


def _rank(request: Request) -> tuple[int, int]:
    return request.rank
