"""One generation in progress, and what a finished one returns."""

import time
from dataclasses import dataclass, field

from hetero_attn.kv_cache import SequenceState
from hetero_attn.sampling import SampledToken, Sampler, SamplingParams
from hetero_attn.tokenizer import TextStream


@dataclass(frozen=True, slots=True)
class Metrics:
    """How long a request took: counts of tokens, wall seconds of its prefill and of its decoding."""

    prompt_tokens: int
    generated_tokens: int
    prefill_s: float
    decode_s: float

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens a second; 0 before the prompt is done."""
        return self.prompt_tokens / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """Generated tokens a second, the first one (which the prefill yields) not counted; 0 with fewer than two."""
        return (self.generated_tokens - 1) / self.decode_s if self.decode_s and self.generated_tokens > 1 else 0.0


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A finished generation.

    finish_reason: "stop" (end token, stop id or stop string), "length" (max_tokens or the context), "abort".
    logprobs: one entry a token when asked for, else None.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
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


@dataclass(slots=True)
class Request:
    """A prompt on its way through the engine.

    max_tokens is already bounded by the context. `computed` counts prompt tokens in the cache; `sequence` is None until the
    request is admitted and after it has ended.
    """

    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    sampler: Sampler
    stream: TextStream
    max_tokens: int
    sequence: SequenceState | None = None
    computed: int = 0
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[SampledToken] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    prefill_s: float = 0.0
    first_token_at: float = 0.0
    ended_at: float = 0.0

    @property
    def is_prefilling(self) -> bool:
        """Whether part of the prompt is still to be computed."""
        return self.computed < len(self.prompt_token_ids)

    def accept(self, sampled: SampledToken) -> str:
        """Take the next token; returns the text that became certain, and sets `finish_reason` when it was the last."""
        self.token_ids.append(sampled.token_id)
        if self.params.logprobs is not None:
            self.logprobs.append(sampled)
        now = time.perf_counter()
        if len(self.token_ids) == 1:
            self.first_token_at = now
        self.ended_at = now
        return self._advance_text(sampled.token_id)

    def _advance_text(self, token_id: int) -> str:
        if token_id in self.sampler.stop_token_ids and len(self.token_ids) > self.params.min_tokens:
            return self._end("stop", self.stream.finish())
        piece, stopped = self.stream.push(token_id)
        if stopped:
            return self._end("stop", piece)
        if len(self.token_ids) >= self.max_tokens:
            return self._end("length", piece + self.stream.finish())
        self.text += piece
        return piece

    def _end(self, reason: str, piece: str) -> str:
        self.text += piece
        self.finish_reason = reason
        return piece

    @property
    def metrics(self) -> Metrics:
        """What the request has cost so far."""
        decode_s = max(0.0, self.ended_at - self.first_token_at)
        return Metrics(len(self.prompt_token_ids), len(self.token_ids), self.prefill_s, decode_s)

    def output(self) -> RequestOutput:
        """The finished generation."""
        return RequestOutput(
            text=self.text,
            token_ids=tuple(self.token_ids),
            finish_reason=self.finish_reason or "abort",
            prompt_token_ids=self.prompt_token_ids,
            logprobs=tuple(self.logprobs) if self.params.logprobs is not None else None,
            metrics=self.metrics,
        )
