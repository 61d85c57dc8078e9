"""From prompts and parameters to requests: what a prompt may be, what parameters become, what reads its text."""

import time
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from functools import cached_property
from numbers import Integral

import torch

from hetero_attn.engine.replan import Replanner
from hetero_attn.errors import ArgumentError, ConfigError, MissingTokenizerError, QueueFullError, SamplingError
from hetero_attn.planning.options import LoadOptions
from hetero_attn.serving.defaults import default_params
from hetero_attn.serving.grammar import Grammars
from hetero_attn.serving.prompt_scores import PromptScores
from hetero_attn.serving.prompts import as_prompt
from hetero_attn.serving.request import Request
from hetero_attn.serving.sampling import Sampler
from hetero_attn.serving.sampling_params import SamplingParams
from hetero_attn.serving.scheduling.turns import Turns
from hetero_attn.serving.text.first_words import begun, checked_ids, expect_room_for
from hetero_attn.serving.text.opening import NO_TEXT
from hetero_attn.serving.text.tokenizer import Tokenizer

Prompt = str | Sequence[int]
Messages = Sequence[Mapping[str, object]]


class Intake:
    """Makes the requests of one model.

    replanner: knows the model, with the plan in force. turns: whose requests are waiting. opening: of the tokenizer,
    under way while the weights load. options: how many may wait, and the seed of requests that bring none.
    """

    def __init__(
        self, replanner: Replanner, turns: Turns, opening: Future[Tokenizer | None], options: LoadOptions
    ) -> None:
        self._replanner = replanner
        self._turns = turns
        self._opening = opening
        self._max_waiting = options.max_waiting
        self._seeds = None if options.seed is None else torch.Generator().manual_seed(options.seed)
        self._tokenizer_failure: ConfigError | None = None

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer, None for a model without one; raises what opening it raised."""
        opened = self._opening.result()
        if opened is not None:
            opened.compare_vocab(self._vocab_size)
        return opened

    @cached_property
    def grammars(self) -> Grammars:
        """What makes answers follow a schema or a grammar."""
        return Grammars(self._tokenizer_if_any(), self._vocab_size, self._end_token_ids())

    def request(self, prompt: Prompt, params: SamplingParams | None, priority: int = 0) -> Request:
        """A request to continue a prompt; PromptError and SamplingError name what is wrong with it."""
        asked_at, planned = time.perf_counter(), self._replanner.planned
        params = default_params(planned.path) if params is None else params
        if not isinstance(params, SamplingParams):
            raise SamplingError(f"params is {params!r:.60}; it must be one SamplingParams, or None")
        if not isinstance(priority, int):
            raise SamplingError(f"priority is {priority!r:.60}; it must be an int, higher goes first")
        self._check_queue()
        with self._turns.beside_steps():
            ids = self._ids_of(as_prompt(prompt))
            room, tokenizer = self._replanner.planned.plan.max_context - len(ids), self._tokenizer_if_any()
            if tokenizer is not None and params.skip_special_tokens:
                params = tokenizer.with_special_stops(params)
            return Request(
                prompt_token_ids=ids,
                params=params,
                sampler=self._sampler(params),
                stream=None if tokenizer is None else tokenizer.stream(params.stop, params.skip_special_tokens),
                max_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
                asked_at=asked_at,
                prefill_s=time.perf_counter() - asked_at,
                priority=priority,
            )

    def scoring(self, prompt: Prompt) -> Request:
        """A request for the logits of a prompt's tokens."""
        self._check_queue()
        with self._turns.beside_steps():
            token_ids = self._require_tokenizer().encode(prompt) if isinstance(prompt, str) else prompt
            params = SamplingParams()
            sampler = Sampler(params, (), self._vocab_size, 0)
            return Request(self._check_ids(token_ids, reserve=0), params, sampler, stream=None, max_tokens=0, scores=[])

    def scored(self, prompt: Prompt, logprobs: int, priority: int) -> Request:
        """A request whose prompt's own tokens are to be scored, with so many of the likeliest at each position."""
        wanted = SamplingParams(logprobs=logprobs).logprobs or 0
        request = self.scoring(prompt)
        request.scores = PromptScores(request.prompt_token_ids, wanted)
        request.priority, request.asked_at = priority, time.perf_counter()
        return request

    def chat_prompt(self, messages: Messages, template_variables: Mapping[str, object] | None) -> list[int]:
        """A conversation as the model's template writes it."""
        with self._turns.beside_steps():
            return self._require_tokenizer().encode_chat(messages, True, template_variables)

    def check_context(self, tokens: int, reserve: int = 0) -> None:
        """Raise PromptError unless `tokens`, and `reserve` more, fit the context that the plan reserves."""
        for name, count in (("tokens", tokens), ("reserve", reserve)):
            if not isinstance(count, Integral) or isinstance(count, bool) or count < 0:
                raise ArgumentError(f"{name} is {count!r:.60}; it must be a number of tokens")
        expect_room_for(tokens, reserve, self._replanner.planned.plan.max_context)

    @property
    def _vocab_size(self) -> int:
        return self._replanner.planned.config.vocab_size

    def _sampler(self, params: SamplingParams) -> Sampler:
        seed = None if self._seeds is None else int(torch.randint(1 << 62, (), generator=self._seeds, device="cpu"))
        return Sampler(params, self._end_token_ids(), self._vocab_size, seed, self.grammars.mask(params))

    def _end_token_ids(self) -> tuple[int, ...]:
        tokenizer = self._tokenizer_if_any()
        own = () if tokenizer is None else tokenizer.eos_token_ids
        return tuple(sorted({*self._replanner.planned.config.eos_token_ids, *own}))

    def _tokenizer_if_any(self) -> Tokenizer | None:
        """The tokenizer; None for a model without one, and, with a warning, for one that cannot be opened: prompts of
        token ids need none."""
        if self._tokenizer_failure is not None:
            return None
        try:
            return self.tokenizer
        except ConfigError as error:
            self._tokenizer_failure = error
            warnings.warn(f"{NO_TEXT}: {error}", stacklevel=4)
            return None

    def _require_tokenizer(self) -> Tokenizer:
        if self._tokenizer_failure is not None:
            raise self._tokenizer_failure
        if self.tokenizer is None:
            name = self._replanner.planned.plan.model
            raise MissingTokenizerError(name, ", or give prompts as lists of token ids")
        return self.tokenizer

    def _ids_of(self, prompt: Prompt) -> tuple[int, ...]:
        ids = self._require_tokenizer().encode(prompt) if isinstance(prompt, str) else prompt
        return self._check_ids(begun(ids, self._replanner.planned.config.bos_token_id), reserve=1)

    def _check_ids(self, token_ids: Sequence[int], reserve: int) -> tuple[int, ...]:
        ids = checked_ids(token_ids, self._vocab_size)
        self.check_context(len(ids), reserve)
        return ids

    def _check_queue(self) -> None:
        """Raise EngineDeadError where no step can be taken any more, and QueueFullError where too many wait."""
        self._turns.check()
        waiting = self._turns.waiting
        if self._max_waiting is not None and waiting >= self._max_waiting:
            raise QueueFullError(
                f"{self._replanner.planned.plan.model}: {waiting} requests wait for a place, and max_waiting is "
                f"{self._max_waiting}; try again later, or load with a larger max_waiting"
            )
