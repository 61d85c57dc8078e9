"""vLLM's tests of its entry points: vllm-project/vllm, tests/entrypoints (openai/chat_completion, openai/completion,
anthropic, instrumentator/test_metrics, test_tool_choice_null, test_non_object_body_validation)."""

import re

from tests.support.server.replayed import Case, each

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "what is 1+1?"}]
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}  # fmt: skip
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Dallas"}}\n</tool_call>'


def chat(
    name: str, check=None, *, says: str | None = None, status: int = 200, error: str | None = None, **more
) -> Case:
    """A chat completion."""
    body = {"messages": HI, "max_tokens": 10, "temperature": 0, **more}
    return Case(name=name, path=CHAT, body=body, says=says, status=status, error=error, check=check)


def text(
    name: str, check=None, *, says: str | None = None, status: int = 200, error: str | None = None, **more
) -> Case:
    """A text completion."""
    body = {"prompt": "An LLM is", "max_tokens": 5, "temperature": 0, **more}
    return Case(name=name, path=TEXT, body=body, says=says, status=status, error=error, check=check)


def offsets_hold(reply) -> bool:
    """Every token stands in the text where its offset says."""
    found = reply.choice["logprobs"]
    return all(reply.said[at:].startswith(token) for at, token in zip(found["text_offset"], found["tokens"]))


def usage_in_every_chunk(reply) -> bool:
    counts = [chunk["usage"]["completion_tokens"] for chunk in reply.events]
    return counts == sorted(counts) and counts[-1] > 0 and reply.events[-1]["choices"] == []


def at_rest(reply) -> bool:
    """Gauges are at 0 when nothing is asked for."""
    gauges = dict(re.findall(r"^(vllm:num_requests_\w+) (\S+)$", reply.text, re.M))
    return set(map(float, gauges.values())) == {0.0} and len(gauges) == 2


