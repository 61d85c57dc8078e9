"""OpenAI's own accumulators of streams: openai/openai-python, tests/lib/chat/test_completions_streaming and
tests/lib/responses. The package reads the stream; what it puts together is what the answer without a stream is."""

import json
from dataclasses import dataclass
from typing import Any

import pytest

from tests.support.server.replayed import each
from tests.support.server.scripted import saying

USER = [{"role": "user", "content": "What's the weather like in SF?"}]
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "GetWeather", "parameters": CITY, "strict": False}}
FLAT = {"type": "function", "name": "GetWeather", "parameters": CITY, "strict": False}
ONE = '<tool_call>\n{"name": "GetWeather", "arguments": {"city": "SF"}}\n</tool_call>'
TWO = ONE + "\n" + ONE.replace("SF", "Zürich 🎉")


@dataclass(frozen=True)
class Read:
    """says: by the model. kind: which accumulator. more: fields of the request. content, arguments: what is read."""

    name: str
    kind: str
    says: str
    more: dict[str, Any]
    content: str | None
    arguments: tuple[str, ...] = ()
    finish_reason: str = "stop"


CASES = [
    Read("text", "chat", "I cannot see the weather.", {}, "I cannot see the weather."),
    Read("text with usage", "chat", "I cannot see it.", {"stream_options": {"include_usage": True}}, "I cannot see it."),
    Read("emoji", "chat", "Sunny 🎉 déjà", {}, "Sunny 🎉 déjà"),
    Read("cut off", "chat", "one two three four five", {"max_tokens": 2}, None, (), "length"),
    Read("one call", "chat", ONE, {"tools": [TOOL]}, None, ("SF",), "tool_calls"),
    Read("two calls", "chat", TWO, {"tools": [TOOL]}, None, ("SF", "Zürich 🎉"), "tool_calls"),
    Read("words and a call", "chat", "I look.\n" + ONE, {"tools": [TOOL]}, "I look.", ("SF",), "tool_calls"),
    Read("a call that is malformed", "chat", ONE.replace('"SF"', ""), {"tools": [TOOL]}, ONE.replace('"SF"', "")),
    Read("logprobs", "chat", "I see.", {"logprobs": True, "top_logprobs": 2}, "I see."),
    Read("text of a response", "responses", "I cannot see it.", {}, "I cannot see it."),
    Read("a call of a response", "responses", ONE, {"tools": [FLAT]}, "", ("SF",)),
    Read("words and two calls of a response", "responses", "I look.\n" + TWO, {"tools": [FLAT]}, "I look.", ("SF", "Zürich 🎉")),
]  # fmt: skip


@each(CASES)
def test_openai_python(tooled, case):
    openai = pytest.importorskip("openai", reason="the openai package is not installed")
    client = openai.OpenAI(base_url=tooled.url + "/v1", api_key="none", max_retries=0)
    with saying(tooled.llm, case.says):
        if case.kind == "chat":
            with client.chat.completions.stream(model="tiny", messages=USER, **case.more) as stream:
                choice = stream.get_final_completion().choices[0] if not _is_cut(case) else _choice_of(stream)
            whole = client.chat.completions.create(model="tiny", messages=USER, **case.more | {"stream_options": None})
            content, calls = choice.message.content, choice.message.tool_calls or ()
            found = tuple(json.loads(call.function.arguments)["city"] for call in calls)
            assert (choice.finish_reason, whole.choices[0].finish_reason) == (case.finish_reason,) * 2
            assert (content or None) == (whole.choices[0].message.content or None)
        else:
            with client.responses.stream(model="tiny", input=USER, **case.more) as stream:
                response = stream.get_final_response()
            content = response.output_text
            found = tuple(json.loads(i.arguments)["city"] for i in response.output if i.type == "function_call")
    assert found == case.arguments
    if not _is_cut(case):
        assert (content or None) == (case.content or None)


def _is_cut(case: Read) -> bool:
    return case.finish_reason == "length"


def _choice_of(stream: Any) -> Any:
    """The accumulator raises where an answer is cut off; what it has until then is the answer."""
    from openai import LengthFinishReasonError

    try:
        return stream.get_final_completion().choices[0]
    except LengthFinishReasonError as cut:
        return cut.completion.choices[0]
