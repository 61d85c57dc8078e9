"""Ollama's tests: ollama/ollama, middleware/openai_test.go and anthropic_test.go, openai/responses_test.go,
integration/ (tools, think, context); the lines are those of docs/api.md there."""

from tests.support.server.replayed import Case, each

CHAT, OPENAI, RESPONSES = "/api/chat", "/v1/chat/completions", "/v1/responses"
HELLO = [{"role": "user", "content": "Hello"}]
PARIS = [{"role": "user", "content": "What's the weather like in Paris Today?"}]
ARGUMENTS = '{"location": "Paris, France", "format": "celsius"}'
FUNCTION = {"name": "get_current_weather", "arguments": ARGUMENTS}
CALLS = [{"id": "id_abc", "type": "function", "function": FUNCTION}]
DEGREES = "The weather in Paris is 20 degrees Celsius"
TOOL = {"type": "function", "function": {"name": "get_weather", "description": "Get the current weather", "parameters": {"type": "object", "required": ["location"], "properties": {"location": {"type": "string"}, "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]}}}}}  # fmt: skip
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"location": "Paris", "unit": "celsius"}}\n</tool_call>'
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII="
ITEM = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "what is the weather?"}]}
FLAT_CALL = {"type": "function_call", "call_id": "call_abc123", "name": "get_weather", "arguments": '{"city":"Paris"}'}
FLAT_RESULT = {"type": "function_call_output", "call_id": "call_abc123", "output": "sunny, 72F"}
SAID = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I'll check the weather."}]}


def asked(name: str, *more: dict, check, says: str = "A.", **fields: object) -> Case:
    """A chat by OpenAI's protocol, as its middleware takes it."""
    return Case(
        name=name,
        path=OPENAI,
        says=says,
        body={"model": "test-model", "messages": [*PARIS, *more], **fields},
        check=check,
    )


def assistant(**fields: object) -> dict:
    return {"role": "assistant", "tool_calls": CALLS, **fields}


def has_call(reply) -> bool:
    return '"name": "get_current_weather"' in reply.prompts[0] and '"celsius"' in reply.prompts[0]


def ends(reply) -> bool:
    """Lines with words, and a last one with counts and nanoseconds."""
    last = reply.lines[-1]
    counts = (
        "total_duration",
        "load_duration",
        "prompt_eval_count",
        "prompt_eval_duration",
        "eval_count",
        "eval_duration",
    )
    return (
        all(not line["done"] for line in reply.lines[:-1])
        and last["done"]
        and all(type(last[name]) is int for name in counts)
    )


def responses(name: str, body: object, check=None, status: int = 200) -> Case:
    return Case(
        name=name, path=RESPONSES, says="A.", body={"model": "gpt-oss:20b", "input": body}, check=check, status=status
    )


