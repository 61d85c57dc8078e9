"""Forms of answers and forced calls, asked for in each protocol's way."""

import json
from types import SimpleNamespace

import httpx
import pytest

from hetero_attn.engine.lane_report import LaneReport
from hetero_attn.server.dialogue.forced import call_grammar, words_of
from hetero_attn.server.dialogue.formats import FAMILIES, AnswerFormat
from hetero_attn.server.dialogue.tools import tools_of
from hetero_attn.server.metrics import ServerMetrics
from hetero_attn.server.service import Service
from hetero_attn.serving.grammar import Grammars
from hetero_attn.serving.sampling_params import SamplingParams
from hetero_attn.serving.text.tokenizer import Tokenizer
from hetero_attn.speculation.speculator import Speculator
from tests.server.test_dialogue import answer_of
from tests.server.test_lifecycle import gauges
from tests.support.server.http_server import TINY

pytest.importorskip("llguidance", reason="llguidance is not installed (extra grammar)")
USER = [{"role": "user", "content": "What is a list?"}]
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["list", "set"]}, "size": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["kind", "size"],
    "additionalProperties": False,
}
LOOK = {
    "name": "look",
    "parameters": {"type": "object", "properties": {"at": {"enum": ["é", "b"]}}, "required": ["at"]},
}
WAIT = {"name": "wait", "parameters": {"type": "object", "properties": {"s": {"type": "boolean"}}, "required": ["s"]}}


def is_right(text: str) -> bool:
    found = json.loads(text)
    return set(found) == {"kind", "size"} and found["kind"] in ("list", "set") and 0 <= found["size"] <= 99


def post(http: httpx.Client, path: str, **body: object) -> dict:
    answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_every_protocol_can_ask_for_a_schema(http):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
    chat = post(http, "/v1/chat/completions", messages=USER, response_format=form, temperature=1.2, seed=1)
    text = post(http, "/v1/completions", prompt="A", structured_outputs={"json": SCHEMA}, max_tokens=60)
    flat = {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}
    response = post(http, "/v1/responses", input="A", text=flat, max_output_tokens=60)
    message = post(http, "/v1/messages", messages=USER, max_tokens=60, output_config=flat)
    ollama = post(http, "/api/chat", messages=USER, format=SCHEMA, stream=False)

    assert is_right(chat["choices"][0]["message"]["content"]) and chat["choices"][0]["finish_reason"] == "stop"
    assert is_right(text["choices"][0]["text"])
    assert is_right(response["output"][0]["content"][0]["text"])
    assert is_right(message["content"][0]["text"])
    assert is_right(ollama["message"]["content"])


def test_other_forms(http):
    choice = {"choice": ["yes", "no"]}
    said = post(http, "/v1/chat/completions", messages=USER, structured_outputs=choice)["choices"][0]["message"][
        "content"
    ]
    item = {"type": "json_object"}
    text = post(http, "/v1/chat/completions", messages=USER, response_format=item, temperature=0, max_tokens=40)

    assert said in ("yes", "no")
    assert text["choices"][0]["message"]["content"].startswith("{")


def test_openai_python_parses_into_a_type(server):
    openai = pytest.importorskip("openai", reason="the openai package is not installed")
    from pydantic import BaseModel

    class Thing(BaseModel):
        """What is asked for."""

        is_list: bool
        size: int

    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
    chat = client.chat.completions.parse(
        model="tiny", messages=USER, response_format=Thing, temperature=0, max_tokens=80
    )
    response = client.responses.parse(
        model="tiny", input="What?", text_format=Thing, temperature=0, max_output_tokens=80
    )

    assert isinstance(chat.choices[0].message.parsed, Thing) and isinstance(response.output_parsed, Thing)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "wait"}}], ids=str)
def test_a_call_can_be_forced(tooled, choice, stream):
    openai = pytest.importorskip("openai", reason="the openai package is not installed")
    client = openai.OpenAI(base_url=tooled.url + "/v1", api_key="none", max_retries=0)
    tools = [{"type": "function", "function": each} for each in (LOOK, WAIT)]
    body = {"model": "m", "messages": USER, "tools": tools, "tool_choice": choice, "temperature": 1.0, "seed": 5}
    if stream:
        with client.chat.completions.stream(**body) as answer:
            answer.until_done()
            found = answer.get_final_completion().choices[0]
    else:
        found = client.chat.completions.create(**body).choices[0]

    (call,) = found.message.tool_calls
    assert found.finish_reason == "tool_calls" and not found.message.content
    arguments = json.loads(call.function.arguments)
    assert arguments["at"] in ("é", "b") if call.function.name == "look" else isinstance(arguments["s"], bool)
    assert choice == "required" or call.function.name == "wait"


