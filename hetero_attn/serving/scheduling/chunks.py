"""Which prompts go on in a step, and how far: as many rows as fit beside those that decode, the first prompt first.

Prompts share a pass unless they begin alike beyond what is stored, so that what they share is computed once. A chunk
that would take longer than CHUNK_S is cut short while anybody else is there. A prompt whose every logit is asked for
takes steps of its own, in turns with the others: rows beside it would change the last bits of its numbers.
"""

from collections.abc import Callable, Iterable, Sequence

from hetero_attn.engine.engine import Engine
from hetero_attn.serving.request import Request
from placement.plan.plan import Plan

CHUNK_S = 1.0
LEAST_CHUNK = 16  # rows; shorter ones cost a pass over the weights each and help nobody

Chunks = dict[Request, tuple[int, ...]]


class PromptChunks:
    """Cuts prompts into chunks, step by step, for one engine. reusable(token_ids): how many tokens of a prompt may be
    taken from the cache."""

    def __init__(self, engine: Engine, reusable: Callable[[Sequence[int]], int]) -> None:
        self._engine, self._reusable = engine, reusable
        self._scoring_is_next = True

    def shared_out(
        self, decoding: tuple[Request, ...], running: Sequence[Request], waiting: int
    ) -> tuple[tuple[Request, ...], Chunks]:
        """Who decodes in a step, and whose prompts go on, each with its next tokens.

        running: the admitted requests, the first first. waiting: how many are not admitted.
        """
        prompts = [request for request in running if request.is_prefilling]
        others = len(running) + waiting > 1
        first = next(iter(prompts), None)
        if first is not None and first.scores is not None and (self._scoring_is_next or not decoding):
            self._scoring_is_next = False
            return (), {first: first.chunk_ids[first.computed : first.computed + self._rows(0, others)]}
        self._scoring_is_next = True
        return decoding, self._chunks(prompts, self._rows(len(decoding), others)) if prompts else {}

    def _chunks(self, prompts: Sequence[Request], rows: int) -> Chunks:
        cache, page_size = self._engine.kv_cache, self._engine.plan.page_size
        chunks, pages = {}, cache.max_new_pages
        for request in [request for request in prompts if request.scores is None]:
            has_rows = rows > 0 and pages != 0
            looks = has_rows or cache.prefix_states  # without rows too, so that others keep the state that it shares
            if looks and not self._waits_for(request, chunks) and has_rows:
                if request.computed == 0:
                    # All but its last token, whose logits are wanted.
                    known = request.chunk_ids[: self._reusable(request.chunk_ids)]
                    request.computed = cache.reuse(request.sequence, known)
                    request.reused = request.reused if request.replayed else request.computed
                most = rows if pages is None else min(rows, pages * page_size)
                chunks[request] = request.chunk_ids[request.computed : request.computed + most]
                rows -= len(chunks[request])
                pages = None if pages is None else pages - cache.new_pages(len(chunks[request]))
        return chunks

    def _waits_for(self, request: Request, chunks: Iterable[Request]) -> bool:
        """Whether a prompt that is not begun yet would compute what one of these is about to store, which then keeps
        the state where they part."""
        cache, page_size = self._engine.kv_cache, self._engine.plan.page_size
        if request.computed or not cache.remembers:
            return False
        own = request.chunk_ids[:-1]
        alike = {other: _alike(own, other.chunk_ids, page_size) for other in chunks}
        most = max(alike, key=lambda other: alike[other], default=None)
        if most is None or alike[most] <= cache.stored(own):
            return False
        return cache.keep_state(most.sequence, alike[most])

    def _rows(self, beside: int, others: bool) -> int:
        """Rows of prompts in the next step: as many as fit, or CHUNK_S where anybody else waits for its end."""
        most = self._engine.chunk_rows(beside)
        return min(most, rows_within(self._engine.plan, CHUNK_S)) if others else most


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


def _alike(first: Sequence[int], second: Sequence[int], page_size: int) -> int:
    """How many tokens two prompts begin with alike, in whole pages."""
    stop = min(len(first), len(second)) // page_size * page_size
    starts = range(0, stop, page_size)  # a page at a time: a loop over tokens took three times as long
    return next((at for at in starts if first[at : at + page_size] != second[at : at + page_size]), stop)
