"""llama-server's own tests: ggml-org/llama.cpp, tools/server/tests/unit (test_chat_completion, test_completion,
test_compat_anthropic, test_compat_oai_responses, test_security, test_metrics, test_ignore_eos, test_tokenize)."""

import re

from tests.server.replayed.conftest import KEY
from tests.support.server.replayed import Case, each

CHAT, TEXT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses"
COUNT = "/v1/messages/count_tokens"
BOOK = [{"role": "system", "content": "Book"}, {"role": "user", "content": "What is the best book"}]
HELLO = [{"role": "user", "content": "Say hello"}]
PARTS = [{"type": "text", "text": "What is "}, {"type": "text", "text": "the best book"}]
LOCATION = {"type": "object", "properties": {"location": {"type": "string"}}, "required": ["location"]}
WEATHER = {"name": "get_weather", "description": "Get the weather", "input_schema": LOCATION}
USE = {"role": "assistant", "content": [{"type": "tool_use", "id": "t1", "name": "get_weather", "input": {"location": "Paris"}}]}  # fmt: skip
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"location": "Paris"}}\n</tool_call>'


def result(*more: dict, **fields: object) -> list[dict]:
    """A conversation that sends a tool's result back."""
    block = {"type": "tool_result", "tool_use_id": "t1", "content": "Sunny, 25°C", **fields}
    return [{"role": "user", "content": "What's the weather?"}, USE, {"role": "user", "content": [*more, block]}]


def format_case(name: str, form: object, text: str | None) -> Case:
    """An answer in a form that is asked for, or a form that cannot be asked for."""
    body = {"max_tokens": 30, "messages": BOOK, "response_format": form, "temperature": 0}
    if text is None:
        return Case(name=name, path=CHAT, body=body, status=400)
    return Case(name=name, path=CHAT, body=body, check=lambda reply: re.match(text, reply.said))


def starts_well(reply) -> bool:
    """The role in the first chunk and in no other, the end in a chunk without content, one id."""
    roles = ["role" in delta for delta in reply.deltas]
    last = reply.events[-1]["choices"][0]
    ids = {event["id"] for event in reply.events}
    return (
        roles[0] and not any(roles[1:]) and last["delta"] == {} and last["finish_reason"] == "length" and len(ids) == 1
    )


def joins(reply) -> bool:
    """Tokens with log-probabilities, their bytes and alternatives, that join to the text."""
    entries = reply.choice["logprobs"]["content"]
    whole = all(entry["logprob"] <= 0 and entry["bytes"] and entry["top_logprobs"] for entry in entries)
    return whole and "".join(entry["token"] for entry in entries) == reply.said


def joins_in_stream(reply) -> bool:
    entries = [e for c in reply.events for e in (c["choices"][0]["logprobs"] or {}).get("content", ())]
    return bool(entries) and "".join(entry["token"] for entry in entries) == reply.streamed


def usage_is_whole(reply) -> bool:
    usage = reply.json["usage"]
    return all(type(usage[name]) is int for name in ("input_tokens", "output_tokens", "cache_read_input_tokens"))


def blocks_in_order(reply) -> bool:
    first = reply.events[0]["message"]
    started = reply.events[1]
    return (
        reply.kinds == ["message_start", "content_block_start", "content_block_delta", "content_block_stop", "message_delta", "message_stop"]
        and first["content"] == [] and first["role"] == "assistant" and first["usage"]["input_tokens"] > 0
        and started["index"] == 0 and started["content_block"]["type"] == "text" and "timings" not in reply.text
    )  # fmt: skip


def ids_hold(reply) -> bool:
    """One response and one message throughout a stream, whose deltas join to the text at the end."""
    response = reply.events[-1]["response"]
    (item,) = response["output"]
    ids = {event["item_id"] for event in reply.events if "item_id" in event}
    said = "".join(event["delta"] for event in reply.events if event["type"] == "response.output_text.delta")
    same = {event["response"]["id"] for event in reply.events if "response" in event}
    return (
        ids == {item["id"]} and item["id"].startswith("msg_") and said == item["content"][0]["text"] and len(same) == 1
    )


def invalid(number: int, messages: object) -> Case:
    return Case(name=f"invalid messages {number}", path=CHAT, body={"messages": messages}, status=400)


