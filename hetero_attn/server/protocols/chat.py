"""`POST /v1/chat/completions`: a conversation goes on by the assistant's next message."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Any

from pydantic import Field
from starlette.requests import Request

from hetero_attn.server.bodies import checked, refuse
from hetero_attn.server.dialogue.answer import Answer, Piece
from hetero_attn.server.dialogue.forced import format_wishes
from hetero_attn.server.dialogue.messages import template_messages
from hetero_attn.server.dialogue.shapes import as_object
from hetero_attn.server.dialogue.tools import Tools, openai_choice, tools_of
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
from hetero_attn.server.protocols.logprobs import chat_logprobs, shown_tokens
from hetero_attn.server.protocols.openai import OpenAIWriter
from hetero_attn.server.protocols.reply import reply
from hetero_attn.server.service import Service
from hetero_attn.server.turn import Conversation, Turn

TEMPLATE_VARIABLES = (
    "enable_thinking",
    "reasoning_effort",
    "thinking",
    "thinking_budget",
    "add_vision_id",
    "documents",
)


class Body(SamplingFields):
    """The body of a chat completion."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_tokens: Integer | None = None
    max_completion_tokens: Integer | None = None
    logprobs: bool | None = False
    top_logprobs: Logprobs | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = True
    functions: Any = None
    function_call: Any = None
    response_format: dict[str, Any] | None = None
    modalities: list[str] | None = None
    audio: Any = None
    web_search_options: Any = None
    chat_template_kwargs: dict[str, Any] | None = None
    chat_template: Any = None
    reasoning_effort: str | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False


async def chat_completions(service: Service, request: Request) -> Any:
    """Answer `POST /v1/chat/completions`, as a stream or as one object. Raises ApiError."""
    body = checked(Body, await service.bodies.read(request))
    _refuse(body)
    check_model(service, body.model)
    count_unknown(service, body)
    choices = 1 if body.n is None else body.n
    turn = Turn(
        prompts=conversation_of(body),
        wishes=_wishes(body),
        choices=choices,
        priority=body.priority or 0,
        names=_names(body),
    )

    def make_writer(generation: Generation) -> ChatWriter:
        return ChatWriter(service, body, generation, choices)

    return await reply(service, request, turn, make_writer, bool(body.stream))


def _refuse(body: Body) -> None:
    refuse(
        body,
        audio="the model makes text",
        web_search_options="nothing is looked up",
        chat_template="the model's own template is used; strangers' templates are programs",
        functions="use tools",
        function_call="use tool_choice",
        **OLDER_FORMS,
    )
    if body.modalities not in (None, [], ["text"]):
        raise ApiError(400, "modalities must be ['text']: the model makes text", param="modalities")
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")


def _wishes(body: Body) -> dict[str, Any]:
    most = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    logprobs = {"logprobs": body.top_logprobs or 0} if body.logprobs else {}
    return body.wishes(most) | logprobs | _form_of(body.response_format or {})


def _names(body: Body) -> dict[str, str]:
    most = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    names = body.names(most, "response_format" if body.response_format else None)
    return names | {"logprobs": "top_logprobs"}


def _form_of(wanted: dict[str, Any]) -> dict[str, Any]:
    kind, schema = wanted.get("type", "text"), None
    if kind == "json_schema":
        schema = as_object(wanted.get("json_schema"), "response_format.json_schema").get("schema")
    elif kind == "json_object" and wanted.get("schema") is not None:  # as llama.cpp's clients write it
        kind, schema = "json_schema", wanted["schema"]
    return format_wishes(kind, schema, "response_format")


def conversation_of(body: Body) -> Conversation:
    """The conversation that a body holds."""
    variables = dict(body.chat_template_kwargs or {})
    for name in variables:
        if name not in TEMPLATE_VARIABLES:
            raise ApiError(
                400,
                f"chat_template_kwargs names {name!r:.40}; it may hold {', '.join(TEMPLATE_VARIABLES)}",
                param="chat_template_kwargs",
            )
    if body.reasoning_effort is not None:
        variables.setdefault("reasoning_effort", body.reasoning_effort)
        variables.setdefault("enable_thinking", body.reasoning_effort != "none")
    return Conversation(
        messages=template_messages(body.messages),
        tools=_tools(body),
        variables=variables,
        opens_answer=body.add_generation_prompt,
        continues=body.continue_final_message,
    )


def _tools(body: Body) -> Tools:
    functions = []
    for number, tool in enumerate(body.tools or ()):
        if tool.get("type", "function") != "function":
            raise ApiError(
                400, f"tools.{number} is a {tool.get('type')!r:.40}; only functions can be called", param="tools"
            )
        functions.append(tool.get("function"))
    return tools_of(functions, openai_choice(body.tool_choice), body.parallel_tool_calls)


class ChatWriter(OpenAIWriter):
    """Writes the chunks of a streamed chat completion, or the whole of one that is not streamed."""

    chunk_object, whole_object = "chat.completion.chunk", "chat.completion"

    def __init__(self, service: Service, body: Body, generation: Generation, choices: int) -> None:
        super().__init__(service, body, generation, "chatcmpl-", choices)
        self.body: Body = body
        self._is_begun = [False] * len(generation.requests)

    def piece(self, piece: Piece) -> Iterable[bytes]:
        """A chunk with what is new, the role in the first of a choice; then one that says why it ended."""
        number, part = piece.choice, piece.part
        delta: dict[str, Any] = {} if self._is_begun[number] else {"role": "assistant", "content": ""}
        self._is_begun[number] = True
        if part.reasoning:
            delta["reasoning_content"] = part.reasoning
        if part.text:
            delta["content"] = part.text
        if part.calls:
            delta["tool_calls"] = [_call_delta(call) for call in part.calls]
        logprobs = self._logprobs(number, piece.first, piece.last)
        if delta or logprobs:
            yield self.chunk([{"index": number, "delta": delta, "logprobs": logprobs, "finish_reason": None}])
        if piece.finish_reason is not None:
            yield self.chunk([{"index": number, "delta": {}, "logprobs": None, "finish_reason": piece.finish_reason}])

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """One object with the message of every choice, why it ended, and what the turn has cost."""
        choices = [
            {
                "index": number,
                "message": _message(answer),
                "logprobs": self._logprobs(number, 0, answer.tokens),
                "finish_reason": answer.finish_reason,
            }
            for number, answer in enumerate(answers)
        ]
        return self.body_with(choices)

    def _logprobs(self, number: int, first: int, last: int) -> dict[str, Any] | None:
        if not self.body.logprobs:
            return None
        return chat_logprobs(self.service.tokenizer, shown_tokens(self.generation.requests[number], first, last))


def _call_delta(call: Any) -> dict[str, Any]:
    function = {"arguments": call.arguments} if call.name is None else {"name": call.name, "arguments": call.arguments}
    head = {} if call.name is None else {"id": call.id, "type": "function"}
    return {"index": call.place, **head, "function": function}


def _message(answer: Answer) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
    if answer.reasoning:
        message["reasoning_content"] = answer.reasoning
    if answer.calls:
        message["content"] = answer.text or None
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in answer.calls
        ]
    return message
