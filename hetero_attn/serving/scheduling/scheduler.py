"""Which request runs next: prompts join and leave a running batch at any step.

A request waits, by priority and then first come first served, until it can have the pages it needs: those of its prompt
and of the longest answer that it may have, or, where nobody said how long that is, of its prompt and one token. Such a
request takes pages as it grows. When they run out, the youngest of the lowest priority is put back into the queue; it
resumes by computing its prompt and its answer so far again, from where the prefix cache ends. The oldest always goes
on.

A step is one pass: a token of every request that decodes, and beside them as many rows of prompts as fit. A prompt is
computed chunk by chunk, from where it stops being like an earlier one; prompts share a pass unless they begin alike
beyond what is stored, so that what they share is computed once. A chunk that would take longer than CHUNK_S is cut
short while anybody else is there. A prompt whose every logit is asked for takes turns with all that. How far a request
has come is derived from its own tokens at the start of each step; an interrupted step leaves nothing to undo. In a step
without prompts a request may bring drafts of its next tokens along, guessed or forced by a grammar, see
hetero_attn/speculation.
"""

import time
from bisect import insort
from collections.abc import Sequence
from itertools import count
from operator import attrgetter

import torch

from hetero_attn.engine.engine import Engine
from hetero_attn.engine.greatest import LogitsRows
from hetero_attn.errors import HeteroError
from hetero_attn.ops.step_rows import Rows
from hetero_attn.serving.request import Request
from hetero_attn.serving.scheduling.chunks import Chunks, PromptChunks
from hetero_attn.speculation.forced import forced_drafts
from hetero_attn.speculation.speculator import Speculator
from hetero_attn.speculation.width import WIDTHS

_rank = attrgetter("rank")


