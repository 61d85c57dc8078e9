"""Recorded streams of Anthropic's package: anthropics/anthropic-sdk-python, tests/lib/streaming/fixtures. Ours have the
same events in the same order with the same fields, and the package puts the same message together."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.support.server.replayed import Case, Reply, each
from tests.support.server.scripted import saying

PATH = "/v1/messages"
HELLO = [{"role": "user", "content": "Say hello there!"}]
TOOL = {"name": "get_weather", "input_schema": {"type": "object", "properties": {"location": {"type": "string"}}}}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"location": "Paris"}}\n</tool_call>'
TEXT = ["content_block_start", "content_block_delta", "content_block_stop"]
START, END = ["message_start"], ["message_delta", "message_stop"]
# Fields of the recorded events, which ours have too.
FIELDS = {
    "message_start": {"type", "message"},
    "content_block_start": {"type", "index", "content_block"},
    "content_block_delta": {"type", "index", "delta"},
    "content_block_stop": {"type", "index"},
    "message_delta": {"type", "delta", "usage"},
    "message_stop": {"type"},
}
MESSAGE = {"id", "type", "role", "model", "content", "stop_reason", "stop_sequence", "usage"}


@dataclass(frozen=True)
class Stream:
    """says: by the model. kinds: of the events, runs as one. blocks: of the message. stop_reason: of it."""

    name: str
    says: str
    kinds: list[str]
    blocks: list[tuple[str, Any]]
    stop_reason: str = "end_turn"
    more: dict[str, Any] = field(default_factory=dict)


CASES = [
    Stream("basic_response", "Hello there!", START + TEXT + END, [("text", "Hello there!")]),
    Stream("tool_use_response", f"I'll check.\n{CALL}", START + TEXT * 2 + END, [("text", "I'll check."), ("tool_use", {"location": "Paris"})], "tool_use", {"tools": [TOOL]}),
    Stream("incomplete_partial_json_response", f"I'll check.\n{CALL[:-16]}", START + TEXT + END, [("text", None)], "max_tokens", {"tools": [TOOL], "max_tokens": 14}),
    Stream("tool_use_invalid_json_response", CALL.replace('"Paris"', ""), START + TEXT + END, [("text", CALL.replace('"Paris"', ""))], "end_turn", {"tools": [TOOL]}),
    Stream("thinking before text", "<think>Hm</think>\n\nHello!", START + TEXT * 2 + END, [("thinking", "Hm"), ("text", "Hello!")]),
    Stream("two tools", f"{CALL}\n{CALL}", START + TEXT * 2 + END, [("tool_use", {"location": "Paris"})] * 2, "tool_use", {"tools": [TOOL]}),
    Stream("stop_sequence", "one two three", START + TEXT + END, [("text", "one ")], "stop_sequence", {"stop_sequences": ["two"]}),
    Stream("usage", "Hello there!", START + TEXT + END, [("text", "Hello there!")], "end_turn", {"max_tokens": 50}),
]  # fmt: skip


def has_fields(reply: Reply) -> bool:
    recorded = all(FIELDS[event["type"]] <= set(event) for event in reply.events)
    return recorded and set(reply.events[0]["message"]) >= MESSAGE and reply.events[-2]["usage"]["output_tokens"] > 0


@each(CASES)
def test_anthropic_python(replay, tooled, case):
    body = {"model": "tiny", "max_tokens": 90, "messages": HELLO, **case.more}
    replay(Case(name="", path=PATH, says=case.says, body=body | {"stream": True}, check=lambda r: has_fields(r) and r.kinds == case.kinds))  # fmt: skip
    anthropic = pytest.importorskip("anthropic", reason="the anthropic package is not installed")
    client = anthropic.Anthropic(base_url=tooled.url, api_key="none", max_retries=0)
    with saying(tooled.llm, case.says), client.messages.stream(**body) as stream:
        message = stream.get_final_message()

    found = [(block.type, block.input if block.type == "tool_use" else getattr(block, block.type)) for block in message.content]  # fmt: skip
    assert message.stop_reason == case.stop_reason and len(found) == len(case.blocks)
    for (kind, value), (expected_kind, expected) in zip(found, case.blocks):
        assert kind == expected_kind and expected in (None, value)
