"""Choose the next token of one request from its logits.

`SamplingParams` (re-exported here) says how; `Sampler` does it for one request and owns that request's random
generator. Nothing here knows of models, batches or text: `stop` strings and `max_tokens` are for whoever runs the loop.

The order of operations is vLLM's:

    logit_bias -> min_tokens mask -> repetition, frequency, presence penalty -> grammar -> (greedy: argmax)
    -> temperature -> min_p -> top_k -> top_p -> draw

Log-probabilities that are reported are the model's own, of the logits before any of this.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from hetero_attn.engine.greatest import LogitsRow, greatest, greatest_with_value
from hetero_attn.errors import NonFiniteLogitsError, SamplingError
from hetero_attn.serving.draws.likely import likely_tokens, pick
from hetero_attn.serving.draws.token_mask import TokenMask
from hetero_attn.serving.draws.unmasked import first_draw, second_draw
from hetero_attn.serving.sampling_params import SamplingParams

__all__ = ["SampledToken", "Sampler", "SamplingParams", "score_token"]


FEW = 4  # Where a grammar leaves less than one token in so many, a draw goes over these alone.


class SampledToken(NamedTuple):
    """One chosen token.

    Attributes:
        token_id: index into the vocabulary.
        logprob: natural log of the model's probability of the token; None unless `SamplingParams.logprobs` asks for it.
        top_logprobs: `(token id, logprob)` of the most likely tokens, best first; empty unless asked for.
    """

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Choose the tokens of one request, one call per token. Not thread-safe: it owns the request's random generator.

    A draw takes one number from a generator on the CPU, two where a grammar refuses what the first one drew, whatever
    device holds the logits, so a seed gives the same tokens everywhere.

    Attributes:
        params: the parameters it was made with.
        stop_token_ids: the tokens that end the request: `params.stop_token_ids`, and the model's unless `ignore_eos`.
    """

    def __init__(
        self,
        params: SamplingParams,
        eos_token_ids: Sequence[int],
        vocab_size: int,
        default_seed: int | None = None,
        token_mask: TokenMask | None = None,
    ) -> None:
        """Make the sampler of one request.

        Args:
            params: how to choose.
            eos_token_ids: the model's end tokens; those outside the vocabulary can never come up and are dropped.
            vocab_size: length of the logits.
            default_seed: seed for when `params.seed` is None or -1; None draws a fresh one. Give each request of a
                batch its own, or all of them make the same draws.
            token_mask: what the grammar of `params` allows, where there is one.

        Raises:
            SamplingError: a stop token or a biased token is outside the vocabulary.
        """
        self.params = params
        self._vocab_size, self._token_mask = vocab_size, token_mask
        self._needs_mask = False  # of the whole vocabulary, for the token before
        self._check_token_ids("stop_token_ids", params.stop_token_ids)
        self._check_token_ids("logit_bias", [token_id for token_id, _ in params.logit_bias])
        eos = {token_id for token_id in eos_token_ids if 0 <= token_id < vocab_size}
        self.stop_token_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else eos)
        self._masked_token_ids = sorted(eos.union(params.stop_token_ids))
        self._prompt_mask: torch.Tensor | None = None
        self._repetition = params.repetition_penalty != 1.0
        self._output_penalty = params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
        self._adjusts = bool(params.logit_bias or params.min_tokens or self._repetition or self._output_penalty)
        self._generator = torch.Generator()
        seed = default_seed if params.seed in (None, -1) else params.seed
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)

    def sample(
        self, logits: torch.Tensor | LogitsRow, prompt_ids: Sequence[int], generated_ids: Sequence[int]
    ) -> SampledToken:
        """Choose the next token.

        Args:
            logits: float32 [vocab_size], any device; left as it is.
            prompt_ids: the prompt, the same in every call.
            generated_ids: the tokens chosen so far.

        Returns:
            The token, with log-probabilities where `params.logprobs` asks for them.

        Raises:
            NonFiniteLogitsError: the logits hold a NaN or +inf, or are -inf throughout.
            SamplingError: `min_tokens` masks all that the model or the grammar allows, the grammar cannot be followed
                further, or a penalty takes a logit beyond float32.
        """
        row = LogitsRow.of(logits) if isinstance(logits, torch.Tensor) else logits
        logits = row.values
        assert row.numbers.shape == (self._vocab_size,), f"logits {row.numbers.shape}, vocabulary of {self._vocab_size}"
        best, value = greatest_with_value(row)
        # A NaN counts as the largest value, so the value that it points to tells of any NaN.
        self._check_finite(value, len(generated_ids))
        adjusted = self._adjust(logits, prompt_ids, generated_ids) if self._adjusts else logits
        if adjusted is not logits:
            best, value = greatest_with_value(LogitsRow.of(adjusted))
            self._check_allowed(value, len(generated_ids))
        if self._token_mask is not None and self._token_mask.holds(generated_ids):
            token_id = self._choose_allowed(adjusted, best, generated_ids)
        elif self.params.greedy:
            token_id = best
        else:
            token_id = pick(*likely_tokens(adjusted, self.params), self._number())
        if self.params.logprobs is None:
            return SampledToken(token_id)
        return score_token(logits, token_id, self.params.logprobs)

    @property
    def has_grammar(self) -> bool:
        """Whether tokens have to follow a grammar."""
        return self._token_mask is not None

    def begin(self) -> None:
        """Have what the grammar needs made ready, where there is one: its request has got its place."""
        if self._token_mask is not None:
            self._token_mask.begin()

    def let_go(self) -> None:
        """Hold nothing of the grammar's, until the next token or `begin`: its request has lost its place."""
        if self._token_mask is not None:
            self._token_mask.let_go()

    def prepare(self, generated_ids: Sequence[int]) -> None:
        """Begin to work out what the grammar allows behind these, before the logits are there; where that is likely to
        be asked for, as it was for the token before."""
        if self._token_mask is not None and self._needs_mask:
            self._token_mask.prepare(generated_ids)

    def forced(self, generated_ids: Sequence[int]) -> list[int]:
        """Tokens that the grammar forces behind these, in the tokenizer's way of writing them; mostly none."""
        return [] if self._token_mask is None else self._token_mask.forced(generated_ids)

    def _check_token_ids(self, name: str, token_ids: Sequence[int]) -> None:
        for token_id in token_ids:
            if token_id >= self._vocab_size:
                raise SamplingError(
                    f"{name} names token {token_id}, the vocabulary ends at {self._vocab_size - 1}", name
                )

    def _check_finite(self, largest: float, position: int) -> None:
        if not math.isfinite(largest):
            raise NonFiniteLogitsError(
                f"the largest logit of output position {position} is {largest}, expected a finite number; look for "
                "damaged weights, or an activation that overflows in this dtype"
            )

    def _check_allowed(self, largest: float, position: int) -> None:
        if largest == -math.inf:
            raise SamplingError(
                f"no token is allowed at output position {position}: the model, or the grammar, leaves "
                f"only end tokens, which min_tokens={self.params.min_tokens} masks; lower min_tokens",
                "min_tokens",
            )
        if not math.isfinite(largest):
            raise SamplingError(
                f"repetition_penalty={self.params.repetition_penalty:g} takes a logit to {largest}, beyond float32; "
                "choose a value nearer 1",
                "repetition_penalty",
            )

    def _choose_allowed(self, logits: torch.Tensor, best: int, generated_ids: Sequence[int]) -> int:
        """Choose among what the grammar allows, all of which is found out only where asking about few does not do."""
        mask, params = self._token_mask, self.params
        first = first_draw(logits, best, params, partial(mask.which, generated_ids), self._number)
        self._needs_mask = first.token_id is None
        if first.token_id is not None:
            return first.token_id
        left, best, token_ids = _leave(mask.allowed(generated_ids), logits, best)
        self._check_allowed(float(left[best]) if len(left) else -math.inf, len(generated_ids))
        if params.greedy:
            return best if token_ids is None else int(token_ids[best])
        kept, weights = likely_tokens(left, params, breaks_ties=True)
        return second_draw(kept if token_ids is None else token_ids[kept.cpu()], weights, first, self._number)

    def _number(self) -> float:
        """A number in (0, 1]."""
        return 1.0 - torch.rand((), dtype=torch.float64, generator=self._generator, device="cpu").item()

    def _adjust(self, logits: torch.Tensor, prompt_ids: Sequence[int], generated_ids: Sequence[int]) -> torch.Tensor:
        """Return logits with bias, end tokens held back and penalties: a copy, or `logits` itself where there is
        nothing to do."""
        masked = self._masked_token_ids if len(generated_ids) < self.params.min_tokens else []
        has_penalty = self._repetition or self._output_penalty
        if not (masked or self.params.logit_bias or has_penalty):
            return logits
        adjusted = logits.clone()
        if self.params.logit_bias:
            token_ids, biases = zip(*self.params.logit_bias)
            adjusted[list(token_ids)] += adjusted.new_tensor(biases)
        if masked:
            adjusted[masked] = -math.inf
        if has_penalty:
            self._penalise(adjusted, prompt_ids, generated_ids)
        return adjusted

    def _penalise(self, logits: torch.Tensor, prompt_ids: Sequence[int], generated_ids: Sequence[int]) -> None:
        """Apply the three penalties to `logits` in place."""
        params = self.params
        generated = torch.as_tensor(generated_ids, dtype=torch.int64, device=logits.device)
        counts = torch.bincount(generated, minlength=self._vocab_size)
        if self._repetition:
            if self._prompt_mask is None:
                prompt = torch.as_tensor(prompt_ids, dtype=torch.int64, device=logits.device)
                self._prompt_mask = torch.bincount(prompt, minlength=self._vocab_size) > 0
            seen = self._prompt_mask | (counts > 0)
            penalty = params.repetition_penalty
            logits[seen] = torch.where(logits > 0, logits / penalty, logits * penalty)[seen]
        if self._output_penalty:
            logits -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)