class Scheduler:
    """Drives an engine: `add` requests, call `step` until `has_work` is false, `abort` at any time between steps.

    speculator: who drafts, None for nobody; may be another one from the next request on.
    """

    def __init__(self, engine: Engine, speculator: Speculator | None = None) -> None:
        self._engine = engine
        self.speculator = speculator
        self._waiting: list[Request] = []
        self._running: list[Request] = []
        self._arrivals = count()
        self._chunks, self._rows = PromptChunks(engine, self._reusable), LogitsRows()
        self._begun: tuple[Request, ...] = ()  # of a step that has not ended, where sequences have states

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
        drafts = self.speculator is not None or any(request.sampler.has_grammar for request in self._running)
        new = WIDTHS[-1] if drafts else 1
        return sum(request.cached_tokens + new for request in self._running) + self._engine.prefill_chunk * any(
            request.is_prefilling for request in (*self._running, *self._waiting)
        )

    def add(self, request: Request) -> None:
        """Queue a request; no effect on one that is here or has ended."""
        if request.finish_reason is None and request not in self._waiting and request not in self._running:
            request.arrival, request.may_draft = next(self._arrivals), self.speculator is not None
            insort(self._waiting, request, key=_rank)

    def abort(self, request: Request, error: HeteroError | None = None) -> None:
        """End a request where it stands; what it generated stays readable.

        No effect on one that has ended or was never queued here: another engine may be in the middle of its step.
        """
        if request in self._waiting or request in self._running:
            request.end("abort", error)
            self._retire()

    def abort_all(self, error: HeteroError) -> None:
        """End every request with an error."""
        for request in (*self._waiting, *self._running):
            self.abort(request, error)

    def close(self) -> None:
        """Release what drafts; idempotent."""
        if self.speculator is not None:
            self.speculator.close()

    def step(self) -> tuple[Request, ...]:
        """Compute one token of every decoding request, and prompts' next rows; returns the requests that took part.

        A request whose sampling fails ends with its `error` set. Whatever else is raised leaves every request as it was
        before the step, so that the step can be taken again.
        """
        with self._engine.lanes.torch_at_rest():
            return self._step()

    def _step(self) -> tuple[Request, ...]:
        self._retire()
        for request in self._running:
            request.recover()
        self._begin_anew()
        decoding = self._with_pages()
        self._admit()
        decoding, chunks = self._chunks.shared_out(decoding, self._running, len(self._waiting))
        for request in (*decoding, *chunks):
            self._settle(request)
        self._begun = tuple(self._running) if self._engine.kv_cache.states else ()
        reads = self.speculator is not None and self.speculator.reads
        before = {request: request.cached_tokens for request in (*decoding, *chunks)} if reads else {}
        if chunks:
            self._compute(decoding, chunks)
        elif decoding:
            self._decode(decoding)
        self._begun = ()
        self._follow(before)
        self._retire()
        return (*decoding, *chunks)

    def _follow(self, before: dict[Request, int]) -> None:
        """Show a head that drafts what a step computed, of requests that go on. before: tokens that each had."""
        for request, position in before.items():
            rows = request.cached_tokens - position
            if rows > 0 and request.finish_reason is None and request.scores is None:
                self.speculator.follow(request, position, self._engine.kept(request.sequence, rows))

    def _reusable(self, token_ids: Sequence[int]) -> int:
        """How many tokens of a prompt may be taken from the cache: all but the last one, whose logits are wanted."""
        if self.speculator is None or not self.speculator.reads:
            return len(token_ids) - 1
        return self.speculator.reusable(token_ids, self._engine.kv_cache.stored(token_ids[:-1]))

    def _begin_anew(self) -> None:
        """Put back those who were there in a step that did not end: their states have taken in what it computed, or
        drafts of the step before, or a part of that, and cannot go back."""
        for request in [each for each in self._begun if each in self._running]:
            self._put_back(request)
        self._begun = ()

    def _admit(self) -> None:
        cache = self._engine.kv_cache
        while self._waiting and (cache.has_room(self._wanted_tokens(self._waiting[0])) or not self._running):
            request = self._waiting[0]
            request.sequence = cache.open(request.reserved_tokens)
            insort(self._running, request, key=_rank)
            del self._waiting[0]
            request.sampler.begin()

    def _wanted_tokens(self, request: Request) -> int:
        """What must be free before a request joins others: one that grows leaves each of them a page to grow into."""
        room = self._engine.plan.page_size * len(self._running) if request.grows else 0
        return min(request.reserved_tokens + room, self._engine.plan.max_context)

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
        self._let_go(request)
        self._remember(request)
        self._engine.kv_cache.close(request.sequence)
        self._running.remove(request)
        request.put_back()
        insort(self._waiting, request, key=_rank)

    def _compute(self, decoding: tuple[Request, ...], chunks: Chunks) -> None:
        """One pass of prompts' rows and of those that decode."""
        started = time.perf_counter()
        work = [Rows(request.sequence, request.token_ids[-1:]) for request in decoding]
        for request, token_ids in chunks.items():
            is_last = request.computed + len(token_ids) == len(request.chunk_ids)
            wanted = int(is_last) if request.scores is None else len(token_ids)
            work.append(Rows(request.sequence, token_ids, wanted, is_chunk=True))
        logits = iter(self._engine.run(work, copy=False))
        for request in decoding:
            request.choose(next(logits)[0])
        for request, token_ids in chunks.items():
            self._computed(request, len(token_ids), next(logits))
            request.prefill_s += time.perf_counter() - started
            self._remember(request)

    def _computed(self, request: Request, rows: int, logits: torch.Tensor) -> None:
        """Count a chunk, and choose the first token behind the last one."""
        if request.scores is not None:
            request.scores.append(logits.clone())
        request.computed += rows
        if request.is_prefilling:
            return
        if request.scores is None:
            request.choose(logits[0])
        else:
            request.end("length")

    def _remember(self, request: Request) -> None:
        if request.error is None:
            stored = (*request.prompt_token_ids, *request.token_ids)[: request.cached_tokens]
            self._engine.kv_cache.remember(request.sequence, stored)

    def _settle(self, request: Request) -> None:
        """Let a sequence hold what the request counts: a step that was interrupted, or drafts, went further."""
        sequence, stored = request.sequence, request.cached_tokens
        if sequence.length <= stored or not self._engine.kv_cache.rewind(sequence, stored):
            sequence.length = stored

    def _decode(self, requests: tuple[Request, ...]) -> None:
        if self.speculator is None and not any(request.sampler.has_grammar for request in requests):
            return self._decode_plainly(requests)
        started, drafts = time.perf_counter(), self._drafts(requests)
        for request in [each for each, drafted in zip(requests, drafts, strict=True) if not drafted]:
            request.sampler.prepare(request.token_ids)
        if any(drafts):
            self._verify(requests, drafts)
        else:
            self._decode_plainly(requests)
        if self.speculator is not None:
            self.speculator.costs.observe(len(requests) + sum(map(len, drafts)), time.perf_counter() - started)

    def _drafts(self, requests: tuple[Request, ...]) -> list[list[int]]:
        """What each request's next tokens may be, or have to be; none without pages for them."""
        cache, pages = self._engine.kv_cache, 0
        most_rows = self._engine.most_single_rows if cache.takes_back else len(requests)
        drafts = forced_drafts(requests, most_rows)
        if self.speculator is not None:
            drafts = self.speculator.drafts(requests, most_rows, drafts)
        for request, drafted in [pair for pair in zip(requests, drafts, strict=True) if pair[1]]:
            begun = pages + cache.new_pages(1 + len(drafted))
            fits = cache.max_new_pages is None or begun <= cache.max_new_pages
            tokens = request.cached_tokens + 1 + len(drafted)
            if fits and (not request.grows or cache.extend(request.sequence, tokens)):
                pages = begun
            else:
                drafted.clear()
                request.forced.offered = 0
        return drafts

    def _verify(self, requests: tuple[Request, ...], drafts: list[list[int]]) -> None:
        """One pass of every request's newest token and its drafts behind it."""
        pairs = list(zip(requests, drafts, strict=True))
        work = [Rows(each.sequence, [each.token_ids[-1], *drafted], 1 + len(drafted)) for each, drafted in pairs]
        for (request, drafted), logits in zip(pairs, self._engine.run(work, copy=False), strict=True):
            accepted = _choose_while_right(request, drafted, logits)
            self._settle(request)
            if request.forced.offered:
                request.forced.judge(accepted)
                self._engine.report.forced(len(drafted), accepted)
            elif drafted:
                self.speculator.judge(request, len(drafted), accepted)

    def _decode_plainly(self, requests: tuple[Request, ...]) -> None:
        sequences = [request.sequence for request in requests]
        logits = self._engine.decode_step(sequences, [request.token_ids[-1] for request in requests], copy=False)
        for request, row in zip(requests, self._rows.of(logits), strict=True):
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
            self._let_go(request)
            self._running.remove(request)

    def _let_go(self, request: Request) -> None:
        request.sampler.let_go()
        if self.speculator is not None:
            self.speculator.forget(request)


def _choose_while_right(request: Request, drafts: Sequence[int], logits: torch.Tensor) -> int:
    """Draw a token from every row as passes of one row would, as long as the drafts say the same; returns how many did.

    logits: float32 [1 + len(drafts), vocab_size].
    """
    for accepted, (row, draft) in enumerate(zip(logits, (*drafts, None), strict=True)):
        request.choose(row)
        if request.finish_reason is not None or request.token_ids[-1] != draft:
            return accepted
    raise AssertionError("no token is None")
