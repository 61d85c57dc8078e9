"""Bodies with one value in the place of another, at every place of every protocol: an error of the client's, by name."""

import copy
import json
from collections.abc import Iterator

import httpx
import pytest
from pydantic import TypeAdapter, ValidationError

from hetero_attn.server.failures import ApiError
from hetero_attn.server.protocols.fields import Fields

USER = [{"role": "user", "content": "What is a list?"}]
SCHEMA = {"type": "object", "properties": {"at": {"type": "string"}}}
LOOK = {"name": "look", "description": "Look.", "parameters": SCHEMA}
CALL = {"id": "c", "type": "function", "function": {"name": "look", "arguments": "{}"}}
ITEMS = [
    {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
    {"type": "reasoning", "summary": [{"type": "summary_text", "text": "s"}]},
    {"type": "function_call", "call_id": "c", "name": "look", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "c", "output": "r"},
]
BLOCKS = [
    {"type": "thinking", "thinking": "t"},
    {"type": "text", "text": "x"},
    {"type": "tool_use", "id": "c", "name": "look", "input": {}},
]
RESULT = [{"type": "tool_result", "tool_use_id": "c", "content": [{"type": "text", "text": "r"}]}]
BODIES = {
    "/v1/chat/completions": {
        "messages": [*USER, {"role": "assistant", "content": [{"type": "text", "text": "x"}], "tool_calls": [CALL]}],
        "tools": [{"type": "function", "function": LOOK}],
        "tool_choice": {"type": "function", "function": {"name": "look"}},
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
        "structured_outputs": {"choice": ["a", "b"]},
        "logit_bias": {"3": 1},
        "stop": ["a"],
        "stream_options": {"include_usage": True},
        "chat_template_kwargs": {"enable_thinking": False},
    },
    "/v1/completions": {"prompt": ["a", "b"], "structured_outputs": {"regex": "a"}, "stop": ["a"], "n": 1},
    "/v1/responses": {
        "input": ITEMS,
        "instructions": "i",
        "tools": [{"type": "function", **LOOK}],
        "tool_choice": {"type": "function", "name": "look"},
        "reasoning": {"effort": "low"},
        "text": {"format": {"type": "json_schema", "schema": SCHEMA}},
        "metadata": {"a": "b"},
    },
    "/v1/messages": {
        "messages": [*USER, {"role": "assistant", "content": BLOCKS}, {"role": "user", "content": RESULT}],
        "system": [{"type": "text", "text": "s"}],
        "max_tokens": 1,
        "tools": [{"name": "look", "input_schema": SCHEMA}],
        "tool_choice": {"type": "tool", "name": "look"},
        "thinking": {"type": "disabled"},
        "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}},
    },
    "/api/chat": {
        "messages": [*USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}],
        "tools": [{"type": "function", "function": LOOK}],
        "options": {"num_predict": 1, "temperature": 0.5, "stop": ["a"], "seed": 1},
        "format": SCHEMA,
        "think": False,
    },
    "/api/generate": {"prompt": "Hi", "system": "s", "options": {"num_predict": 1}, "format": "json"},
}
# No text, no object, no key of a mapping; no Unicode; more than any integer of a machine; JSON that no parser can nest.
OTHERS = [5, ["x"], "\ud800", {"\ud800": 1}, 10**400, "[" * 2000]