CASES = [
    asked("a chat", check=lambda r: r.said == "A." and r.json["object"] == "chat.completion"),
    asked("a chat with options", says="one two", check=lambda r: r.streamed == "one ", stream=True, max_tokens=99, seed=123, stop=["two", "stop"], temperature=3.0, frequency_penalty=0.4, presence_penalty=0.5, top_p=0.6),
    asked("usage of a stream", check=lambda r: r.events[-1]["usage"]["total_tokens"] > 0, stream=True, stream_options={"include_usage": True}),
    asked("a call in the history", assistant(), check=has_call),
    asked("a call beside words", assistant(content="Let's see"), check=lambda r: has_call(r) and "Let's see" in r.prompts[0]),
    asked("a call beside empty words", assistant(content=""), check=has_call),
    asked("a call beside reasoning", assistant(reasoning="Let's see"), check=lambda r: has_call(r) and "<think>Let's see</think>" in r.prompts[0]),
    asked("a result by its id", assistant(), {"role": "tool", "tool_call_id": "id_abc", "content": DEGREES}, check=lambda r: DEGREES in r.prompts[0]),
    asked("a result by its name", assistant(), {"role": "tool", "name": "get_current_weather", "content": DEGREES}, check=lambda r: DEGREES in r.prompts[0]),
    asked("a tool in a stream", says=CALL, check=lambda r: [c["function"]["name"] for d in r.deltas for c in d.get("tool_calls", ())] == ["get_weather"], stream=True, tools=[TOOL]),
    asked("reasoning_effort", check=lambda r: r.prompts[0].endswith("<think></think>"), reasoning_effort="none"),
    Case(name="an image", path=OPENAI, body={"messages": [{"role": "user", "content": [{"type": "text", "text": "Hello"}, {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64," + PIXEL}}]}]}, status=400, error="text only"),
    Case(name="a content that is a number", path=OPENAI, body={"messages": [{"role": "user", "content": 2}]}, status=400, check=lambda r: r.json["error"]["type"] == "invalid_request_error"),
    Case(name="a completion with a suffix", path="/v1/completions", body={"model": "test-model", "prompt": "Hello", "suffix": "suffix"}, status=400, error="suffix"),
    Case(name="a completion with stops", path="/v1/completions", says="a\nb", body={"prompt": "Hello", "temperature": 0.8, "stop": ["\n", "stop"]}, check=lambda r: r.said == "a"),
    Case(name="the models", path="/v1/models", check=lambda r: r.json["object"] == "list" and set(r.json["data"][0]) >= {"id", "object", "created", "owned_by"}),
    Case(name="a model that there is not", path="/v1/models/gpt-4", status=404),
    responses("a text", "hello", lambda r: r.said == "A."),
    responses("a list of messages", [{"type": "message", "role": "system", "content": [{"type": "input_text", "text": "you are helpful"}]}, ITEM], lambda r: r.prompts[0].index("you are helpful") < r.prompts[0].index("weather")),
    responses("a number", 123, status=400),
    responses("nothing", [], status=400),
    responses("an item that is unknown", [{"type": "unknown_type"}], status=400),
    responses("a content that is unknown", [{"type": "message", "role": "user", "content": [{"type": "unknown"}]}], status=400),
    responses("a call and its result", [ITEM, FLAT_CALL, FLAT_RESULT], lambda r: r.prompts[0].index('{"city": "Paris"}') < r.prompts[0].index("sunny, 72F")),
    responses("a call joins the words before it", [ITEM, SAID, FLAT_CALL, FLAT_RESULT], lambda r: r.prompts[0].count("<|assistant|>") == 2 and "weather.<tool_call>" in r.prompts[0]),
    Case(name="lines", path=CHAT, says="one two", body={"model": "tiny", "messages": HELLO}, check=ends),
    Case(name="one object", path=CHAT, says="one two", body={"model": "tiny", "messages": HELLO, "stream": False}, check=lambda r: r.json["message"]["content"] == "one two" and r.json["done"]),
    Case(name="options", path=CHAT, says="one two", body={"model": "tiny", "messages": HELLO, "stream": False, "options": {"num_predict": 1, "seed": 1, "temperature": 0.1, "num_ctx": 4096}}, check=lambda r: r.json["done_reason"] == "length" and r.json["eval_count"] == 1),
    Case(name="a tool", path=CHAT, says=CALL, body={"messages": HELLO, "tools": [TOOL], "stream": False}, check=lambda r: r.json["message"]["tool_calls"][0]["function"]["arguments"] == {"location": "Paris", "unit": "celsius"}),
    Case(name="thinking", path=CHAT, says="<think>Hm</think>\n\nYes.", body={"messages": HELLO, "think": True, "stream": False}, check=lambda r: (r.json["message"]["thinking"], r.json["message"]["content"]) == ("Hm", "Yes.")),
    Case(name="no thinking", path=CHAT, says="Yes.", body={"messages": HELLO, "think": False, "stream": False}, check=lambda r: r.prompts[0].endswith("<think></think>")),
    Case(name="a form", path=CHAT, body={"messages": HELLO, "stream": False, "format": {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"], "additionalProperties": False}}, check=lambda r: r.json["message"]["content"] in ('{"ok": true}', '{"ok": false}')),
    Case(name="generate", path="/api/generate", says="one", body={"prompt": "Why is the sky blue?", "stream": False}, check=lambda r: r.json["response"] == "one"),
    Case(name="generate raw", path="/api/generate", says="one", body={"prompt": "Why", "raw": True, "stream": False}, check=lambda r: "<|user|>" not in r.prompts[0]),
    Case(name="loading", path="/api/generate", body={"model": "tiny"}, check=lambda r: r.json["done_reason"] == "load"),
    Case(name="tags", path="/api/tags", check=lambda r: r.json["models"][0]["name"] == r.json["models"][0]["model"]),
    Case(name="show", path="/api/show", body={"model": "tiny"}, check=lambda r: {"completion", "tools", "thinking"} == set(r.json["capabilities"])),
    Case(name="too long", path=CHAT, body={"messages": [{"role": "user", "content": "word " * 4000}]}, status=400, error="maximum context length"),
]  # fmt: skip


@each(CASES)
def test_ollama(replay, case):
    replay(case)
