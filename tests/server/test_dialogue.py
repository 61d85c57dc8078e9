"""Reasoning and calls in each family's form: however the text is cut, the message is the same, and nothing raises."""

import json
import random
import time

import pytest

from hetero_attn.server.dialogue.answer import Answer, Part, Piece
from hetero_attn.server.dialogue.calls import SEPARATOR, read_calls
from hetero_attn.server.dialogue.formats import FAMILIES, TAGS, AnswerFormat
from hetero_attn.server.dialogue.marked import Marks
from hetero_attn.server.dialogue.scanner import Scanner
from hetero_attn.server.dialogue.thoughts import thought_tokens
from hetero_attn.server.dialogue.tools import tools_of
from hetero_attn.server.failures import ApiError
from hetero_attn.serving.text.tokenizer import Tokenizer
from tests.support.server.http_server import TINY

WEATHER = {
    "name": "get_weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
}
TOOLS = tools_of([WEATHER, {"name": "get_time"}], "auto", True)
THINK = ("<think>", "</think>")
MARKS = {name: marks for _, name, marks in FAMILIES} | {"qwen3": Marks(THINK, TAGS), "plain": Marks()}
CITY = ("get_weather", {"city": "Zürich 🎉", "days": 3})
JSON_CALL = '{"name": "get_weather", "arguments": {"city": "Zürich 🎉", "days": 3}}'
HARMONY_CALL = (
    '<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "Zürich 🎉", "days": 3}'
)
# Family, what the model writes, its text, its reasoning, its calls.
WHOLE = [
    ("hermes", f"<tool_call>\n{JSON_CALL}\n</tool_call>", "", "", [CITY]),
    ("hermes", f"Let me see.\n<tool_call>\n{JSON_CALL}\n</tool_call>\n<tool_call>{JSON_CALL}</tool_call>", "Let me see.", "", [CITY] * 2),
    ("hermes", f"<tool_call>\n{JSON_CALL}", "", "", [CITY]),  # the end token in the place of the closing marker
    ("hermes", "a < b <tool <tool_calls> and\n\n  more \n", "a < b <tool <tool_calls> and\n\n  more \n", "", []),
    ("qwen3", f"<think>\nHm. {JSON_CALL}\n</think>\n\nHi <think>", "Hi <think>", f"Hm. {JSON_CALL}", []),
    ("qwen3", f"<think>\nHm\n</think>\n\n<tool_call>\n{JSON_CALL}\n</tool_call>", "", "Hm", [CITY]),
    ("qwen3", "<think>\n\n</think>\n\nYes.", "Yes.", "", []),
    ("hermes", "<tool_call>\n<function=get_weather>\n<parameter=city>\nZürich 🎉\n</parameter>\n<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>", "", "", [CITY]),
    ("glm", "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Zürich 🎉</arg_value>\n<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>", "", "", [CITY]),
    ("glm", "<tool_call>get_time</tool_call>", "", "", [("get_time", {})]),
    ("llama3", '{"name": "get_weather", "parameters": {"city": "Zürich 🎉", "days": 3}}', "", "", [CITY]),
    ("llama3", f"<|python_tag|>{JSON_CALL}; {JSON_CALL}", "", "", [CITY] * 2),
    ("llama3", '{"type": "function", "function": {"name": "get_time", "parameters": {}}}', "", "", [("get_time", {})]),
    ("mistral", f"[TOOL_CALLS][{JSON_CALL}, {JSON_CALL}]", "", "", [CITY] * 2),
    ("mistral", 'Sure.[TOOL_CALLS]get_weather[ARGS]{"city": "Zürich 🎉", "days": 3}[TOOL_CALLS]get_time[ARGS]{}', "Sure.", "", [CITY, ("get_time", {})]),
    ("deepseek", '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n{"city": "Zürich 🎉", "days": 3}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>', "", "", [CITY]),
    ("deepseek", 'Ok<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Zürich 🎉", "days": 3}<｜tool▁call▁end｜><｜tool▁calls▁end｜>', "Ok", "", [CITY]),
    ("harmony", "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant<|channel|>final<|message|>Hello\n", "Hello\n", "Hm", []),
    ("harmony", f"<|channel|>analysis<|message|>Hm<|end|><|start|>assistant{HARMONY_CALL}", "", "Hm", [CITY]),
    ("harmony", f"<|channel|>commentary<|message|>I look.<|end|><|start|>assistant{HARMONY_CALL}<|call|>", "I look.", "", [CITY]),
    ("harmony", " to=functions.get_time<|channel|>commentary json<|message|>{}<|call|>", "", "", [("get_time", {})]),
    ("harmony", "no header at all", "no header at all", "", []),
]  # fmt: skip
# What is malformed, or an ordinary answer that looks like a call, is text, to the letter.
BROKEN = [
    ("hermes", '<tool_call>\n{"name": "get_weather", "arguments": {"city": \n</tool_call>'),
    ("hermes", '<tool_call>{"name": 3, "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "get_weather", "arguments": [1]}</tool_call>'),
    ("hermes", '<tool_call>{"name": "get_weather", "arguments": {"days": NaN}}</tool_call>'),
    ("hermes", "<tool_call></tool_call> so"),
    ("hermes", "<tool_call>" + "[" * 100_000 + "</tool_call>"),
    ("hermes", "<tool_call><function=get_weather>city</function></tool_call>"),
    ("glm", "<tool_call>no such function</tool_call>"),
    ("llama3", '{"answer": 42}'),
    ("llama3", '{"name": "Ada", "age": 36}'),
    ("llama3", '{"name": "get_weather", "parameters": '),
    ("llama3", "<|python_tag|>print(1)"),
    ("mistral", "[TOOL_CALLS]get_weather[ARGS]{"),
    ("mistral", "[TOOL_CALLS]"),
    ("deepseek", "<｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n{\n```<｜tool▁call▁end｜>"),
]


