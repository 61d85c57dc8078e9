"""Ollama's `/api/chat`, `generate`, `tags`, `show` and `version`, for clients that know no other protocol."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.requests import Request

from hetero_attn.server.bodies import checked, refuse
from hetero_attn.server.dialogue.forced import format_wishes
from hetero_attn.server.dialogue.messages import template_messages
from hetero_attn.server.dialogue.tools import tools_of
from hetero_attn.server.failures import ApiError
from hetero_attn.server.generation import Generation
from hetero_attn.server.protocols.fields import Fields, Integer, check_model, count_unknown, seed_wish
from hetero_attn.server.protocols.ollama_lines import LINES, OllamaWriter, timestamp
from hetero_attn.server.protocols.reply import reply
from hetero_attn.server.service import Service
from hetero_attn.server.sse import JsonAnswer
from hetero_attn.server.turn import Conversation, Turn

VERSION = "0.12.6"  # of Ollama's own, whose requests are understood: clients refuse to speak to older ones
_OPTIONS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "stop": "stop",
    "repeat_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
}
_NAMES = {name: f"options.{option}" for option, name in _OPTIONS.items()} | {"json_schema": "format"}


class Asking(Fields):
    """What both kinds of request hold."""

    model: str | None = None
    stream: bool | None = True
    options: dict[str, Any] | None = None
    think: bool | str | None = None
    format: Any = None
    keep_alive: Any = None
    logprobs: bool | None = None
    top_logprobs: Integer | None = None


class ChatBody(Asking):
    """The body of `POST /api/chat`: messages and tools."""

    messages: list[dict[str, Any]] = []
    tools: list[dict[str, Any]] | None = None


class GenerateBody(Asking):
    """The body of `POST /api/generate`: one prompt, through the chat template unless it is raw."""

    prompt: str | None = None
    system: str | None = None
    raw: bool | None = None
    suffix: str | None = None
    template: str | None = None
    context: list[Integer] | None = None
    images: Any = None


class ShowBody(Fields):
    """The body of `POST /api/show`: a model by either of the names that clients use for the field."""

    model: str | None = None
    name: str | None = None


async def chat(service: Service, request: Request) -> Any:
    """Answer `POST /api/chat`; without messages it only says that the model is loaded. Raises ApiError."""
    body = checked(ChatBody, await service.bodies.read(request))
    _check(service, body)
    if not body.messages:
        return _loaded(service, body, {"message": {"role": "assistant", "content": ""}})
    talk = Conversation(
        messages=template_messages([_message(message) for message in body.messages]),
        tools=tools_of([tool.get("function") for tool in body.tools or ()], "auto", True),
        variables=_thinking(body),
    )
    return await _answer(service, request, body, Turn(prompts=talk, wishes=_wishes(body), names=_NAMES), True)


async def generate(service: Service, request: Request) -> Any:
    """Go on with a prompt: a user's words, or with `raw` the text as it stands."""
    body = checked(GenerateBody, await service.bodies.read(request))
    _check(service, body)
    refuse(
        body,
        suffix="the model does not fill in the middle",
        template="the model's own template is used",
        context="send the conversation to /api/chat",
        images="this model reads text only",
    )
    if not body.prompt:
        return _loaded(service, body, {"response": ""})
    system = [{"role": "system", "content": body.system}] if body.system else []
    prompts: Any = [body.prompt]
    if not body.raw and service.tokenizer.chat_template:
        user = {"role": "user", "content": body.prompt}
        prompts = Conversation(messages=template_messages([*system, user]), variables=_thinking(body))
    turn = Turn(prompts=prompts, wishes=_wishes(body), names=_NAMES, field="prompt")
    return await _answer(service, request, body, turn, False)


async def tags(service: Service, request: Request) -> Any:
    """The one model that is served."""
    return JsonAnswer({"models": [_card(service)]})