def _leave(allowed: torch.Tensor, logits: torch.Tensor, best: int) -> tuple[torch.Tensor, int, torch.Tensor | None]:
    """What a grammar leaves of logits: values, the place of the largest, and which tokens they are where they are few;
    else all tokens, with -inf for those that are not allowed."""
    count = int(allowed.count_nonzero())
    if FEW * count < len(allowed):
        token_ids = torch.from_numpy(np.flatnonzero(allowed.numpy()))
        few = logits.index_select(0, token_ids.to(logits.device))
        return few, greatest(few) if count else 0, token_ids
    if count < len(allowed):
        logits = torch.where(allowed.to(logits.device), logits, -math.inf)
    return logits, best if bool(allowed[best]) else greatest(logits), None


def score_token(logits: torch.Tensor, token_id: int, count: int) -> SampledToken:
    """Return a token with its natural log-probability and those of the `count` (-1: all) most likely tokens.

    Args:
        logits: float32 [vocab_size], as the model gave them.
        token_id: the token to score.
        count: how many of the most likely tokens to report.
    """
    logprobs = torch.log_softmax(logits.double(), dim=0)
    top = torch.topk(logprobs, len(logprobs) if count < 0 else min(count, len(logprobs)))
    return SampledToken(token_id, float(logprobs[token_id]), tuple(zip(top.indices.tolist(), top.values.tolist())))