SHORT = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string", "maxLength": 20}}, "required": ["city"]}}}  # fmt: skip
NAMED = {"type": "function", "function": {"name": "get_weather"}}
CASES = [
    Case(name="a body that is a list", path=CHAT, body=b"[1, 2]", status=400, error="object"),
    Case(name="a body that is a number", path=CHAT, body=b"3", status=400, error="object"),
    Case(name="a body that is null", path=CHAT, body=b"null", status=400, error="object"),
    Case(name="a body that is text", path=CHAT, body=b'"text"', status=400, error="object"),
    chat("no logprobs unless asked for", lambda r: r.choice["logprobs"] is None, logprobs=False),
    chat("logprobs without alternatives", lambda r: all(e["top_logprobs"] == [] for e in r.choice["logprobs"]["content"]), logprobs=True, top_logprobs=0),
    chat("five alternatives", lambda r: all(len(e["top_logprobs"]) == 5 for e in r.choice["logprobs"]["content"]), logprobs=True, top_logprobs=5),
    chat("alternatives without logprobs", status=400, error="logprobs", top_logprobs=5),
    chat("too many alternatives", status=400, logprobs=True, top_logprobs=21),
    chat("one token", lambda r: r.choice["finish_reason"] == "length" and r.json["usage"]["completion_tokens"] == 1, says="a b c", max_tokens=1),
    chat("max_completion_tokens", lambda r: r.json["usage"]["completion_tokens"] == 1, says="a b c", max_completion_tokens=1),
    chat("a stream is the whole", lambda r: r.streamed == "one two three", says="one two three", stream=True, max_tokens=30),
    chat("usage at the end", lambda r: r.events[-1]["usage"]["total_tokens"] > 0 and all(c["usage"] is None for c in r.events[:-1]), says="a b", stream=True, stream_options={"include_usage": True}),
    chat("no usage unasked", lambda r: all("usage" not in chunk for chunk in r.events), says="a b", stream=True, stream_options={"include_usage": False}),
    chat("usage in every chunk", usage_in_every_chunk, says="a b c d", stream=True, stream_options={"include_usage": True, "continuous_usage_stats": True}),
    chat("tool_choice null", lambda r: r.said == "a", says="a", tool_choice=None),
    chat("tool_choice null with tools", lambda r: r.said == "a", says="a", tools=[TOOL], tool_choice=None),
    chat("tool_choice none", lambda r: r.calls == [] and r.said == CALL, says=CALL, tools=[TOOL], tool_choice="none", max_tokens=90),
    chat("tool_choice auto", lambda r: r.calls == [("get_weather", {"city": "Dallas"})], says=CALL, tools=[TOOL], tool_choice="auto", max_tokens=90),
    chat("a named tool", lambda r: r.calls[0][0] == "get_weather", tools=[SHORT], tool_choice=NAMED, max_tokens=200, temperature=1, seed=1),
    chat("a tool that must be called", lambda r: r.calls[0][0] == "get_weather", tools=[SHORT], tool_choice="required", max_tokens=200, temperature=1, seed=1),
    chat("a named tool that is not offered", status=400, error="tool_choice", tools=[TOOL], tool_choice={"type": "function", "function": {"name": "nonexistent"}}),
    chat("a tool_choice of another kind", status=400, error="tool_choice", tools=[TOOL], tool_choice={"type": "custom"}),
    chat("required without tools", status=400, error="tool_choice", tool_choice="required"),
    chat("a schema that is missing", status=400, error="schema", response_format={"type": "json_schema"}),
    chat("a form nobody knows", status=400, error="response_format", response_format={"type": "unknown"}),
    chat("one of several words", lambda r: r.said in ("Python", "Java"), structured_outputs={"choice": ["Python", "Java"]}, max_tokens=20),
    chat("a regular expression", lambda r: re.fullmatch(r"\d{1,3}\.\d{1,3}", r.said), structured_outputs={"regex": r"\d{1,3}\.\d{1,3}"}, max_tokens=20),
    chat("an image in a user's message", status=400, error="text only", messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://example.com/a.jpg"}}]}]),
    chat("audio in a system message", status=400, error="text only", messages=[{"role": "system", "content": [{"type": "input_audio", "input_audio": {"data": "a", "format": "wav"}}]}]),
    chat("a system message in parts", lambda r: "Be helpful." in r.prompts[0], says="a", messages=[{"role": "system", "content": [{"type": "text", "text": "Be helpful."}]}, *HI]),
    chat("a bias that is no number", status=400, logit_bias={"5": "much"}),
    chat("a bias of a token that is none", status=400, error="logit_bias", logit_bias={"999999": 1}),
    chat("a stop token that is none", status=400, error="stop_token_ids", stop_token_ids=[999999]),
    chat("a temperature below 0", status=400, error="temperature", temperature=-1),
    chat("a negative seed", lambda r: r.again().said == r.said, seed=-5, temperature=1.0),
    chat("reasoning apart", lambda r: r.choice["message"]["reasoning_content"] == "Hm." and r.said == "Two.", says="<think>\nHm.\n</think>\n\nTwo.", max_tokens=60),
    text("one prompt", lambda r: r.json["object"] == "text_completion" and r.choice["text"], ignore_eos=True),
    text("zero logprobs", lambda r: all(len(top) <= 1 for top in r.choice["logprobs"]["top_logprobs"]), logprobs=0),
    text("five logprobs", lambda r: all(5 <= len(top) <= 6 for top in r.choice["logprobs"]["top_logprobs"]), logprobs=5),
    text("more logprobs than there may be", status=400, error="logprobs", logprobs=21),
    text("offsets", offsets_hold, logprobs=1, max_tokens=8, ignore_eos=True),
    text("offsets behind an echo", lambda r: r.choice["logprobs"]["text_offset"][1] == 0 and r.said.startswith("An LLM is"), logprobs=1, echo=True),
    text("an echo without anything new", lambda r: r.said == "An LLM is" and r.json["usage"]["completion_tokens"] == 0, echo=True, max_tokens=0),
    text("no prompts", status=400, error="prompt", prompt=[]),
    text("a token that is none", status=400, error="999999", prompt=[999999]),
    text("a prompt that is an object", status=400, error="prompt", prompt={"a": 1}),
    text("two prompts in a stream", lambda r: {c["index"] for chunk in r.events for c in chunk["choices"]} == {0, 1}, says="a b", prompt=["An LLM is", "A list is"], stream=True),
    text("n for each of two prompts", lambda r: [c["index"] for c in r.json["choices"]] == [0, 1, 2, 3], prompt=["A", "B"], n=2),
    text("best_of without n", status=400, error="best_of", best_of=2),
    text("a schema", lambda r: re.fullmatch('"(yes|no)"', r.said), structured_outputs={"json": {"enum": ["yes", "no"]}}, max_tokens=20),
    text("a prompt beyond the context", status=400, error="maximum context length", prompt="word " * 4000),
    Case(name="the model's length", path="/v1/models", check=lambda r: r.json["data"][0]["max_model_len"] == 1024),
    Case(name="a message in Anthropic's form", path="/v1/messages", says="a", body={"max_tokens": 9, "messages": HI}, check=lambda r: r.json["content"][0]["text"] == "a"),
    Case(name="Anthropic's form of errors", path="/v1/messages", body={"messages": HI}, status=400, check=lambda r: r.json["type"] == "error" and r.json["error"]["type"] == "invalid_request_error"),
    Case(name="gauges at rest", path="/metrics", check=at_rest),
    Case(name="version", path="/version", check=lambda r: r.json["version"]),
]  # fmt: skip


@each(CASES)
def test_vllm_entrypoints(replay, case):
    replay(case)