def places(value: object, path: tuple = ()) -> Iterator[tuple]:
    """The path of every value inside of a value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in inner:
        yield (*path, key)
        yield from places(child, (*path, key))


def with_other(body: dict, path: tuple, other: object) -> dict:
    found = at = copy.deepcopy(body)
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = other
    return found


@pytest.mark.parametrize("path", BODIES)
def test_no_value_in_the_place_of_another_is_an_error_of_ours(tooled, monkeypatch, path):
    """Nothing is computed: what a protocol makes of a body, of what is text also the template and the
    tokenizer, is what is tried."""
    texts = [True]

    async def understood(turn: object) -> None:
        if texts:
            await tooled.service.encode(turn)
        raise ApiError(409, "understood")

    monkeypatch.setattr(tooled.service, "begin", understood)
    failed = {}
    with httpx.Client(base_url=tooled.url, timeout=60, trust_env=False) as http:
        assert http.post(path, json=BODIES[path]).status_code == 409, "the body itself is right"
        for place in places(BODIES[path]):
            for other in OTHERS:
                texts[:] = [other] if isinstance(other, str) else []
                answer = http.post(path, content=json.dumps(with_other(BODIES[path], place, other)))
                if answer.status_code >= 500:
                    failed[".".join(map(str, place))] = f"{other!r:.40}: {answer.text:.120}"
    assert failed == {}


def test_what_is_no_unicode_does_not_cost_the_answer(http):
    body = json.dumps({"input": "Hi", "max_output_tokens": 1, "metadata": {"a": "\ud800"}})
    answer = http.post("/v1/responses", content=body)

    assert answer.status_code == 200 and answer.json()["metadata"] == {"a": "?"}


@pytest.mark.parametrize(
    ("path", "body", "status", "shown"),
    [
        ("/v1/completions", {"prompt": "a", "max_tokens": 0, "echo": True, "model": "\ud800"}, 200, '"model":"?"'),
        ("/api/chat", {"messages": [], "model": "\ud800"}, 200, '"model":"?"'),
        ("/v1/completions", '{"\\ud800": 1, "\\ud800": 2}', 400, '"param":"?"'),
    ],
    ids=["echo", "loaded", "error"],
)
def test_what_is_no_unicode_is_replaced_wherever_an_answer_repeats_it(http, path, body, status, shown):
    answer = http.post(path, content=body if isinstance(body, str) else json.dumps(body))

    assert answer.status_code == status and shown in answer.text


@pytest.mark.parametrize(
    ("number", "said"),
    [("1" * 5000, "thousands of digits"), ("1e999", "1e999"), ("-1e999", "-1e999")],
    ids=["digits", "large", "small"],
)
def test_a_number_that_is_none_is_told(http, number, said):
    """The first is no integer to Python, and the others would come back as Infinity, which is no JSON."""
    answer = http.post("/v1/responses", content=f'{{"input": "Hi", "metadata": {{"a": {number}}}}}')

    assert answer.status_code == 400 and said in answer.json()["error"]["message"]


@pytest.mark.parametrize("more", [{}, {"echo": True, "logprobs": 1}], ids=["answers", "scores"])
def test_where_one_of_several_prompts_is_refused_nothing_goes_on_for_the_others(http, server, more):
    body = {"prompt": [[5, 6], [7, 999_999]], "max_tokens": 400, "ignore_eos": True, **more}
    answer = http.post("/v1/completions", json=body)
    server.service.driver._wake.set()  # a request that nobody waits for would be computed now
    server.wait_until(lambda: not server.llm._turns.waiting, 30)

    assert answer.status_code == 400 and "999999" in answer.text
    assert not server.llm._scheduler.has_work


def test_num_predict_of_0_is_no_limit(http):
    body = {"prompt": "A list is", "stream": False, "options": {"num_predict": 0, "temperature": 0, "seed": 1}}
    answers = [
        http.post("/api/generate", json=body | {"options": o}).json() for o in (body["options"], {"temperature": 0})
    ]

    assert answers[0]["response"] == answers[1]["response"] and answers[0]["done"]


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/detokenize", {"tokens": [5, True]}, "tokens.1"),
        ("/v1/completions", {"prompt": "A", "max_tokens": True}, "max_tokens"),
        ("/v1/completions", {"prompt": "A", "stop_token_ids": [True]}, "stop_token_ids.0"),
        ("/v1/chat/completions", {"messages": USER, "temperature": True}, "temperature"),
        ("/v1/responses", {"input": "A", "max_output_tokens": True}, "max_output_tokens"),
        ("/v1/messages", {"messages": USER, "max_tokens": True}, "max_tokens"),
        ("/v1/completions", {"prompt": "A", "logit_bias": {"5": True}}, "logit_bias.5"),
        ("/api/generate", {"prompt": "A", "context": [5, True]}, "context.1"),
    ],
)
def test_true_is_no_number(http, path, body, field):
    """It counted as 1: one token was made, or token 1 ended the answer."""
    answer = http.post(path, json=body)

    assert answer.status_code == 400 and field in answer.text and "got True" in answer.text


def numbers_in(value) -> list:
    """The numbers of a value, in lists and dicts too, that are no truth values."""
    if isinstance(value, (list, dict)):
        return [each for item in (value.values() if isinstance(value, dict) else value) for each in numbers_in(item)]
    return [value] if isinstance(value, (int, float)) and not isinstance(value, bool) else []


def bodies(kind: type[Fields] = Fields) -> Iterator[type[Fields]]:
    for each in kind.__subclasses__():
        yield each
        yield from bodies(each)


def test_no_field_of_any_body_makes_a_number_of_true(http):
    """In a list, or as a value of an object, it once did in fields that did not say otherwise themselves."""
    made, refused = [], 0
    for body in set(bodies()):
        for name, field in body.model_fields.items():
            kind = TypeAdapter(field.rebuild_annotation())
            for value in (True, [True], {"1": True}):
                try:
                    made += [(body, name)] * len(numbers_in(kind.validate_python(value)))
                except ValidationError as error:
                    refused += "should be a number" in str(error)

    assert made == [] and refused > 40


@pytest.mark.parametrize("tokens", [[5, 17], ["5", 17.0]], ids=str)
def test_token_ids_are_read_as_other_numbers_are(http, tokens):
    assert (
        http.post("/detokenize", json={"tokens": tokens}).json()
        == http.post("/detokenize", json={"tokens": [5, 17]}).json()
    )


def test_an_address_says_which_methods_it_takes(http):
    answers = {path: http.delete(path) for path in ("/v1/completions", "/health")}

    assert {path: answer.status_code for path, answer in answers.items()} == dict.fromkeys(answers, 405)
    assert answers["/v1/completions"].headers["allow"] == "POST" and "GET" in answers["/health"].headers["allow"]
