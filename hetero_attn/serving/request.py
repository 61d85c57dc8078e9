"""One generation in progress, and what a finished one returns."""

import time
from dataclasses import dataclass, field

import torch

from hetero_attn.cache.pool import SequenceState
from hetero_attn.errors import HeteroError
from hetero_attn.serving.sampling import SampledToken, Sampler
from hetero_attn.serving.sampling_params import SamplingParams
from hetero_attn.serving.tokenizer import TextStream


@dataclass(frozen=True, slots=True)
class Metrics:
    """How long a request took: counts of tokens, wall seconds of its prefill and of its decoding.

    cached_prompt_tokens: how many of the prompt's tokens were not computed, because an earlier prompt began alike.
    """

    prompt_tokens: int
    generated_tokens: int
    prefill_s: float
    decode_s: float
    cached_prompt_tokens: int = 0

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


@dataclass(slots=True, eq=False)
class Request:
    """A prompt on its way through the engine.

    max_tokens is already bounded by the context. `computed` counts prompt tokens in the cache, `reused` those
    of them that were there before; `sequence` is None until the request is admitted and after it has ended. stream:
    None for a model without a tokenizer, whose text stays empty. `error` is what ended the request early, if anything did.
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
    text: str = ""
    finish_reason: str | None = None
    error: HeteroError | None = None
    prefill_s: float = 0.0
    first_token_at: float = 0.0
    last_token_at: float = 0.0

    @property
    def is_prefilling(self) -> bool:
        """Whether part of the prompt is still to be computed."""
        return self.computed < len(self.prompt_token_ids)

    @property
    def most_tokens(self) -> int:
        """The most tokens that the prompt and its answer can have."""
        return len(self.prompt_token_ids) + self.max_tokens

    @property
    def cached_tokens(self) -> int:
        """Tokens whose keys and values are stored: the computed prompt, and all generated tokens but the newest."""
        return self.computed + max(0, len(self.token_ids) - 1)

    def choose(self, logits: torch.Tensor) -> None:
        """Sample the next token from float32 [vocab_size], and end the request if it was the last."""
        try:
            sampled = self.sampler.sample(logits, self.prompt_token_ids, self.token_ids)
        except HeteroError as error:
            self.error, self.finish_reason = error, "abort"
            return
        self.last_token_at = time.perf_counter()
        self.first_token_at = self.first_token_at or self.last_token_at
        if self.params.logprobs is not None:
            self.logprobs.append(sampled)
        self.token_ids.append(sampled.token_id)
        self._advance_text(sampled.token_id)

    def _advance_text(self, token_id: int) -> None:
        is_end = token_id in self.sampler.stop_token_ids and len(self.token_ids) > self.params.min_tokens
        has_stop_string = False
        if self.stream is not None and not is_end:
            piece, has_stop_string = self.stream.push(token_id)
            self.text += piece
        if is_end or has_stop_string:
            self.finish_reason = "stop"
        elif len(self.token_ids) >= self.max_tokens:
            self.finish_reason = "length"
        if self.finish_reason is not None and self.stream is not None:
            self.text += self.stream.finish()

    @property
    def metrics(self) -> Metrics:
        """What the request has cost so far."""
        decode_s = self.last_token_at - self.first_token_at
        return Metrics(len(self.prompt_token_ids), len(self.token_ids), self.prefill_s, decode_s, self.reused)

    def output(self) -> RequestOutput:
        """The finished generation; raises `error` if that is what ended it."""
        if self.error is not None:
            raise self.error
        return RequestOutput(
            text=self.text,
            token_ids=tuple(self.token_ids),
            finish_reason=self.finish_reason or "abort",
            prompt_token_ids=self.prompt_token_ids,
            logprobs=tuple(self.logprobs) if self.params.logprobs is not None else None,
            metrics=self.metrics,
        )
