"""Open Responses' compliance tests: openresponses/openresponses, src/lib/compliance-tests.ts, with its validators; one
image, which this server refuses as a model of text has to. Every event and response is also read by OpenAI's types."""

import pytest

from tests.support.server.replayed import Case, each

PATH = "/v1/responses"
LOCATION = {"type": "string", "description": "The city and state, e.g. San Francisco, CA"}
TOOL = {"type": "function", "name": "get_weather", "description": "Get the current weather for a location", "parameters": {"type": "object", "properties": {"location": LOCATION}, "required": ["location"]}}  # fmt: skip
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"location": "San Francisco, CA"}}\n</tool_call>'
PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII="
)
OPENAI = "the openai package is not installed"


def message(role: str, content: object) -> dict:
    return {"type": "message", "role": role, "content": content}


def final(reply) -> dict:
    """The response, which a stream's last event holds; by OpenAI's own types where they are installed."""
    streamed = reply.text.startswith("event:")
    response = reply.events[-1]["response"] if streamed else reply.json
    types = pytest.importorskip("openai.types.responses", reason=OPENAI)
    types.Response.model_validate(response, strict=False)
    if streamed:
        from pydantic import TypeAdapter

        for event in reply.events:
            TypeAdapter(types.ResponseStreamEvent).validate_python(event)
        assert [event["sequence_number"] for event in reply.events] == list(range(len(reply.events)))
    return response


def is_completed(reply) -> bool:
    response = final(reply)
    return response["status"] == "completed" and len(response["output"]) > 0


def has_call(reply) -> bool:
    return is_completed(reply) and "function_call" in {item["type"] for item in final(reply)["output"]}


def streams_call(reply) -> bool:
    kinds = [event["type"] for event in reply.events]
    items = {event["type"] for event in reply.events if event.get("item", {}).get("type") == "function_call"}
    deltas = {"response.function_call_arguments.delta", "response.function_call_arguments.done"}
    return (
        has_call(reply)
        and deltas <= set(kinds)
        and items == {"response.output_item.added", "response.output_item.done"}
    )


ALICE = [message("user", "My name is Alice."), message("assistant", "Hello Alice! How can I help you?"), message("user", "What is my name?")]  # fmt: skip
WEATHER = [message("user", "What's the weather like in San Francisco?")]
HEART = [
    message("user", [{"type": "input_text", "text": "What do you see?"}, {"type": "input_image", "image_url": PIXEL}])
]
CASES = [
    Case(name="basic-response", path=PATH, says="Hello to you.", body={"model": "tiny", "input": [message("user", "Say hello in exactly 3 words.")], "stream": False}, check=is_completed),
    Case(name="streaming-response", path=PATH, says="1 2 3 4 5", body={"model": "tiny", "input": [message("user", "Count from 1 to 5.")], "stream": True}, check=is_completed),
    Case(name="system-prompt", path=PATH, says="Ahoy.", body={"model": "tiny", "input": [message("system", "You are a pirate."), message("user", "Say hello.")], "stream": False}, check=lambda r: is_completed(r) and "pirate" in r.prompts[0]),
    Case(name="tool-calling", path=PATH, says=CALL, body={"model": "tiny", "input": WEATHER, "tools": [TOOL], "stream": False}, check=has_call),
    Case(name="tool-calling-streaming", path=PATH, says=CALL, body={"model": "tiny", "input": WEATHER, "tools": [TOOL], "stream": True}, check=streams_call),
    Case(name="image-input", path=PATH, body={"model": "tiny", "input": HEART, "stream": False}, status=400, error="text only"),
    Case(name="multi-turn", path=PATH, says="Alice.", body={"model": "tiny", "input": ALICE, "stream": False}, check=lambda r: is_completed(r) and "Hello Alice!" in r.prompts[0]),
    Case(name="reasoning in a stream", path=PATH, says="<think>Hm</think>\n\nYes.", body={"model": "tiny", "input": ALICE, "stream": True}, check=lambda r: is_completed(r) and [item["type"] for item in final(r)["output"]] == ["reasoning", "message"]),
    Case(name="cut off in a stream", path=PATH, says="1 2 3 4 5 6 7", body={"model": "tiny", "input": ALICE, "stream": True, "max_output_tokens": 3}, check=lambda r: final(r)["status"] == "incomplete" and r.kinds[-1] == "response.incomplete"),
]  # fmt: skip


@each(CASES)
def test_open_responses(replay, case):
    replay(case)
