"""A model's own `response_template`, through transformers' parser: the same messages as the family's parser reads, and
what makes that parser raise is text."""

import json
import random
import time

import pytest

from hetero_attn.server.dialogue import templated
from hetero_attn.server.dialogue.answer import Answer, Piece
from hetero_attn.server.dialogue.formats import AnswerFormat, format_of
from hetero_attn.server.dialogue.templated import TemplatedParser, usable_template
from hetero_attn.server.dialogue.tools import NO_TOOLS, tools_of
from hetero_attn.serving.text.tokenizer import Tokenizer
from tests.server.replayed.test_vllm_tool_parsers import CASES
from tests.server.replayed.test_vllm_tool_parsers import TOOLS as STATE_TOOLS
from tests.server.test_dialogue import BROKEN, CITY, JSON_CALL, MARKS, TOOLS, WHOLE, cuts, meaning
from tests.support.server.http_server import RunningServer
from tests.support.server.scripted import TEMPLATE, load_with, model_with, saying

pytest.importorskip("transformers.utils.chat_parsing", reason="this release of transformers has no response parser")
THINK = {"open": "<think>", "close": "</think>"}
AS_OBJECT = {"type": "function", "function": "{content}"}
BY_NAME = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}


def template(calls: dict, thought: dict = THINK, content: dict | None = None) -> dict:
    """A template with these fields, which begins behind the words that open an answer."""
    fields = {"reasoning_content": thought, "tool_calls": calls, "content": content or {}}
    return {"defaults": {"role": "assistant"}, "start_anchor": "assistant\n", "fields": fields}


def pairs(expression: str) -> dict:
    return {"content": "xml-inline", "content_args": {"tag_pattern": expression}, "repeats": True, "transform": BY_NAME}


TEMPLATES = {
    "hermes": template({"open": "<tool_call>", "close": "</tool_call>", "repeats": True, "content": "json", "transform": AS_OBJECT}),
    "coder": template({"open_pattern": r"<tool_call>\s*<function=(?P<name>[^>\n]+)>", "close_pattern": r"</function>\s*</tool_call>", **pairs(r"<parameter=(?P<key>[^>\n]+)>\n?(?P<value>.*?)\n?</parameter>")}),
    "glm": template({"open_pattern": r"<tool_call>(?P<name>[\w.-]+)", "close": "</tool_call>", **pairs(r"<arg_key>(?P<key>.*?)</arg_key>\s*<arg_value>(?P<value>.*?)</arg_value>")}),
    "mistral": template({"open": "[TOOL_CALLS]", "content": "json", "transform_each": True, "transform": AS_OBJECT}),
    "harmony": template(
        {"open_pattern": r"<\|channel\|>commentary to=functions\.(?P<name>\w+) <\|constrain\|>json<\|message\|>", "close": "<|call|>", "content": "json", "repeats": True, "transform": BY_NAME},
        {"open": "<|channel|>analysis<|message|>", "close": "<|end|>"},
        {"open_pattern": r"<\|channel\|>(?:final|commentary)<\|message\|>", "close": ["<|end|>", "<|return|>"]},
    ),
}  # fmt: skip


def door_of(family: str, text: str) -> str:
    """Which of the templates writes a text of a family, "" for none."""
    name = {"qwen3": "hermes", "hermes-coder": "coder"}.get(family, family)
    is_named = "[ARGS]" in text or "no header" in text or text.startswith(" to=") or "Hi <think>" in text
    return "coder" if "<function=" in text and name == "hermes" else name if name in TEMPLATES and not is_named else ""


def form_of(door: str) -> AnswerFormat:
    """The family's form, which reads where the template's parser gives up."""
    family = {"hermes": "qwen3", "coder": "qwen3"}.get(door, door)
    return AnswerFormat(
        family, None if family == "harmony" else MARKS[family], family == "harmony", template=TEMPLATES[door]
    )


