"""What the protocols share: admission, text to tokens on threads of their own, turns begun and scored.

Everything is checked before a client gets headers: fields, context, room in the queue.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from hetero_attn.errors import PromptError, SamplingError
from hetero_attn.server.bodies import BodyReader
from hetero_attn.server.dialogue.answer import Parser, PlainText
from hetero_attn.server.dialogue.forced import form_wishes
from hetero_attn.server.dialogue.formats import AnswerFormat, end_of, format_of
from hetero_attn.server.dialogue.thoughts import thought_tokens
from hetero_attn.server.driver import Driver, State
from hetero_attn.server.failures import ApiError, refused_parameter, too_long
from hetero_attn.server.generation import Generation
from hetero_attn.server.metrics import Labelled, ServerMetrics
from hetero_attn.server.settings import ServerSettings
from hetero_attn.server.turn import Conversation, Turn
from hetero_attn.serving.sampling_params import GRAMMARS, LARGEST_SEED

if TYPE_CHECKING:  # they need torch, whose import would keep a server from answering while it loads
    from hetero_attn.llm import LLM
    from hetero_attn.serving.request import Request
    from hetero_attn.serving.text.tokenizer import Tokenizer

ENCODING_S = 30.0  # for a prompt to become tokens; a template is a program of a stranger
MOST_CHOICES = 16
LONGEST_RETRY_S = 120
RETRY_HOLDS_S = 0.25  # in which as many as ask are told the same time: it takes a look at every request
Result = TypeVar("Result")


class Service:
    """One model being served. load: makes the model. changed: called on the loop with every state of the driver."""

    def __init__(
        self, load: Callable[[], LLM], settings: ServerSettings, changed: Callable[[State], None] = lambda state: None
    ) -> None:
        self.settings = settings
        self.bodies = BodyReader(settings)
        self.metrics = ServerMetrics(self.gauges, self._phases, self._counts)
        self.driver = Driver(load, self.metrics, changed)
        self.started_at = int(time.time())
        self._entering = 0  # requests that were let in and are not yet the driver's
        self._kept: tuple[object, asyncio.Future] | None = None
        self._retry_until, self._retry = 0.0, 1
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="hetero-attn-text")

    @property
    def llm(self) -> LLM:
        """The model. Raises ApiError while there is none, or none any more."""
        driver = self.driver
        if driver.state is State.LOADING:
            raise ApiError(503, "the model is loading; ask again in a moment", code="loading", retry_after_s=5)
        if driver.state is State.FAILED:
            raise ApiError(503, "the model is lost; the server has to be started again", code="engine_dead")
        return driver.llm

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises ApiError without one."""
        tokenizer = self.llm.tokenizer
        if tokenizer is None:
            raise ApiError(400, "this model has no tokenizer; give prompts as token ids to /v1/completions")
        return tokenizer

    @property
    def model_name(self) -> str:
        """What clients call the model: the name given to `serve`, else the plan's."""
        return self.settings.served_name or self.llm.plan.model

    @cached_property
    def answer_format(self) -> AnswerFormat:
        """How the model writes reasoning and calls."""
        return format_of(self.llm.tokenizer)

    def parsers(self, turn: Turn, generation: Generation) -> list[Parser]:
        """What tells reasoning and calls from the text of each answer."""
        count = len(generation.requests)
        if not isinstance(turn.prompts, Conversation):
            return [PlainText() for _ in range(count)]
        prompt_end = end_of(self.tokenizer, generation.requests[0].prompt_token_ids)
        is_forced = any(turn.wishes.get(name) is not None for name in GRAMMARS)
        return self.answer_format.parsers(count, turn.prompts.tools, prompt_end, is_forced)

    def thoughts_of(self, turn: Turn, generation: Generation) -> int:
        """Tokens of reasoning in the answers of a turn, once they are whole."""
        if not isinstance(turn.prompts, Conversation):
            return 0
        tokenizer, (first, *_) = self.tokenizer, generation.requests
        prompt_end = end_of(tokenizer, first.prompt_token_ids)
        form = self.answer_format
        return sum(thought_tokens(form, tokenizer, prompt_end, each.token_ids) for each in generation.requests)

    async def on_thread(self, work: Callable[[], Result]) -> Result:
        """What `work` returns, on a thread for text. Raises ApiError after ENCODING_S."""
        job = asyncio.get_running_loop().run_in_executor(self._pool, work)
        try:
            return await asyncio.wait_for(job, ENCODING_S)
        except TimeoutError:
            raise ApiError(400, f"the prompt did not become tokens within {ENCODING_S:g} s; send less") from None

    def once(self, key: object, work: Callable[[], Result]) -> asyncio.Future[Result]:
        """What `work` returns, made on a thread at the first call for a key and kept until another key is asked for."""
        if self._kept is None or self._kept[0] is not key or (self._kept[1].done() and self._kept[1].exception()):
            self._kept = key, asyncio.ensure_future(asyncio.to_thread(work))
        return self._kept[1]

    async def count_tokens(self, turn: Turn) -> int:
        """How many tokens a turn's prompts are, however many that be."""
        return sum(map(len, await self.on_thread(lambda: self._encode(turn))))

    async def encode(self, turn: Turn) -> list[tuple[int, ...]]:
        """The token ids of a turn's prompts. Raises ApiError where one leaves no room for an answer."""
        found = await self.on_thread(lambda: self._encode(turn))
        most = self.llm.plan.max_context
        for ids in found:
            if len(ids) >= most:
                raise too_long(len(ids), most, turn.field)
        return found

    async def begin(self, turn: Turn) -> Generation:
        """Let a turn in and have it computed. Raises ApiError, and what `LLM.add` raises, before anything is."""
        if not 1 <= turn.choices <= MOST_CHOICES:
            raise ApiError(400, f"n is {turn.choices}; it must be in 1..{MOST_CHOICES}", param="n")
        prompts = _count(turn)

        def add(llm: LLM, ids: list[tuple[int, ...]]) -> list[Request]:
            pairs = [(prompt, choice) for prompt in ids for choice in range(turn.choices)]
            wishes = self._wishes_of(turn, ids[0])
            params = [llm.default_params(**_wishes_of_choice(wishes, choice)) for choice in range(turn.choices)]
            return _added(llm, (llm.add(prompt, params[choice], priority=turn.priority) for prompt, choice in pairs))

        try:
            return await self._admit(turn, prompts * turn.choices, add)
        except SamplingError as error:
            raise refused_parameter(error, turn.fields) from None

    async def score(self, turn: Turn, logprobs: int) -> Generation:
        """Have the prompts' own tokens scored, each by a request of its own."""

        def add(llm: LLM, ids: list[tuple[int, ...]]) -> list[Request]:
            return _added(llm, (llm.add_scoring(prompt, logprobs, priority=turn.priority) for prompt in ids))

        return await self._admit(turn, _count(turn), add)

    async def _admit(self, turn: Turn, count: int, add: Callable[[LLM, list], list[Request]]) -> Generation:
        llm = self.llm
        if self.driver.state is State.STOPPING:
            raise ApiError(503, "the server is stopping; ask another one", code="stopping", retry_after_s=30)
        self.check_room(count)
        self._entering += count
        try:
            await asyncio.sleep(0)  # who came at the same moment and is refused is told first
            ids = await self.encode(turn)
            adding = asyncio.get_running_loop().run_in_executor(self._pool, lambda: add(llm, ids))
            try:
                requests = await asyncio.shield(adding)
            except asyncio.CancelledError:
                adding.add_done_callback(self._drop)
                raise
        except PromptError as error:
            raise ApiError(400, str(error), param=turn.field) from None
        finally:
            self._entering -= count
        generation = Generation(requests, self.driver.leave)
        self.driver.enter(generation)
        return generation

    def _drop(self, adding: asyncio.Future) -> None:
        if not adding.cancelled() and adding.exception() is None:
            self.driver.give_up(adding.result())

    def check_room(self, count: int = 1, arriving: int = 0) -> None:
        """Raise ApiError 429 where so many more requests find neither a place nor room to wait; 503 without a model.

        arriving: requests that came before and are not begun.
        What does not even fit an empty server may enter one: it waits for itself.
        """
        places, limit = self.llm.plan.max_batch, self.settings.max_waiting
        taken = len(self.driver.live) + self._entering + arriving
        if taken + count > places + max(limit, count - places if taken == 0 else 0):
            raise ApiError(
                429,
                f"{taken} requests are computed or wait, and {limit} may wait; ask again later, or serve with a larger "
                "--max-waiting",
                code="queue_full",
                retry_after_s=self._retry_after_s(taken),
            )

    def _retry_after_s(self, taken: int) -> int:
        """When a place is likely to be free: the tokens that are still to be made, at the plan's speed."""
        now = time.monotonic()
        if now < self._retry_until:
            return self._retry
        plan = self.llm.plan
        rate = plan.predicted.decode.tokens_per_s if plan.predicted is not None else 10.0
        left = [request.max_tokens - request.progress.tokens for request in self.driver.live]
        shortest = min(left, default=0) * min(taken, plan.max_batch)
        self._retry = min(max(1, math.ceil(shortest / max(rate, 0.1))), LONGEST_RETRY_S)
        self._retry_until = now + RETRY_HOLDS_S
        return self._retry

    def _encode(self, turn: Turn) -> list[tuple[int, ...]]:
        if isinstance(turn.prompts, Conversation):
            return [tuple(self._encode_chat(turn.prompts))]
        return [tuple(self.tokenizer.encode(text)) if isinstance(text, str) else text for text in turn.prompts]

    def _encode_chat(self, talk: Conversation) -> list[int]:
        variables: dict[str, Any] = dict(talk.variables)
        if tools := talk.tools.for_template:
            if not self.answer_format.knows_tools:
                raise ApiError(
                    400,
                    f"the chat template of {self.model_name} knows no tools; describe what you need in a message",
                    param="tools",
                )
            variables["tools"] = tools
        return self.tokenizer.encode_chat(talk.messages, talk.opens_answer, variables, talk.continues)

    def _wishes_of(self, turn: Turn, prompt: tuple[int, ...]) -> dict[str, Any]:
        """The parameters that all answers of a turn share."""
        wishes = dict(turn.wishes)
        if isinstance(turn.prompts, Conversation):
            prompt_end = end_of(self.tokenizer, prompt)
            wishes |= form_wishes(self.answer_format, turn.prompts.tools, wishes, self.llm.grammars.mark, prompt_end)
        return wishes

    def gauges(self) -> dict[str, float]:
        """What is true now, by its name in `/metrics`."""
        driver, llm = self.driver, self.driver.llm
        running = driver.running
        found: dict[str, float] = {
            "vllm:num_requests_running": running,
            "vllm:num_requests_waiting": len(driver.live) - running + self._entering,
        }
        if llm is None:
            return found
        pools = llm.engine.kv_cache.pools
        used = max((1 - pool.free_pages / pool.capacity for pool in pools if pool.capacity), default=0.0)
        predicted = llm.plan.predicted
        speed = {} if predicted is None else {"hetero_predicted_decode_tokens_per_s": predicted.decode.tokens_per_s}
        return found | {"vllm:kv_cache_usage_perc": used} | speed

    def _phases(self) -> dict[str, dict[str, float]]:
        return {} if self.driver.llm is None else self.driver.llm.report().to_dict()

    def _counts(self) -> dict[str, int | Labelled]:
        """Tokens computed ahead, why there were as many, and picks of experts, by their name in `/metrics`."""
        if self.driver.llm is None:
            return {}
        report = self.driver.llm.report()
        drafts = report.drafts
        rows = {str(1 + count): passes for count, passes in sorted(drafts.by_count.copy().items())}
        return {
            "vllm:spec_decode_num_drafts": drafts.passes,
            "vllm:spec_decode_num_draft_tokens": drafts.drafted,
            "vllm:spec_decode_num_accepted_tokens": drafts.accepted,
            "hetero_draft_passes": ("rows", rows),
            "hetero_draft_decisions": ("reason", drafts.decisions.copy()),
            "hetero_forced_tokens": report.forced_tokens,
            **report.expert_picks(),
        }

    def close(self) -> None:
        """Let go of the threads for text."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _added(llm: LLM, adding: Iterator[Request]) -> list[Request]:
    """The requests of one turn, all of them or, where one is refused, none: nobody would read the others."""
    found: list[Request] = []
    try:
        for request in adding:
            found.append(request)
    except BaseException:
        for request in found:
            llm.abort(request)
        raise
    return found


def _wishes_of_choice(wishes: dict[str, Any], choice: int) -> dict[str, Any]:
    """The parameters of one of several answers: a seed that is given makes each of them repeatable, not alike."""
    seed = wishes.get("seed")
    return wishes if seed is None else wishes | {"seed": (seed + choice) & LARGEST_SEED}


def _count(turn: Turn) -> int:
    return 1 if isinstance(turn.prompts, Conversation) else len(turn.prompts)