def test_other_protocols_force_calls_too(tooled):
    with httpx.Client(base_url=tooled.url, timeout=60, trust_env=False) as http:
        flat = [{"type": "function", **WAIT}]
        response = post(http, "/v1/responses", input="A", tools=flat, tool_choice="required", temperature=0)
        anthropic = [{"name": "wait", "input_schema": WAIT["parameters"]}]
        any_tool = {"type": "any"}
        message = post(http, "/v1/messages", messages=USER, max_tokens=60, tools=anthropic, tool_choice=any_tool)

    assert [item["type"] for item in response["output"]] == ["function_call"]
    assert message["stop_reason"] == "tool_use" and message["content"][-1]["name"] == "wait"


def test_a_tool_that_no_grammar_can_be_made_of_is_named(tooled):
    """A grammar was spoken of, which nobody had given, and `param` was null."""
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": 5}}}
    with httpx.Client(base_url=tooled.url, timeout=60, trust_env=False) as http:
        body = {"messages": USER, "tools": [tool], "tool_choice": "required"}
        answer = http.post("/v1/chat/completions", json=body)
    error = answer.json()["error"]

    assert (answer.status_code, error["param"]) == (400, "tools")
    assert error["message"].startswith("tools cannot be followed") and "type must be" in error["message"]


def test_a_form_beside_tools_lets_the_model_choose(tooled):
    """Draws at a high temperature go both ways: whichever way, the answer is a whole call or what was asked for."""
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
    tools, seen = [{"type": "function", "function": WAIT}], set()
    with httpx.Client(base_url=tooled.url, timeout=60, trust_env=False) as http:
        for seed in range(6, 106):  # the first that go the other way are near
            if len(seen) == 2:
                break
            body = {"messages": USER, "tools": tools, "response_format": form, "temperature": 2.0, "seed": seed}
            (choice,) = post(http, "/v1/chat/completions", **body)["choices"]
            calls = choice["message"].get("tool_calls")
            seen.add(bool(calls))
            assert choice["finish_reason"] == ("tool_calls" if calls else "stop")
            if not calls:
                assert is_right(choice["message"]["content"])
            for call in calls or ():
                assert isinstance(json.loads(call["function"]["arguments"])["s"], bool)
        grammar = {"messages": USER, "tools": tools, "structured_outputs": {"grammar": 'start: "a"'}}
        refused = http.post("/v1/chat/completions", json=grammar)
        two = {"messages": USER, "tools": tools, "response_format": form, "structured_outputs": {"regex": "a"}}
        both = http.post("/v1/chat/completions", json=two)

    assert seen == {True, False}
    assert refused.status_code == 400 and "a schema or a regex" in refused.json()["error"]["message"]
    assert both.status_code == 400 and "both given" in both.json()["error"]["message"]


@pytest.mark.parametrize(
    ("wish", "said"),
    [({"json_schema": SCHEMA}, '{"kind": "set", "size": 7}'), ({"regex": "a/b\\/c|[0-9]+"}, "a/b/c")],
    ids=["schema", "regex"],
)
@pytest.mark.parametrize("name", [name for _, name, _ in FAMILIES])
def test_beside_calls_the_grammar_takes_the_form_and_nothing_else(name, wish, said):
    tokenizer = Tokenizer.open(TINY)
    grammars, tools = Grammars(tokenizer, 4096, tokenizer.eos_token_ids), tools_of([LOOK, WAIT], "auto", True)
    form = AnswerFormat(name, next(marks for _, each, marks in FAMILIES if each == name))
    mask = grammars.mask(SamplingParams(grammar=call_grammar(form, tools, grammars.mark, words_of(wish))))

    def takes(text: str) -> bool:
        ids = [*tokenizer.encode(text, add_special_tokens=False), *tokenizer.eos_token_ids[:1]]
        return all(mask.allowed(ids[:length])[token_id] for length, token_id in enumerate(ids))

    call = '<tool_call>\n{"name": "wait", "arguments": {"s": true}}\n</tool_call>'
    assert takes(said) and not takes("Well, " + said)
    assert name not in ("hermes", "glm") or (takes(call) and takes(call + "\n" + call) and not takes(call + said))


def test_forced_tokens_are_counted(http, server):
    before = gauges(server.url)["hetero_forced_tokens_total"]
    form = {"json": {"const": {"a key that is long": "and a value that nobody chooses"}}}
    text = post(http, "/v1/completions", prompt="A", structured_outputs=form, max_tokens=60)["choices"][0]["text"]
    counted = gauges(server.url)

    assert json.loads(text) == form["json"]["const"]
    assert counted["hetero_forced_tokens_total"] > before
    assert counted["vllm:spec_decode_num_draft_tokens_total"] == counted["vllm:spec_decode_num_drafts_total"] == 0