def answer_by(door: str, pieces: list[str], finish_reason: str = "stop", tools=TOOLS, prompt_end: str = "") -> Answer:
    """The message that is read by the model's template."""
    (parser,) = form_of(door).parsers(1, tools, prompt_end)
    assert isinstance(parser, TemplatedParser)
    answer = Answer()
    for part in [*map(parser.feed, pieces), parser.finish(finish_reason)]:
        answer.take(Piece(0, part, 0, 0, None))
    return answer


CORPUS = [
    (door, text, said, thought, calls)
    for family, text, said, thought, calls in WHOLE
    if (door := door_of(family, text))
]
REPLAYED = [(door, case) for case in CASES if (door := door_of(case.family, case.text))]


@pytest.mark.parametrize(("door", "text", "said", "thought", "calls"), CORPUS, ids=range(len(CORPUS)))
def test_both_doors_read_the_same_message_however_it_is_cut(door, text, said, thought, calls):
    for pieces in cuts(text):
        found = answer_by(door, pieces)

        assert meaning(found) == (said, thought, calls), pieces
        assert len({call.id for call in found.calls}) == len(calls)


@pytest.mark.parametrize(("door", "case"), REPLAYED, ids=lambda value: getattr(value, "name", value))
def test_both_doors_agree_on_what_other_servers_are_held_to(door, case):
    for pieces in cuts(case.text)[: 2 if len(case.text) > 1000 else 4]:
        found = answer_by(door, pieces, case.finish_reason, STATE_TOOLS)

        assert meaning(found) == (case.said, case.thought, list(case.calls)), pieces


def test_the_corpora_are_large_enough():
    assert len(CORPUS) >= 12 and len(REPLAYED) >= 25 and {door for door, *_ in CORPUS} == set(TEMPLATES)


@pytest.mark.parametrize(("family", "text"), [each for each in BROKEN if door_of(*each)], ids=range(len([each for each in BROKEN if door_of(*each)])))  # fmt: skip
def test_what_makes_it_raise_is_text(family, text):
    for pieces in cuts(text)[: 2 if len(text) > 1000 else None]:
        assert meaning(answer_by(door_of(family, text), pieces)) == (text, "", [])


@pytest.mark.parametrize(("door", "text", "said", "thought", "calls"), CORPUS, ids=range(len(CORPUS)))
def test_a_call_that_is_cut_off_never_shows_as_one(door, text, said, thought, calls):
    for length in range(0, len(text), 3):
        found = meaning(answer_by(door, [text[:length]], "length"))[2]
        assert found == calls[: len(found)], length


@pytest.mark.parametrize("door", TEMPLATES)
def test_noise_never_raises(door):
    draw, words = random.Random(1), ["<tool_call>", "</tool_call>", "<think>", "</think>", "{", "}", '"name":', "[TOOL_CALLS]", "<|channel|>", "analysis", "<|message|>", "<|end|>", "<function=a>", "</function>", "<arg_key>", " ", "\n", JSON_CALL]  # fmt: skip
    for _ in range(100):
        answer_by(door, draw.choices(words, k=draw.randrange(12)), draw.choice(["stop", "length"]))


def test_behind_a_call_that_is_malformed_others_are_still_read():
    broken = '<tool_call>{"name": "get_weather", "arguments": {"city": </tool_call>'
    whole = f"<tool_call>{JSON_CALL}</tool_call>"
    found = answer_by("hermes", list(f"{whole}a{broken}b{whole}"))

    assert meaning(found) == (f"a{broken}b", "", [CITY, CITY])
    assert len({call.id for call in found.calls}) == 2


def test_without_tools_a_call_is_text_and_one_is_told_where_one_is_wanted():
    text = f"<think>\nHm\n</think>\n\n<tool_call>\n{JSON_CALL}\n</tool_call>"
    for tools in (NO_TOOLS, tools_of([{"name": "get_weather"}], "none", True)):
        assert meaning(answer_by("hermes", list(text), tools=tools)) == (text.partition("\n\n")[2], "Hm", [])
    alone = tools_of([{"name": "get_weather"}], "auto", False)

    assert meaning(answer_by("hermes", [f"<tool_call>{JSON_CALL}</tool_call>" * 2], tools=alone)) == ("", "", [CITY])


