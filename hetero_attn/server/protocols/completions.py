"""`POST /v1/completions`: text or token ids go on. `echo` with `logprobs` scores what was given."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

from pydantic import StrictInt
from starlette.requests import Request

from hetero_attn.server.bodies import checked, refuse
from hetero_attn.server.dialogue.answer import Answer, Piece
from hetero_attn.server.failures import ApiError
from hetero_attn.server.generation import Generation
from hetero_attn.server.protocols.fields import (
    OLDER_FORMS,
    Integer,
    Logprobs,
    SamplingFields,
    check_model,
    count_unknown,
)
from hetero_attn.server.protocols.logprobs import TextLength, completion_logprobs, shown_tokens
from hetero_attn.server.protocols.openai import OpenAIWriter
from hetero_attn.server.protocols.reply import reply
from hetero_attn.server.service import Service
from hetero_attn.server.sse import JsonAnswer, unless_gone
from hetero_attn.server.turn import Prompt, Turn

if TYPE_CHECKING:  # they need torch, whose import would keep a server from answering while it loads
    from hetero_attn.serving.prompt_scores import PromptScores
    from hetero_attn.serving.request import Request as ModelRequest

MOST_PROMPTS = 256


class Body(SamplingFields):
    """The body of `POST /v1/completions`, beside the fields of sampling."""

    # Text in a list is text: only a strict integer is told from the digits that spell it.
    prompt: str | list[StrictInt] | list[str] | list[list[StrictInt]]
    max_tokens: Integer | None = 16
    logprobs: Logprobs | None = None
    echo: bool | None = False
    best_of: Integer | None = None
    suffix: str | None = None
    use_beam_search: bool | None = None


async def completions(service: Service, request: Request) -> Any:
    """Answer `POST /v1/completions`, for one or several prompts. Raises ApiError."""
    body = checked(Body, await service.bodies.read(request))
    refuse(body, suffix="the model does not fill in the middle", use_beam_search="answers are sampled", **OLDER_FORMS)
    check_model(service, body.model)
    count_unknown(service, body)
    choices = 1 if body.n is None else body.n
    if body.best_of not in (None, choices):
        raise ApiError(400, f"best_of is {body.best_of}; it must equal n, which is {choices}", param="best_of")
    turn = Turn(
        prompts=_prompts(body),
        wishes=body.wishes(body.max_tokens or None) | ({} if body.logprobs is None else {"logprobs": body.logprobs}),
        choices=choices,
        priority=body.priority or 0,
        names=body.names(),
        field="prompt",
    )
    scored = await _scored(service, request, turn, body.logprobs) if body.echo and body.logprobs is not None else None
    if body.max_tokens == 0:
        return await _only_prompt(service, body, turn, scored)

    def make_writer(generation: Generation) -> CompletionWriter:
        return CompletionWriter(service, body, generation, choices, scored)

    return await reply(service, request, turn, make_writer, bool(body.stream))


def _prompts(body: Body) -> list[Prompt]:
    prompt = body.prompt
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise ApiError(400, "prompt is an empty list; give text, token ids or a list of those", param="prompt")
    if isinstance(prompt[0], int):
        return [tuple(prompt)]
    if len(prompt) > MOST_PROMPTS:
        raise ApiError(400, f"prompt holds {len(prompt)} prompts, at most {MOST_PROMPTS} are allowed", param="prompt")
    return [each if isinstance(each, str) else tuple(each) for each in prompt]


async def _scored(service: Service, request: Request, turn: Turn, logprobs: int) -> tuple[ModelRequest, ...]:
    """The prompts with the log-probabilities of their tokens; what they compute is found again by the answers."""
    scoring = await service.score(turn, logprobs)
    try:
        await unless_gone(request.receive, scoring.ended())
    finally:
        scoring.close()
    return scoring.requests


async def _only_prompt(service: Service, body: Body, turn: Turn, scored: tuple[ModelRequest, ...] | None) -> JsonAnswer:
    """max_tokens 0: nothing is generated, what was given is given back."""
    if not body.echo:
        raise ApiError(
            400, "max_tokens is 0, so there is nothing to answer; give at least 1, or echo", param="max_tokens"
        )
    if body.stream:
        raise ApiError(400, "max_tokens is 0 and stream is true; there is nothing to stream", param="stream")
    ids = await service.encode(turn) if scored is None else [request.prompt_token_ids for request in scored]
    writer = CompletionWriter(service, body, Generation((), lambda generation: None), 1, scored)
    choices = [
        {"index": index, "text": writer.prompt_text(token_ids), "logprobs": writer.prompt_logprobs(index, TextLength())}
        for index, token_ids in enumerate(ids)
    ]
    tokens = sum(map(len, ids))
    usage = {"prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens}
    answer = writer.body_with([choice | {"finish_reason": "length"} for choice in choices])
    return JsonAnswer(answer | {"usage": usage})


class CompletionWriter(OpenAIWriter):
    """Writes text completions. scored: the prompts with their log-probabilities, where they are echoed with them."""

    chunk_object = whole_object = "text_completion"

    def __init__(
        self,
        service: Service,
        body: Body,
        generation: Generation,
        choices: int,
        scored: tuple[ModelRequest, ...] | None,
    ) -> None:
        super().__init__(service, body, generation, "cmpl-", choices)
        self.body: Body = body
        self._scored = scored
        self._lengths = [TextLength() for _ in generation.requests]
        self._is_begun = [False] * len(generation.requests)

    def piece(self, piece: Piece) -> Iterable[bytes]:
        """A chunk; the first one of a choice begins with the prompt where that is echoed."""
        number = piece.choice
        text, logprobs = self._echo(number)
        text += piece.part.text
        new = self._logprobs(number, piece.first, piece.last)
        if logprobs is None:
            logprobs = new
        elif new is not None:
            logprobs = {name: [*logprobs[name], *new[name]] for name in logprobs}
        if text or logprobs:
            yield self.chunk([self._choice(number, text, logprobs, None)])
        if piece.finish_reason is not None:
            yield self.chunk([self._choice(number, "", None, piece.finish_reason)])

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """One object with the text of every choice, behind its prompt where that is echoed."""
        choices = []
        for number, answer in enumerate(answers):
            text, logprobs = self._echo(number)
            new = self._logprobs(number, 0, answer.tokens)
            joined = new if logprobs is None else {name: [*logprobs[name], *new[name]] for name in logprobs}
            choices.append(self._choice(number, text + answer.text, joined, answer.finish_reason))
        return self.body_with(choices)

    def prompt_text(self, token_ids: Sequence[int]) -> str:
        """The text of a prompt's token ids, as `echo` puts it before the answer."""
        return self.service.tokenizer.decode(token_ids)

    def prompt_logprobs(self, prompt: int, length: TextLength) -> dict[str, Any] | None:
        """The log-probabilities of a prompt's tokens, where they were asked for. length: takes in that of its text."""
        if self._scored is None:
            return None
        request = self._scored[prompt]
        tokens = cast("PromptScores", request.scores).tokens
        return completion_logprobs(self.service.tokenizer, tokens, length, request.prompt_token_ids[0])

    def _echo(self, number: int) -> tuple[str, dict[str, Any] | None]:
        """The prompt of a choice and its log-probabilities, once, where it is echoed."""
        if not self.body.echo or self._is_begun[number]:
            return "", None
        self._is_begun[number] = True
        logprobs = self.prompt_logprobs(number // self.choices, self._lengths[number])
        return self.prompt_text(self.generation.requests[number].prompt_token_ids), logprobs

    def _logprobs(self, number: int, first: int, last: int) -> dict[str, Any] | None:
        if self.body.logprobs is None:
            return None
        entries = shown_tokens(self.generation.requests[number], first, last)
        return completion_logprobs(self.service.tokenizer, entries, self._lengths[number])

    def _choice(self, number: int, text: str, logprobs: dict | None, finish_reason: str | None) -> dict[str, Any]:
        return {"index": number, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}
