"""`POST /v1/responses`: OpenAI's newer form, items in and items out. Nothing is kept from one request to the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from starlette.requests import Request

from hetero_attn.server.bodies import checked, refuse
from hetero_attn.server.dialogue.forced import format_wishes
from hetero_attn.server.dialogue.messages import template_messages, text_of
from hetero_attn.server.dialogue.shapes import as_object
from hetero_attn.server.dialogue.tools import Tools, openai_choice, tools_of
from hetero_attn.server.failures import ApiError
from hetero_attn.server.generation import Generation
from hetero_attn.server.protocols.fields import Fields, Integer, Number, check_model, count_unknown
from hetero_attn.server.protocols.reply import reply
from hetero_attn.server.protocols.responses_events import ResponseWriter, failed_stream
from hetero_attn.server.service import Service
from hetero_attn.server.turn import Conversation, Turn

LOGPROBS = "message.output_text.logprobs"
_NAMES = {"max_tokens": "max_output_tokens", "json_schema": "text.format"}


class Body(Fields):
    """The body of `POST /v1/responses`; what is refused is listed so that it is refused by name."""

    model: str | None = None
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    stream: bool | None = False
    max_output_tokens: Integer | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    top_logprobs: Integer | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = True
    reasoning: dict[str, Any] | None = None
    text: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None
    truncation: str | None = None
    store: bool | None = None
    include: list[str] | None = None
    user: str | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    stream_options: dict[str, Any] | None = None
    client_metadata: Any = None
    previous_response_id: str | None = None
    conversation: Any = None
    background: bool | None = None
    prompt: Any = None
    max_tool_calls: Integer | None = None


async def responses(service: Service, request: Request) -> Any:
    """Answer `POST /v1/responses`, as a stream of events or as one response. Raises ApiError."""
    body = checked(Body, await service.bodies.read(request))
    _refuse(body)
    check_model(service, body.model)
    count_unknown(service, body)
    tools = _tools(service, body)
    shown = body.model_dump(
        include={"instructions", "metadata", "temperature", "top_p", "max_output_tokens", "reasoning"}
    )
    shown |= {"tool_choice": body.tool_choice or "auto", "tools": list(body.tools or ()), "text": body.text}
    shown |= {"parallel_tool_calls": body.parallel_tool_calls is not False, "model": body.model or service.model_name}

    def make_writer(generation: Generation) -> ResponseWriter:
        return ResponseWriter(generation, shown)

    try:
        return await reply(service, request, _turn(body, tools), make_writer, bool(body.stream))
    except ApiError as error:
        if error.code == "context_length_exceeded" and body.stream:
            return failed_stream(shown, error, service.settings)  # agents compact when the stream says so
        raise


def _refuse(body: Body) -> None:
    refuse(
        body,
        previous_response_id="nothing is kept here; send the whole conversation as input",
        conversation="nothing is kept here; send the whole conversation as input",
        background="nothing is kept here; stream the answer",
        prompt="there are no stored prompts; send instructions and input",
        max_tool_calls="the client calls the tools",
        top_logprobs="use /v1/chat/completions for log-probabilities",
    )
    if LOGPROBS in (body.include or ()):
        raise ApiError(400, f"include names {LOGPROBS}; use /v1/chat/completions for them", param="include")
    if body.truncation not in (None, "disabled"):
        raise ApiError(400, "truncation must be disabled: nothing is left out of a prompt unasked", param="truncation")
    if not body.input:
        raise ApiError(400, "input is empty; give text or items", param="input")


def _tools(service: Service, body: Body) -> Tools:
    """Functions; tools of other kinds run elsewhere and are left out, and counted as fields that are ignored."""
    functions = [tool for tool in body.tools or () if tool.get("type") == "function"]
    service.metrics.ignored(len(body.tools or ()) - len(functions))
    return tools_of(functions, openai_choice(body.tool_choice), body.parallel_tool_calls)


def _turn(body: Body, tools: Tools) -> Turn:
    given = {"temperature": body.temperature, "top_p": body.top_p, "max_tokens": body.max_output_tokens}
    effort = (body.reasoning or {}).get("effort")
    items = [{"role": "user", "content": body.input}] if isinstance(body.input, str) else body.input
    system = [{"role": "system", "content": body.instructions}] if body.instructions else []
    talk = Conversation(
        messages=template_messages([*system, *_messages(items)]),
        tools=tools,
        variables={} if effort is None else {"reasoning_effort": effort, "enable_thinking": effort != "none"},
    )
    wanted = as_object((body.text or {}).get("format"), "text.format")
    forced = format_wishes(wanted.get("type", "text"), wanted.get("schema"), "text.format")
    wishes = {name: value for name, value in given.items() if value is not None} | forced
    return Turn(prompts=talk, wishes=wishes, names=_NAMES, field="input")


def _messages(items: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Items as messages: what the assistant thought, said and called one after another is one message."""
    found: list[dict[str, Any]] = []
    for number, item in enumerate(items):
        kind, where = item.get("type", "message"), f"input.{number}"
        if kind == "message" and item.get("role") != "assistant":
            found.append({"role": item.get("role"), "content": text_of(item.get("content"), f"{where}.content")})
        elif kind == "function_call_output":
            text = text_of(item.get("output"), f"{where}.output")
            found.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": text})
        elif kind in ("message", "reasoning", "function_call"):
            _add_to_answer(_open_answer(found), kind, item, where)
        else:
            raise ApiError(
                400,
                f"{where} is a {kind!r:.40}; it must be a message, reasoning, function_call or its output",
                param=where,
            )
    return found


def _open_answer(found: list[dict[str, Any]]) -> dict[str, Any]:
    if not found or found[-1]["role"] != "assistant":
        found.append({"role": "assistant", "content": ""})
    return found[-1]


def _add_to_answer(answer: dict[str, Any], kind: str, item: Mapping[str, Any], where: str) -> None:
    if kind == "message":
        answer["content"] += text_of(item.get("content"), f"{where}.content")
    elif kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        answer.setdefault("tool_calls", []).append({"id": item.get("call_id"), "function": function})
    else:
        thought = text_of(item.get("content") or item.get("summary"), f"{where}.content")
        answer["reasoning_content"] = answer.get("reasoning_content", "") + thought
