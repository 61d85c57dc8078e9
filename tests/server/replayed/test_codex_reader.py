"""How Codex reads a stream: openai/codex, codex-rs/codex-api/src/sse/responses.rs and its tests. The reader below takes
and leaves the same events; what it makes of ours is what Codex makes of them."""

from dataclasses import dataclass, field
from typing import Any

from tests.support.server.replayed import Case, Reply, each

TOOL = {"type": "function", "name": "shell", "strict": False, "parameters": {"type": "object", "properties": {"command": {"type": "array", "items": {"type": "string"}}}, "required": ["command"]}}  # fmt: skip
CALL = '<tool_call>\n{"name": "shell", "arguments": {"command": ["ls", "-l"]}}\n</tool_call>'
ITEM_FIELDS = {"message": {"role", "content"}, "function_call": {"name", "arguments", "call_id"}, "reasoning": {"summary"}}  # fmt: skip


@dataclass
class Turn:
    """What the reader has made of a stream."""

    created: int = 0
    added: list[str] = field(default_factory=list)
    done: list[dict[str, Any]] = field(default_factory=list)
    text: str = ""
    reasoning: str = ""
    usage: dict[str, Any] | None = None
    error: str | None = "stream closed before response.completed"


def read(reply: Reply) -> Turn:
    """A stream, event by event; what is unknown or has other fields is left, as there."""
    turn = Turn()
    for event in reply.events:
        kind, item = event["type"], event.get("item")
        if kind == "response.created" and event.get("response") is not None:
            turn.created += 1
        elif kind == "response.output_item.added" and ITEM_FIELDS[item["type"]] <= set(item):
            turn.added.append(item["type"])
        elif kind == "response.output_item.done" and ITEM_FIELDS[item["type"]] <= set(item):
            turn.done.append(item)
        elif kind == "response.output_text.delta" and isinstance(event["delta"], str):
            turn.text += event["delta"]
        elif kind == "response.reasoning_text.delta" and isinstance(event["content_index"], int):
            turn.reasoning += event["delta"]
        elif kind == "response.failed":
            turn.error = event["response"]["error"]["code"]
        elif kind == "response.completed" and isinstance(event["response"]["id"], str):
            turn.usage, turn.error = event["response"]["usage"], None
    return turn


def kinds(turn: Turn) -> list[str]:
    return [item["type"] for item in turn.done]


def counts(turn: Turn) -> bool:
    usage = turn.usage
    own = ("input_tokens", "output_tokens", "total_tokens")
    return (
        all(type(usage[name]) is int for name in own)
        and type(usage["input_tokens_details"]["cached_tokens"]) is int
        and type(usage["output_tokens_details"]["reasoning_tokens"]) is int
    )


def case(name: str, says: str | None, check, **more: object) -> Case:
    body = {"model": "tiny", "stream": True, "store": False, "input": [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hello"}]}], **more}  # fmt: skip
    return Case(name=name, path="/v1/responses", says=says, body=body, check=lambda reply: check(read(reply)))


CASES = [
    case("items and completed", "Hello", lambda t: t.created == 1 and t.added == kinds(t) == ["message"] and t.error is None),
    case("text of the deltas is the item's", "Hello World", lambda t: t.text == t.done[0]["content"][0]["text"] == "Hello World"),
    case("usage has whole numbers", "Hello", counts),
    case("a call", CALL, lambda t: kinds(t) == ["function_call"] and t.done[0]["arguments"] == '{"command": ["ls", "-l"]}', tools=[TOOL]),
    case("words and a call", "I look.\n" + CALL, lambda t: kinds(t) == ["message", "function_call"], tools=[TOOL]),
    case("reasoning and text", "<think>Hm</think>\n\nYes", lambda t: (t.reasoning, t.text, kinds(t)) == ("Hm", "Yes", ["reasoning", "message"])),
    case("tools of other kinds are left out", "Hello", lambda t: t.error is None, tools=[TOOL, {"type": "web_search"}, {"type": "custom", "name": "apply_patch"}, {"type": "local_shell"}]),
    case("beyond the context", None, lambda t: t.error == "context_length_exceeded" and t.created == 1, input="word " * 4000),
]  # fmt: skip


@each(CASES)
def test_codex_reader(replay, case):
    replay(case)