def test_a_prompt_that_opens_the_thoughts_is_known():
    opened = "<|im_start|>assistant\n<think>\n"

    assert meaning(answer_by("hermes", ["Hm</think>Yes"], prompt_end=opened)) == ("Yes", "Hm", [])
    assert meaning(answer_by("hermes", ["Yes"], prompt_end=opened + "\n</think>\n\n")) == ("Yes", "", [])


@pytest.mark.parametrize(
    "given",
    [
        None,
        [],
        "x",
        {},
        {"fields": 3},
        {"fields": {"content": {}}},
        {"start_anchor": "a", "fields": {"content": {"content": "yaml"}}},
        {"start_anchor": "a", "fields": {"tool_calls": {"open_pattern": "("}}},
        template({"open_pattern": "(a+)+b", "close": "c"}),
        template({"open": "a", "content": "xml-inline", "content_args": {"tag_pattern": "(?P<key>(?:a|a)*)"}}),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_template_that_cannot_be_used_is_left(given):
    assert usable_template(given) is None


def test_a_hostile_call_is_handed_over_in_time():
    """Four times the text: beyond LONGEST_CALL it is the family's parser that reads, in proportion to the length."""

    def seconds(length: int) -> float:
        begin = time.process_time()
        text = "<tool_call><function=f>" + "<parameter=a>" * (length // 13)
        assert answer_by("coder", [text]).text.endswith(text[-100:])
        return time.process_time() - begin

    seconds(1000)
    short, long = (min(seconds(length) for _ in range(2)) for length in (50_000, 200_000))

    assert templated.LONGEST_CALL < 50_000 and long < 9 * short + 0.05


def test_a_model_whose_family_nobody_knows_is_served_by_its_own_template(tmp_path):
    """Gemma 4's form: neither markers nor arguments are any other family's."""
    import httpx

    call = {"open_pattern": r"<\|tool_call>call:(?P<name>\w+)", "close": "<tool_call|>", "repeats": True, "content": "json", "content_args": {"unquoted_keys": True, "string_delims": [['<|"|>', '<|"|>']]}, "transform": BY_NAME}  # fmt: skip
    own = template(call, {"open": "<|channel>thought\n", "close": "<channel|>"})
    folder = model_with(tmp_path / "own", TEMPLATE.replace("<tool_call>", "<|tool_call>").replace("think>", "x>"))
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {"response_template": own}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    form = format_of(Tokenizer.open(folder))
    at = {"type": "object", "properties": {"at": {"enum": ["é"]}}, "required": ["at"], "additionalProperties": False}
    tools = [{"type": "function", "function": {"name": "look", "parameters": at}}]  # a call of few tokens on every CPU
    body = {"messages": [{"role": "user", "content": "Look."}], "tools": tools}
    with RunningServer(lambda: load_with(folder)) as server:
        with saying(
            server.llm, '<|channel>thought\nHm<channel|>I look.<|tool_call>call:look{at:<|"|>é<|"|>}<tool_call|>'
        ):
            choice = httpx.post(server.url + "/v1/chat/completions", json=body, trust_env=False, timeout=60).json()["choices"][0]  # fmt: skip
        forced = httpx.post(server.url + "/v1/chat/completions", json=body | {"tool_choice": "required", "max_tokens": 60}, trust_env=False, timeout=60).json()["choices"][0]  # fmt: skip

    message = choice["message"]
    assert form.template == own and form.marks.thought == ("<|channel>thought", "<channel|>")
    assert (message["reasoning_content"], message["content"], choice["finish_reason"]) == (
        "Hm",
        "I look.",
        "tool_calls",
    )
    assert message["tool_calls"][0]["function"] == {"name": "look", "arguments": '{"at": "é"}'}
    assert forced["message"]["tool_calls"][0]["function"]["name"] == "look"