def answer_of(family: str, pieces: list[str], finish_reason: str = "stop", tools=TOOLS, prompt_end: str = "") -> Answer:
    """The message that a parser makes of text in pieces."""
    form = AnswerFormat(family, None if family == "harmony" else MARKS[family], family == "harmony")
    (parser,) = form.parsers(1, tools, prompt_end)
    answer = Answer()
    parts: list[Part] = [*map(parser.feed, pieces), parser.finish(finish_reason)]
    for part in parts:
        answer.take(Piece(0, part, 0, 0, None))
    return answer


def meaning(answer: Answer) -> tuple[str, str, list]:
    return answer.text, answer.reasoning, [(call.name, json.loads(call.arguments)) for call in answer.calls]


def cuts(text: str) -> list[list[str]]:
    """The text whole, letter by letter, and at random places."""
    draw = random.Random(len(text))
    found = [[text], list(text)]
    for _ in range(12):
        places = sorted(draw.randrange(len(text)) for _ in range(draw.randint(1, 6)))
        found.append([text[a:b] for a, b in zip([0, *places], [*places, len(text)])])
    return found


@pytest.mark.parametrize(("family", "text", "said", "thought", "calls"), WHOLE, ids=range(len(WHOLE)))
def test_a_message_is_the_same_however_it_is_cut(family, text, said, thought, calls):
    for pieces in cuts(text):
        found = answer_of(family, pieces)

        assert meaning(found) == (said, thought, calls), pieces
        assert len({call.id for call in found.calls}) == len(calls)


@pytest.mark.parametrize(("family", "text"), BROKEN, ids=range(len(BROKEN)))
def test_a_malformed_call_is_text(family, text):
    for pieces in cuts(text)[: 2 if len(text) > 1000 else None]:
        assert meaning(answer_of(family, pieces)) == (text, "", [])


@pytest.mark.parametrize(("family", "text", "said", "thought", "calls"), WHOLE, ids=range(len(WHOLE)))
def test_a_call_that_is_cut_off_never_shows_as_one(family, text, said, thought, calls):
    """At every length: what is told are calls that the whole message holds, from the first on."""
    for length in range(len(text)):
        found = meaning(answer_of(family, [text[:length]], "length"))[2]
        assert found == calls[: len(found)], length


@pytest.mark.parametrize("family", [*MARKS, "harmony"])
def test_noise_never_raises(family):
    draw, words = random.Random(1), ["<tool_call>", "</tool_call>", "<think>", "</think>", "{", "}", '"name":', "[TOOL_CALLS]", "[ARGS]", "<|channel|>", "<|message|>", "<|end|>", "<|start|>", "to=functions.x", "<｜tool▁sep｜>", "<｜tool▁call▁begin｜>", "<function=a>", "</function>", "<arg_key>", " ", "\n", "get_time"]  # fmt: skip
    for _ in range(300):
        answer_of(family, draw.choices(words, k=draw.randrange(12)), draw.choice(["stop", "length"]))


def test_without_tools_a_call_is_text_and_thoughts_are_thoughts():
    text = f"<think>\nHm\n</think>\n\n<tool_call>\n{JSON_CALL}\n</tool_call>"
    for tools in (tools_of([], "auto", True), tools_of([WEATHER], "none", True)):
        assert meaning(answer_of("qwen3", list(text), tools=tools)) == (text.partition("\n\n")[2], "Hm", [])


def test_a_prompt_that_opens_the_thoughts_is_known():
    assert meaning(answer_of("qwen3", ["Hm</think>Yes"], prompt_end="<|im_start|>assistant\n<think>\n")) == (
        "Yes",
        "Hm",
        [],
    )
    assert meaning(answer_of("qwen3", ["Yes"], prompt_end="<think>\n\n</think>\n\n")) == ("Yes", "", [])


