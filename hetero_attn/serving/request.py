"""One generation in progress, and what a finished one returns."""

import time
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from hetero_attn.cache.pool import SequenceState
from hetero_attn.engine.greatest import LogitsRow
from hetero_attn.errors import HeteroError
from hetero_attn.serving.prompt_scores import PromptScores
from hetero_attn.serving.sampling import SampledToken, Sampler
from hetero_attn.serving.sampling_params import SamplingParams
from hetero_attn.serving.text.text_stream import TextStream
from hetero_attn.speculation.forced import Forced
from hetero_attn.speculation.speculator import FIRST_ALONE, Speculation


@dataclass(frozen=True, slots=True)
class Metrics:
    """How long a request took: counts of tokens, wall seconds of its prefill and of its decoding.

    prefill_s: everything between the call and the first token but the time for which it waited for others: making the
    prompt into tokens (and opening the tokenizer, where that is not done yet), computing it, choosing the token.
    time_to_first_token_s: all of it, as the caller waited; 0 before there is a token.
    cached_prompt_tokens: how many of the prompt's tokens were not computed, because an earlier prompt began alike.
    drafted_tokens, accepted_tokens: computed ahead by speculative decoding, and those of them that are of the answer.
    drafts_reason: why the last pass had as many drafts as it had; empty where nobody drafts.
    forced_tokens: those of the answer that a grammar left no choice for and that shared a pass with the one before.
    """

    prompt_tokens: int
    generated_tokens: int
    prefill_s: float
    decode_s: float
    cached_prompt_tokens: int = 0
    time_to_first_token_s: float = 0.0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    forced_tokens: int = 0
    drafts_reason: str = ""

    @property
    def prefill_tokens_per_s(self) -> float:
        """Computed prompt tokens a second; 0 before the prompt is done."""
        return (self.prompt_tokens - self.cached_prompt_tokens) / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """Generated tokens a second, the first one (which the prefill yields) not counted; 0 with fewer than two."""
        return (self.generated_tokens - 1) / self.decode_s if self.decode_s and self.generated_tokens > 1 else 0.0


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A generation, finished or as far as it has come.

    finish_reason: "stop" (end token, stop id or stop string), "length" (max_tokens or the context), "abort"; None while
    it waits or runs.
    logprobs: one entry a token when asked for, else None.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None
    prompt_token_ids: tuple[int, ...]
    logprobs: tuple[SampledToken, ...] | None
    metrics: Metrics