async def show(service: Service, request: Request) -> Any:
    """What is known of the model."""
    body = checked(ShowBody, await service.bodies.read(request))
    check_model(service, body.model or body.name)
    config, answers = service.llm.engine.config, service.answer_format
    marks = answers.marks
    can = ["completion", *["tools"] * answers.knows_tools]
    can += ["thinking"] * (answers.is_harmony or bool(marks and marks.thought))
    family = config.architecture
    info = {
        "general.architecture": family,
        "general.basename": service.model_name,
        f"{family}.context_length": service.llm.plan.max_context,
        f"{family}.embedding_length": config.hidden_size,
        f"{family}.block_count": config.num_layers,
    }
    return JsonAnswer(
        {
            "license": "",
            "modelfile": f"FROM {service.model_name}",
            "parameters": "",
            "template": service.tokenizer.chat_template or "",
            "details": _details(service),
            "model_info": info,
            "capabilities": can,
            "modified_at": timestamp(service.started_at),
        }
    )


async def version(service: Service, request: Request) -> Any:
    """The version of Ollama's protocol that is spoken here."""
    return JsonAnswer({"version": VERSION})


async def _answer(service: Service, request: Request, body: Asking, turn: Turn, is_chat: bool) -> Any:
    def make_writer(generation: Generation) -> OllamaWriter:
        return OllamaWriter(generation, body.model or service.model_name, is_chat)

    return await reply(service, request, turn, make_writer, body.stream is not False, LINES)


def _check(service: Service, body: Asking) -> None:
    refuse(body, logprobs="use /v1/chat/completions for them", top_logprobs="use /v1/chat/completions for them")
    check_model(service, body.model)
    count_unknown(service, body)
    service.metrics.ignored(len((body.options or {}).keys() - _OPTIONS.keys() - {"num_predict", "seed"}))


def _loaded(service: Service, body: Asking, empty: dict[str, Any]) -> JsonAnswer:
    """A request without words asks for the model to be loaded, which it is."""
    head = {"model": body.model or service.model_name, "created_at": timestamp()}
    return JsonAnswer(head | empty | {"done": True, "done_reason": "load"})


def _wishes(body: Asking) -> dict[str, Any]:
    options = body.options or {}
    found = {name: options[field] for field, name in _OPTIONS.items() if options.get(field) is not None}
    limit, seed = options.get("num_predict"), options.get("seed")
    for name, value in (("num_predict", limit), ("seed", seed)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise ApiError(400, f"options.{name} is {value!r:.40}; it must be a whole number", param=f"options.{name}")
    if limit is not None and limit > 0:  # else as long as there is room
        found["max_tokens"] = limit
    kind = "text" if not body.format else "json_object" if body.format == "json" else "json_schema"
    return found | seed_wish(seed) | format_wishes(kind, body.format, "format")


def _thinking(body: Asking) -> dict[str, Any]:
    if body.think is None:
        return {}
    return {"enable_thinking": bool(body.think)} | (
        {"reasoning_effort": body.think} if isinstance(body.think, str) else {}
    )


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """In OpenAI's form, which names two fields otherwise."""
    found = dict(message)
    if found.pop("images", None):
        raise ApiError(400, "messages hold images; this model reads text only", param="messages")
    if isinstance(thought := found.pop("thinking", None), str):
        found["reasoning_content"] = thought
    if isinstance(name := found.pop("tool_name", None), str):
        found["name"] = name
    return found


def _card(service: Service) -> dict[str, Any]:
    name = service.model_name
    size = sum(place.get("weights", 0) for place in service.llm.plan.memory.to_dict().values())
    head = {"name": name, "model": name, "modified_at": timestamp(service.started_at), "size": size, "digest": ""}
    return head | {"details": _details(service)}


def _details(service: Service) -> dict[str, Any]:
    plan, family = service.llm.plan, service.llm.engine.config.architecture
    dtype = plan.workload.weight_dtype
    return {
        "parent_model": "",
        "format": "hetero_attn",
        "family": family,
        "families": [family],
        "parameter_size": "",
        "quantization_level": str(dtype),
    }