def test_one_call_where_no_more_are_wanted():
    text = f"<tool_call>{JSON_CALL}</tool_call>" * 2
    alone = tools_of([WEATHER], "auto", False)

    assert meaning(answer_of("hermes", [text], tools=alone)) == ("", "", [CITY])
    assert meaning(answer_of("mistral", [f"[TOOL_CALLS][{JSON_CALL}, {JSON_CALL}]"], tools=alone)) == ("", "", [CITY])


def test_mistrals_ids_have_nine_letters_and_digits():
    (call,) = answer_of("mistral", [f"[TOOL_CALLS][{JSON_CALL}]"]).calls

    assert len(call.id) == 9 and call.id.isalnum()


def test_text_of_arguments_keeps_its_order_and_letters():
    (call,) = read_calls('{"name": "f", "arguments": {"z": 1, "a": "é"}}', {})

    assert call.arguments == '{"z": 1, "a": "é"}'


def test_a_scanner_says_what_is_certain_and_no_more():
    scanner = Scanner(["<think>", "</think>"])

    assert list(scanner.feed("a <thin")) == ["a "]
    assert list(scanner.feed("g</thi")) == ["<thing"]
    assert list(scanner.feed("nk>b<")) == ["</think>", "b"]
    assert scanner.finish() == "<"


@pytest.mark.parametrize(
    ("functions", "choice", "said"),
    [
        ([{"name": "a b"}], "auto", "letters"),
        ([{"name": "a", "parameters": 3}], "auto", "schema"),
        (["a"], "auto", "function with a name"),
        ([{"name": "a"}], "=b", "'b'"),
        ([], "required", "required"),
        ([{"name": "a"}] * 513, "auto", "512"),
    ],
)
def test_a_bad_tool_is_named(functions, choice, said):
    with pytest.raises(ApiError, match=said):
        tools_of(functions, choice, None)


NEST = {
    "hermes": ["<function=f>", "<function=f><parameter=x>", "<parameter=x>\n", '{"name": "f"} '],
    "glm": ["<arg_key>", "<arg_key>a</arg_key> ", "<arg_key>a</arg_key><arg_value>", "f "],
    "deepseek": [f"function{SEPARATOR}f ```json ", f"f{SEPARATOR}" + " " * 50, f"{SEPARATOR}f\n```" + " " * 50],
    "mistral": ["f[ARGS]", "[CALL_ID] a ", "[ARGS]{"],
}


@pytest.mark.parametrize("unit", [unit for units in NEST.values() for unit in units], ids=repr)
def test_a_hostile_call_takes_time_in_proportion_to_its_length(unit):
    """Four times the text: linear is 4 times the time, quadratic 16 times."""

    def seconds(length: int) -> float:
        text, begin = "<function=f>" * unit.startswith("<parameter") + unit * (length // len(unit)), time.process_time()
        read_calls(text, {"f": {}})
        return time.process_time() - begin

    seconds(1000)
    short, long = (min(seconds(length) for _ in range(3)) for length in (100_000, 400_000))

    assert long < 9 * short + 0.02


def test_a_bare_object_that_never_says_what_it_is_is_text_soon():
    for begin in ('{"' + "k" * 300, "{" + " " * 300, "{"):
        parser = AnswerFormat("llama3", MARKS["llama3"]).parsers(1, TOOLS, "")[0]
        told = parser.feed(begin).text + "".join(parser.feed("x" * 50).text for _ in range(8))

        assert told.startswith(begin.strip())


@pytest.mark.parametrize(
    ("family", "prompt_end", "pieces", "thoughts"),
    [
        ("hermes", "", ["<think>", "Hm, so it is", "</think>", "Yes"], [1]),
        ("hermes", "<think>\n", ["Hm, so it is", "</think>", "Yes"], [0]),
        ("hermes", "", ["<think>", "never ends"], [1]),
        ("hermes", "", ["Yes ", "<think>", "no thought", "</think>"], []),
        ("hermes", "", ["Yes"], []),
        ("harmony", "", ["<|channel|>analysis<|message|>", "Hm so", "<|end|>", "<|start|>assistant<|channel|>final<|message|>", "Yes"], [1]),
        ("harmony", "", ["<|channel|>final<|message|>", "Yes"], []),
    ],
)  # fmt: skip
def test_tokens_of_reasoning_are_those_between_its_markers(family, prompt_end, pieces, thoughts):
    tokenizer = Tokenizer.open(TINY)
    marks = None if family == "harmony" else Marks(("<think>", "</think>"), TAGS)
    ids = [tokenizer.encode(piece, add_special_tokens=False) for piece in pieces]
    form = AnswerFormat(family, marks, family == "harmony")

    expected = sum(len(ids[number]) for number in thoughts)
    assert thought_tokens(form, tokenizer, prompt_end, [each for some in ids for each in some]) == expected