INVALID = [None, "string", [123], [{}], [{"role": 123}], [{"role": "system", "content": 123}], [{"role": "system", "content": "t"}, {}]]  # fmt: skip
CASES = [
    Case(name="system and user", path=CHAT, body={"model": "m", "max_tokens": 8, "ignore_eos": True, "messages": BOOK},
         check=lambda r: "cmpl" in r.json["id"] and r.choice["message"]["role"] == "assistant" and r.choice["finish_reason"] == "length" and r.json["usage"]["completion_tokens"] == 8),
    Case(name="parts of text", path=CHAT, says="A.", body={"messages": [{"role": "user", "content": PARTS}]},
         check=lambda r: "What is the best book" in r.prompts[0]),
    Case(name="stream", path=CHAT, body={"max_tokens": 8, "ignore_eos": True, "messages": BOOK, "stream": True}, check=starts_well),
    Case(name="another model's name", path=CHAT, says="A.", body={"model": "gpt-3.5-turbo-instruct", "messages": BOOK}, check=lambda r: r.said == "A."),
    Case(name="prefill", path=CHAT, says="er", body={"messages": [*BOOK, {"role": "assistant", "content": "Whill"}], "continue_final_message": True, "add_generation_prompt": False},
         check=lambda r: r.prompts[0].endswith("Whill")),
    Case(name="prefill in parts", path=CHAT, says="er", body={"messages": [*BOOK, {"role": "assistant", "content": [{"type": "text", "text": "Wh"}, {"type": "text", "text": "ill"}]}], "continue_final_message": True, "add_generation_prompt": False},
         check=lambda r: r.prompts[0].endswith("Whill")),
    format_case("json_object with a schema", {"type": "json_object", "schema": {"const": "42"}}, '"42"$'),
    format_case("json_object of a list", {"type": "json_object", "schema": {"type": "array", "items": {"type": "integer"}, "maxItems": 2}}, r"\["),
    format_case("json_schema", {"type": "json_schema", "json_schema": {"schema": {"const": "foooooo"}}}, '"foooooo"$'),
    format_case("json_object", {"type": "json_object"}, r"\{"),
    format_case("sound", {"type": "sound"}, None),
    format_case("a schema that is a number", {"type": "json_object", "schema": 123}, None),
    format_case("a type that is a number", {"type": "json_object", "schema": {"type": 123}}, None),
    format_case("a type that is none", {"type": "json_object", "schema": {"type": "hiccup"}}, None),
    *[invalid(number, messages) for number, messages in enumerate(INVALID)],
    Case(name="logprobs", path=CHAT, body={"messages": BOOK, "max_tokens": 5, "temperature": 0, "logprobs": True, "top_logprobs": 10}, check=joins),
    Case(name="logprobs in a stream", path=CHAT, body={"messages": BOOK, "max_tokens": 5, "temperature": 0, "logprobs": True, "top_logprobs": 10, "stream": True}, check=joins_in_stream),
    Case(name="too long", path=CHAT, body={"messages": [{"role": "user", "content": "word " * 4000}]}, status=400, check=lambda r: r.json["error"]["code"] == "context_length_exceeded"),
    Case(name="usage in a stream", path=CHAT, says="A b c.", body={"messages": BOOK, "stream": True, "stream_options": {"include_usage": True}}, check=lambda r: r.events[-1]["choices"] == [] and r.events[-1]["usage"]["completion_tokens"] > 2),
    Case(name="text goes on", path=TEXT, body={"prompt": "I believe the meaning of life is", "max_tokens": 8, "ignore_eos": True}, check=lambda r: r.choice["finish_reason"] == "length" and r.json["usage"]["completion_tokens"] == 8),
    Case(name="two prompts", path=TEXT, says="A.", body={"prompt": ["I believe", "You believe"]}, check=lambda r: [choice["index"] for choice in r.json["choices"]] == [0, 1]),
    Case(name="prompt of ids", path=TEXT, says="A.", body={"prompt": [5, 6, 7]}, check=lambda r: r.json["usage"]["prompt_tokens"] == 3),
    Case(name="the same seed", path=TEXT, body={"prompt": "I believe", "max_tokens": 12, "seed": 42, "temperature": 1.0}, check=lambda r: r.again().said == r.said),
    Case(name="greedy twice", path=TEXT, body={"prompt": "I believe", "max_tokens": 12, "temperature": 0}, check=lambda r: r.again().said == r.said),
    Case(name="several choices", path=TEXT, body={"prompt": "I believe", "max_tokens": 3, "n": 4}, check=lambda r: len(r.json["choices"]) == 4),
    Case(name="stop", path=TEXT, says="one two three", body={"prompt": "Count", "stop": ["two"]}, check=lambda r: r.said == "one " and r.choice["finish_reason"] == "stop"),
    Case(name="end ignored", path=TEXT, body={"prompt": "A list", "max_tokens": 32, "ignore_eos": True}, check=lambda r: r.json["usage"]["completion_tokens"] == 32),
    Case(name="a message", path=MESSAGES, says="Hello.", body={"model": "test", "max_tokens": 50, "messages": HELLO},
         check=lambda r: r.json["content"] == [{"type": "text", "text": "Hello."}] and r.json["stop_reason"] == "end_turn" and "timings" not in r.json and usage_is_whole(r)),
    Case(name="a message with a system text", path=MESSAGES, says="A.", body={"max_tokens": 50, "system": "You are a helpful assistant.", "messages": HELLO}, check=lambda r: "helpful assistant" in r.prompts[0]),
    Case(name="a message of parts", path=MESSAGES, says="A.", body={"max_tokens": 50, "messages": [{"role": "user", "content": PARTS}]}, check=lambda r: "What is the best book" in r.prompts[0]),
    Case(name="a message after others", path=MESSAGES, says="A.", body={"max_tokens": 50, "messages": [*HELLO, {"role": "assistant", "content": "Hi there!"}, *HELLO]}, check=lambda r: "Hi there!" in r.prompts[0]),
    Case(name="a message in a stream", path=MESSAGES, says="Hello you.", body={"max_tokens": 30, "messages": HELLO, "stream": True}, check=blocks_in_order),
    Case(name="tokens of a message", path=COUNT, body={"messages": HELLO}, check=lambda r: list(r.json) == ["input_tokens"] and r.json["input_tokens"] > 0),
    Case(name="tokens with a system text", path=COUNT, body={"system": "You are a helpful assistant.", "messages": HELLO}, check=lambda r: r.json["input_tokens"] > 8),
    Case(name="tokens with tools", path=COUNT, body={"messages": HELLO, "tools": [WEATHER]}, check=lambda r: r.json["input_tokens"] > 20),
    Case(name="a tool is used", path=MESSAGES, says=CALL, body={"max_tokens": 200, "messages": HELLO, "tools": [WEATHER]},
         check=lambda r: r.json["stop_reason"] == "tool_use" and r.json["content"][-1]["input"] == {"location": "Paris"}),
    Case(name="a tool is used in a stream", path=MESSAGES, says=CALL, body={"max_tokens": 200, "messages": HELLO, "tools": [WEATHER], "stream": True},
         check=lambda r: [e["content_block"]["name"] for e in r.events if e["type"] == "content_block_start"] == ["get_weather"]),
    Case(name="a tool's result", path=MESSAGES, says="A.", body={"max_tokens": 100, "messages": result()}, check=lambda r: "Sunny, 25°C" in r.prompts[0]),
    Case(name="a tool's result beside words", path=MESSAGES, says="A.", body={"max_tokens": 100, "messages": result({"type": "text", "text": "Here are the results:"})}, check=lambda r: "Here are the results:" in r.prompts[0]),
    Case(name="a tool that failed", path=MESSAGES, says="A.", body={"max_tokens": 100, "messages": result(is_error=True, content="City not found")}, check=lambda r: "City not found" in r.prompts[0]),
    Case(name="no messages", path=MESSAGES, body={"max_tokens": 1}, status=400, error="messages"),
    Case(name="a stop sequence", path=MESSAGES, says="one two", body={"max_tokens": 9, "messages": HELLO, "stop_sequences": ["two"]}, check=lambda r: r.json["stop_reason"] == "stop_sequence" and r.json["stop_sequence"] == "two"),
    Case(name="a response in a schema", path=RESPONSES, body={"input": "Write an example", "max_output_tokens": 20, "text": {"format": {"type": "json_schema", "name": "t", "schema": {"const": "foooooo"}}}}, check=lambda r: r.said == '"foooooo"'),
    Case(name="a response in JSON", path=RESPONSES, body={"input": "Write an example", "max_output_tokens": 10, "text": {"format": {"type": "json_object"}}}, check=lambda r: r.said.startswith("{")),
    Case(name="a response in text", path=RESPONSES, says="A.", body={"input": "Write an example", "text": {"format": {"type": "text"}}}, check=lambda r: r.said == "A."),
    Case(name="a schema that is missing", path=RESPONSES, body={"input": "a", "text": {"format": {"type": "json_schema", "name": "t"}}}, status=400),
    Case(name="ids of a response", path=RESPONSES, says="A.", body={"model": "gpt-4.1", "input": BOOK}, check=lambda r: r.json["id"].startswith("resp_") and r.json["output"][0]["id"].startswith("msg_")),
    Case(name="a response in a stream", path=RESPONSES, says="A book.", body={"input": BOOK, "stream": True}, check=ids_hold),
    Case(name="health needs no key", path="/health", key="", check=lambda r: r.json["status"] == "ready"),
    Case(name="the page needs no key", path="/", key=""),
    Case(name="no key", path=TEXT, body={"prompt": "I believe"}, key="", status=401, check=lambda r: r.json["error"]["type"] == "authentication_error"),
    Case(name="a wrong key", path=TEXT, body={"prompt": "I believe"}, key="invalid-key", status=401),
    Case(name="the right key", path="/v1/models", key=KEY, check=lambda r: r.json["object"] == "list"),
    Case(name="the right key in Anthropic's header", path="/v1/models", key="", headers={"x-api-key": KEY}),
    Case(name="metrics", path="/metrics", check=lambda r: "vllm:num_requests_running" in r.text and "# TYPE" in r.text),
    Case(name="tokens of a text", path="/tokenize", body={"prompt": "What is the best book"}, check=lambda r: r.json["count"] == len(r.json["tokens"]) > 2),
    Case(name="no embeddings", path="/v1/embeddings", body={"input": "a"}, status=404),
]  # fmt: skip


@each(CASES)
def test_llama_server(replay, case):
    replay(case)