def test_drafts_are_counted_by_rows_and_by_reason():
    """What a speculator decided, as a scraper sees it."""
    report = LaneReport()
    made = Speculator(report)
    for _ in range(2):
        made.costs.observe(1, 1.0)
    for prompt, most in (((1, 2, 3), 9), ((1, 2, 1, 2), 1), ((1, 2, 1, 2), 9)):
        request = SimpleNamespace(prompt_token_ids=prompt, token_ids=[], max_tokens=most, speculation=None)
        (drafts,) = made.drafts([request], 16)
        if drafts:
            made.judge(request, len(drafts), 1)
    served = SimpleNamespace(driver=SimpleNamespace(llm=SimpleNamespace(report=lambda: report)))
    text = ServerMetrics(dict, dict, lambda: Service._counts(served)).text().decode()

    assert f'hetero_draft_passes_total{{rows="{1 + len(drafts)}"}} 1.0' in text
    for reason in ("no match", "last token", "drafts"):
        assert f'hetero_draft_decisions_total{{reason="{reason}"}} 1.0' in text


def test_picks_of_experts_are_counted_by_what_served_them():
    report = LaneReport()
    served = SimpleNamespace(driver=SimpleNamespace(llm=SimpleNamespace(report=lambda: report)))
    report.streamed((10, 7, 5, 12))
    text = ServerMetrics(dict, dict, lambda: Service._counts(served)).text().decode()

    assert 'hetero_streamed_expert_picks_total{served="yes"} 7.0' in text
    assert 'hetero_streamed_expert_picks_total{served="no"} 3.0' in text
    assert "hetero_expert_slot_picks" not in text


FORMS = [AnswerFormat(name, marks) for _, name, marks in FAMILIES]
FORMS += [
    AnswerFormat("deepseek", FORMS[0].marks, is_fenced=True),
    AnswerFormat("mistral", FORMS[1].marks, is_named=True),
]
FORMS += [AnswerFormat("harmony", None, is_harmony=True)]


in_every_form = pytest.mark.parametrize(
    "form", FORMS, ids=lambda form: form.name + "-2" * (form.is_fenced or form.is_named)
)


def drawn_call(form, tools, seed):
    """A random answer that the grammar of a forced call allows, as the family's own parser reads it: its one call."""
    import torch

    tokenizer = Tokenizer.open(TINY)
    grammars = Grammars(tokenizer, 4096, tokenizer.eos_token_ids)
    params = SamplingParams(grammar=call_grammar(form, tools, grammars.mark))
    mask, ids, draw = grammars.mask(params), [], torch.Generator().manual_seed(seed)
    while not ids or ids[-1] not in tokenizer.eos_token_ids:
        allowed = mask.allowed(ids).nonzero().flatten()
        ids.append(int(allowed[torch.randint(len(allowed), (), generator=draw)]))
        assert len(ids) < 400
    answer = answer_of(form.name, [tokenizer.decode(ids[:-1])], tools=tools)

    (call,) = answer.calls
    assert answer.text == ""
    return call


@in_every_form
def test_a_forced_call_is_read_as_one_in_every_form(form):
    """Random answers that the grammar allows, by the family's own parser."""
    for seed in range(4):
        call = drawn_call(form, tools_of([LOOK, WAIT], "required", True), seed)
        arguments = json.loads(call.arguments)

        assert call.name in ("look", "wait")
        assert arguments["at"] in ("é", "b") if call.name == "look" else isinstance(arguments["s"], bool)


@in_every_form
def test_a_forced_calls_schema_may_refer_to_parts_of_itself(form):
    """Schemas made from Python types name their parts under $defs; a call that was forced was a 400: "does not exist".
    The property's own name says nothing of what it holds."""
    kind = {"$ref": "#/$defs/Kind"}
    parameters = {
        "$defs": {
            "Kind": {"enum": ["x", "y"]},
            "Kinds": {"type": "array", "items": kind, "minItems": 1, "maxItems": 2},
        },
        "type": "object",
        "properties": {"default": kind, "all": {"anyOf": [{"$ref": "#/$defs/Kinds"}]}, "as": {"const": kind}},
        "required": ["default", "all", "as"],
    }
    call = drawn_call(form, tools_of([{"name": "go", "parameters": parameters}], "required", True), 0)
    arguments = json.loads(call.arguments)

    assert arguments["default"] in ("x", "y") and {*arguments["all"]} <= {"x", "y"} and arguments["as"] == kind


def test_langchain_streams_calls_and_parses(tooled):
    pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(base_url=tooled.url + "/v1", api_key="none", model="tiny", temperature=0, max_tokens=60)
    streamed = "".join(piece.content for piece in chat.stream("What is a list?"))
    tools = [{"type": "function", "function": WAIT}]
    (call,) = chat.bind_tools(tools, tool_choice="wait").invoke("Wait").tool_calls
    form = {"title": "thing", "description": "A thing.", **SCHEMA}
    found = chat.with_structured_output(form, method="json_schema").invoke("A list")

    assert streamed == chat.invoke("What is a list?").content
    assert call["name"] == "wait" and isinstance(call["args"]["s"], bool)
    assert is_right(json.dumps(found))
