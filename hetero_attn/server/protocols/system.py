"""What is asked about the server and its model: health, version, models, tokens, metrics, what the lanes did."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from hetero_attn.server.bodies import checked
from hetero_attn.server.dialogue.messages import template_messages
from hetero_attn.server.driver import State
from hetero_attn.server.failures import ApiError
from hetero_attn.server.protocols.fields import Fields, Integer
from hetero_attn.server.service import Service
from hetero_attn.server.sse import JsonAnswer


class TokenizeBody(Fields):
    """Text, or messages, to become tokens."""

    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool | None = False


class DetokenizeBody(Fields):
    """The body of `POST /detokenize`: token ids to become text."""

    tokens: list[Integer]


async def health(service: Service, request: Request) -> Response:
    """200 when requests are answered, 503 while loading, stopping or dead."""
    state = service.driver.state
    return JsonAnswer({"status": state.value}, 200 if state is State.READY else 503)


async def server_version(service: Service, request: Request) -> Response:
    """The version of hetero-attn, "0+sources" where it is not installed."""
    try:
        return JsonAnswer({"version": version("hetero-attn")})
    except PackageNotFoundError:
        return JsonAnswer({"version": "0+sources"})


async def models(service: Service, request: Request) -> Response:
    """The one model that is served."""
    return JsonAnswer({"object": "list", "data": [_card(service)]})


async def model(service: Service, request: Request) -> Response:
    """The served model by its name. Raises ApiError (404) for another."""
    name = request.path_params["name"]
    if name != service.model_name:
        raise ApiError(404, f"there is no model {name!r:.80}; the one served is {service.model_name}", param="model")
    return JsonAnswer(_card(service))


def _card(service: Service) -> dict[str, Any]:
    plan = service.llm.plan
    return {
        "id": service.model_name,
        "object": "model",
        "created": service.started_at,
        "owned_by": "hetero-attn",
        "root": plan.model,
        "max_model_len": plan.max_context,
    }


async def tokenize(service: Service, request: Request) -> Response:
    """Text, or a conversation, as token ids."""
    body, tokenizer = checked(TokenizeBody, await service.bodies.read(request)), service.tokenizer
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "give prompt or messages, one of the two", param="prompt")

    most = service.llm.plan.max_context

    def encode() -> Response:
        if body.messages is None:
            ids = tokenizer.encode(body.prompt, body.add_special_tokens)
        else:
            ids = tokenizer.encode_chat(template_messages(body.messages), body.add_generation_prompt)
        names = None
        if body.return_token_strs:
            names = [tokenizer.token_bytes(each).decode("utf-8", "replace") for each in ids]
        return JsonAnswer({"count": len(ids), "max_model_len": most, "tokens": ids, "token_strs": names})

    return await service.on_thread(encode)


async def detokenize(service: Service, request: Request) -> Response:
    """The text of token ids, special tokens kept. Raises ApiError for an id beyond the vocabulary."""
    body = checked(DetokenizeBody, await service.bodies.read(request))
    vocab_size = service.llm.engine.config.vocab_size
    for position, token_id in enumerate(body.tokens):
        if not 0 <= token_id < vocab_size:
            raise ApiError(400, f"tokens.{position} is {token_id}; ids are in 0..{vocab_size - 1}", param="tokens")
    text = await service.on_thread(lambda: service.tokenizer.decode(body.tokens, skip_special_tokens=False))
    return JsonAnswer({"prompt": text})


async def tokenizer_info(service: Service, request: Request) -> Response:
    """What clients want to know of the tokenizer."""
    tokenizer = service.tokenizer
    return JsonAnswer(tokenizer.special_tokens | {"chat_template": tokenizer.chat_template})


async def metrics(service: Service, request: Request) -> Response:
    """The server's counters in Prometheus' text format, for a scraper."""
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def embeddings(service: Service, request: Request) -> Response:
    """Models that write text give poor embeddings, so none are given."""
    raise ApiError(
        404, f"{service.model_name} writes text and gives no embeddings; serve a model made for them elsewhere"
    )