@dataclass(frozen=True, slots=True)
class Piece:
    """Text as it arrives; `finish_reason` and `metrics` are set on the last piece only."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None = None
    metrics: Metrics | None = None


class Progress(NamedTuple):
    """How far a request has come, as one value: who reads it in the middle of a step sees the step before.

    chars: length of the text. tokens: how many of the request's tokens made it.
    """

    text: str = ""
    chars: int = 0
    tokens: int = 0
    finish_reason: str | None = None


NO_PROGRESS = Progress()


@dataclass(slots=True, eq=False)
class Request:
    """A prompt on its way through the engine.

    max_tokens is already bounded by the context. `computed` counts prompt tokens in the cache, `reused` those
    of them that were there before; `sequence` is None until the request is admitted and after it has ended. stream:
    None for a model without a tokenizer, whose text stays empty. `error` is what ended the request early, if anything
    did.
    priority: higher goes first. arrival: its number in the queue. replayed: how many generated tokens are computed once
    more, after the prompt, because the request was put back. scores: None, or where the logits of the prompt's tokens
    are collected; such a request generates nothing. asked_at: `perf_counter` of the call. may_draft: whether
    somebody drafts for requests; speculation: their drafts, None before the first pass that may have any.
    """

    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    sampler: Sampler
    stream: TextStream | None
    max_tokens: int
    sequence: SequenceState | None = None
    computed: int = 0
    reused: int = 0
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[SampledToken] = field(default_factory=list)
    scores: list[torch.Tensor] | PromptScores | None = None
    priority: int = 0
    arrival: int = -1
    replayed: int = 0
    progress: Progress = NO_PROGRESS
    error: HeteroError | None = None
    asked_at: float = 0.0
    prefill_s: float = 0.0
    first_token_at: float = 0.0
    last_token_at: float = 0.0
    speculation: Speculation | None = None
    may_draft: bool = False
    forced: Forced = field(default_factory=Forced)

    @property
    def text(self) -> str:
        """The text so far, as far as it is certain."""
        return self.progress.text

    @property
    def finish_reason(self) -> str | None:
        """Why the request ended; None while it waits or runs."""
        return self.progress.finish_reason

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the text, if one did."""
        return None if self.stream is None else self.stream.matched

    @property
    def rank(self) -> tuple[int, int]:
        """Who goes first: the smallest."""
        return -self.priority, self.arrival

    @property
    def grows(self) -> bool:
        """Whether pages are taken as the answer grows, because nobody said how long it may get."""
        return self.params.max_tokens is None and self.scores is None

    @property
    def chunk_ids(self) -> tuple[int, ...]:
        """What is computed chunk by chunk: the prompt, and what was generated before the request was put back."""
        return (*self.prompt_token_ids, *self.token_ids[: self.replayed])

    @property
    def is_prefilling(self) -> bool:
        """Whether part of the prompt, or of what is replayed, is still to be computed."""
        return self.computed < len(self.prompt_token_ids) + self.replayed

    @property
    def most_tokens(self) -> int:
        """The most tokens that the prompt and its answer can have."""
        return len(self.prompt_token_ids) + self.max_tokens

    @property
    def reserved_tokens(self) -> int:
        """The tokens that need pages before the request may run."""
        least = len(self.prompt_token_ids) + self.replayed + 1
        return min(self.most_tokens, least) if self.grows else self.most_tokens

    @property
    def cached_tokens(self) -> int:
        """Tokens whose keys and values are stored: what was computed in chunks, and what was decoded but the newest."""
        return self.computed + max(0, len(self.token_ids) - self.replayed - 1)

    def put_back(self) -> None:
        """Begin again with the prompt and all that was generated, in another place of the cache."""
        self.sequence, self.computed, self.replayed = None, 0, len(self.token_ids)
        if self.scores is not None:
            self.scores.clear()

    def choose(self, logits: torch.Tensor | LogitsRow) -> None:
        """Sample the next token from float32 [vocab_size], and end the request if it was the last, or if it cannot be
        sampled or written."""
        try:
            sampled = self.sampler.sample(logits, self.prompt_token_ids, self.token_ids)
            self.last_token_at = time.perf_counter()
            self.first_token_at = self.first_token_at or self.last_token_at
            if self.params.logprobs is not None:
                self.logprobs.append(sampled)
            self.token_ids.append(sampled.token_id)
            self._advance_text(sampled.token_id)
        except HeteroError as error:
            self.end("abort", error)

    def end(self, finish_reason: str, error: HeteroError | None = None) -> None:
        """End the request where it stands; no effect if it has ended."""
        if self.finish_reason is None:
            self.error = error
            self.progress = self.progress._replace(finish_reason=finish_reason)

    def recover(self) -> None:
        """Undo what a step did that was interrupted half-way: only what `progress` counts has happened."""
        del self.token_ids[self.progress.tokens :], self.logprobs[self.progress.tokens :]
        if self.scores is not None:
            self.computed = sum(map(len, self.scores))
        elif len(self.token_ids) == self.replayed:
            self.computed = min(self.computed, len(self.chunk_ids) - 1)

    def _advance_text(self, token_id: int) -> None:
        """Count the newest token. An interruption leaves the text and its stream as they were, or both are new."""
        is_end = token_id in self.sampler.stop_token_ids and len(self.token_ids) > self.params.min_tokens
        text, finish_reason, has_stop_string = self.text, None, False
        stream = None if self.stream is None else self.stream.copy()
        if stream is not None and not is_end:
            piece, has_stop_string = stream.push(token_id)
            text += piece
        if is_end or has_stop_string:
            finish_reason = "stop"
        elif len(self.token_ids) >= self.max_tokens:
            finish_reason = "length"
        if finish_reason is not None and stream is not None:
            text += stream.finish()
        progress = Progress(text, len(text), len(self.token_ids), finish_reason)
        self.stream, self.progress = stream, progress

    @property
    def metrics(self) -> Metrics:
        """What the request has cost so far."""
        decode_s = self.last_token_at - self.first_token_at
        first_s = self.first_token_at - self.asked_at if self.first_token_at else 0.0
        counts, spec = (len(self.prompt_token_ids), self.progress.tokens), self.speculation
        drafts = (0, 0) if spec is None else (spec.drafted, spec.accepted)
        alone = FIRST_ALONE if self.may_draft and self.progress.finish_reason is not None else ""
        reason = alone if spec is None else spec.reason
        return Metrics(*counts, self.prefill_s, decode_s, self.reused, first_s, *drafts, self.forced.right, reason)

    def output(self) -> RequestOutput:
        """The generation as far as it has come; raises `error` if that is what ended it."""
        progress = self.progress
        if self.error is not None:
            raise self.error
        return RequestOutput(
            text=progress.text,
            token_ids=tuple(self.token_ids[: progress.tokens]),
            finish_reason=progress.finish_reason,
            prompt_token_ids=self.prompt_token_ids,
            logprobs=None if self.params.logprobs is None else tuple(self.logprobs[: progress.tokens]),
            metrics=self.metrics,
        )
