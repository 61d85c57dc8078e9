"""`POST /v1/messages` and `/v1/messages/count_tokens`: Anthropic's form of a conversation, in blocks."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field
from starlette.requests import Request

from hetero_attn.server.bodies import checked, refuse
from hetero_attn.server.dialogue.forced import format_wishes
from hetero_attn.server.dialogue.messages import template_messages, text_of
from hetero_attn.server.dialogue.shapes import as_kind, as_object
from hetero_attn.server.dialogue.tools import Tools, tools_of
from hetero_attn.server.failures import ApiError
from hetero_attn.server.generation import Generation
from hetero_attn.server.protocols.fields import Fields, Integer, Number, check_model, count_unknown
from hetero_attn.server.protocols.messages_events import MessageWriter
from hetero_attn.server.protocols.reply import reply
from hetero_attn.server.service import Service
from hetero_attn.server.sse import JsonAnswer
from hetero_attn.server.turn import Conversation, Turn

BILLING = "x-anthropic-billing-header"  # a line of a client that changes with each request, and no prompt
_SAMPLING = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "stop_sequences": "stop"}


class CountBody(Fields):
    """What is counted: all that a prompt is made of."""

    model: str | None = None
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    mcp_servers: Any = None
    container: Any = None


class Body(CountBody):
    """The body of `POST /v1/messages`, beside what counting its tokens takes."""

    max_tokens: Annotated[Integer, Field(ge=1)]
    stream: bool | None = False
    stop_sequences: list[str] | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: Integer | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    output_config: dict[str, Any] | None = None
    output_format: dict[str, Any] | None = None


async def messages(service: Service, request: Request) -> Any:
    """Answer `POST /v1/messages`, as a stream of events or as one message. Raises ApiError."""
    body = checked(Body, await service.bodies.read(request))
    turn = _turn_of(service, body, _wishes(body))

    def make_writer(generation: Generation) -> MessageWriter:
        return MessageWriter(generation, body.model or service.model_name)

    return await reply(service, request, turn, make_writer, bool(body.stream))


async def count_tokens(service: Service, request: Request) -> Any:
    """How many tokens the prompt of such a request has."""
    body = checked(CountBody, await service.bodies.read(request))
    return JsonAnswer({"input_tokens": await service.count_tokens(_turn_of(service, body, {}))})


def _wishes(body: Body) -> dict[str, Any]:
    found = {name: value for field, name in _SAMPLING.items() if (value := getattr(body, field)) is not None}
    given = (body.output_config or {}).get("format") or body.output_format
    wanted = as_object(given, "output_config.format")
    forced = format_wishes(wanted.get("type", "text"), wanted.get("schema"), "output_config.format")
    return found | {"max_tokens": body.max_tokens} | forced


def _turn_of(service: Service, body: CountBody, wishes: dict[str, Any]) -> Turn:
    refuse(body, mcp_servers="tools are called by the client", container="nothing is run here")
    check_model(service, body.model)
    count_unknown(service, body)
    system = [{"role": "system", "content": text}] if (text := _system(body.system)) else []
    plain = [*system, *_openai_messages(body.messages)]
    kind = (body.thinking or {}).get("type")
    talk = Conversation(
        messages=template_messages(plain),
        tools=_tools(body),
        variables={} if kind is None else {"enable_thinking": kind != "disabled"},
        continues=plain[-1]["role"] == "assistant" and not plain[-1].get("tool_calls"),
    )
    return Turn(prompts=talk, wishes=wishes, names={"stop": "stop_sequences", "json_schema": "output_config.format"})


def _system(system: Any) -> str:
    if not isinstance(system, list):
        return text_of(system, "system")
    return "\n\n".join(text for block in system if not (text := text_of([block], "system")).startswith(BILLING))


def _tools(body: CountBody) -> Tools:
    functions = []
    for number, tool in enumerate(body.tools or ()):
        if tool.get("type", "custom") != "custom":
            raise ApiError(
                400, f"tools.{number} is a {tool['type']!r:.40}, which runs elsewhere; leave it out", param="tools"
            )
        functions.append({**tool, "parameters": tool.get("input_schema")})
    choice = body.tool_choice or {}
    words = {"auto": "auto", "any": "required", "none": "none", "tool": f"={choice.get('name')}"}
    kind = as_kind(choice.get("type", "auto"), "tool_choice.type")
    if kind not in words:
        raise ApiError(
            400, f"tool_choice.type is {kind!r:.40}; it must be one of {', '.join(words)}", param="tool_choice"
        )
    return tools_of(functions, words[kind], not choice.get("disable_parallel_tool_use"))


def _openai_messages(given: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for number, message in enumerate(given):
        content, where = message.get("content"), f"messages.{number}.content"
        blocks = content if isinstance(content, list) else [{"type": "text", "text": content}]
        for place, block in enumerate(blocks):
            if not isinstance(block, Mapping):
                raise ApiError(400, f"{where}.{place} is no block; give {{'type': 'text', 'text': ...}}", param=where)
        found += _assistant(blocks, where) if message.get("role") == "assistant" else _other(message, blocks, where)
    return found


def _assistant(blocks: Sequence[Mapping[str, Any]], where: str) -> Iterable[dict[str, Any]]:
    kinds: dict[Any, list[Mapping[str, Any]]] = {}
    for block in blocks:
        kinds.setdefault(as_kind(block.get("type"), f"{where}.type"), []).append(block)
    for kind in set(kinds) - {"text", "tool_use", "thinking", "redacted_thinking"}:
        raise ApiError(400, f"{where} holds a {kind!r:.40}, which no answer of this model is", param=where)
    found: dict[str, Any] = {"role": "assistant", "content": text_of(kinds.get("text", []), where)}
    if thoughts := "".join(str(block.get("thinking", "")) for block in kinds.get("thinking", ())):
        found["reasoning_content"] = thoughts
    if calls := kinds.get("tool_use"):
        found["tool_calls"] = [
            {"id": call.get("id"), "function": {"name": call.get("name"), "arguments": call.get("input") or {}}}
            for call in calls
        ]
    yield found


def _other(message: Mapping[str, Any], blocks: Sequence[Mapping[str, Any]], where: str) -> Iterable[dict[str, Any]]:
    """Results of tools, each a message of its own, and then what the user says."""
    said = []
    for place, block in enumerate(blocks):
        if block.get("type") != "tool_result":
            said.append(block)
            continue
        content = block.get("content")
        text = text_of(content, f"{where}.{place}.content") if isinstance(content, (str, list)) else json.dumps(content)
        failed = "Error: " if block.get("is_error") else ""
        yield {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": failed + text}
    if said or not blocks:  # a message without a block is an empty one
        yield {"role": message.get("role"), "content": text_of(said, where)}
