"""Messages as a chat template wants them: plain text, one system message at the front, calls as objects."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from hetero_attn.server.dialogue.shapes import as_list
from hetero_attn.server.failures import ApiError

ROLES = ("system", "user", "assistant", "tool")


def template_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages in OpenAI's form, made plain.

    `developer` is `system`; several system messages become one at the front, as many templates allow no other; the
    arguments of earlier calls, text of JSON, become objects. Raises ApiError that names the message.
    """
    plain = [_message(number, message) for number, message in enumerate(messages)]
    systems = [message["content"] for message in plain if message["role"] == "system"]
    others = [message for message in plain if message["role"] != "system"]
    return [{"role": "system", "content": "\n\n".join(systems)}, *others] if systems else others


def _message(number: int, message: Mapping[str, Any]) -> dict[str, Any]:
    where = f"messages.{number}"
    role = "system" if message.get("role") == "developer" else message.get("role")
    if role not in ROLES:
        raise ApiError(
            400, f"{where}.role is {role!r:.60}; it must be one of {', '.join(ROLES)}", param=f"{where}.role"
        )
    found = {"role": role, "content": text_of(message.get("content"), f"{where}.content")}
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    if isinstance(reasoning, str):
        found["reasoning_content"] = reasoning
    if calls := as_list(message.get("tool_calls"), f"{where}.tool_calls"):
        found["tool_calls"] = [_call(call, f"{where}.tool_calls.{place}") for place, call in enumerate(calls)]
    for name in ("name", "tool_call_id"):
        if isinstance(message.get(name), str):
            found[name] = message[name]
    return found


def text_of(content: Any, where: str) -> str:
    """The text of a content: a string, null, or a list of text parts. Raises ApiError for anything else."""
    if content is None or isinstance(content, str):
        return _unicode(content or "", where)
    if not isinstance(content, Sequence):
        raise ApiError(400, f"{where} is {content!r:.40}; it must be text or a list of parts", param=where)
    texts = []
    for number, part in enumerate(content):
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise ApiError(400, f"{where}.{number} is a {kind!r:.40}; this model reads text only", param=where)
        texts.append(text)
    return _unicode("".join(texts), where)


def _unicode(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ApiError(400, f"{where} is not valid Unicode; give text without surrogates", param=where) from None
    return text


def _call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ApiError(400, f"{where} is no call of a function; give function.name and function.arguments", param=where)
    return {
        "id": call.get("id"),
        "type": "function",
        "function": {"name": function["name"], "arguments": _arguments(function.get("arguments"))},
    }


def _arguments(arguments: Any) -> Any:
    """The object that the text of a call's arguments is; text that is none stays as it is."""
    if not isinstance(arguments, str):
        return arguments or {}
    try:
        return json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return arguments
