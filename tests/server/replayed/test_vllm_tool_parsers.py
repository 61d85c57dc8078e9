"""vLLM's tests of its parsers of calls: vllm-project/vllm, tests/tool_parsers (hermes, llama3_json, mistral, qwen3coder,
openai, glm4_moe, deepseekv3, streamed_args_bounds). Every text is fed whole, letter by letter and at random cuts."""

import json

from hetero_attn.server.dialogue.tools import tools_of
from tests.server.test_dialogue import answer_of, cuts, meaning
from tests.support.server.replayed import Written, each

STATE = {"type": "object", "properties": {"city": {"type": "string"}, "state": {"type": "string"}, "unit": {"type": "string"}, "days": {"type": "integer"}, "exact": {"type": "boolean"}, "tags": {"type": "array"}, "more": {"type": "object"}}}  # fmt: skip
TOOLS = tools_of(
    [{"name": name, "parameters": STATE} for name in ("get_weather", "get_time", "add", "final_answer")], "auto", True
)
DALLAS = ("get_weather", {"city": "Dallas", "state": "TX"})
ORLANDO = ("get_weather", {"city": "Orlando", "state": "FL"})
NO_ARGUMENTS = ("get_time", {})


def written(name: str, family: str, text: str, *calls: tuple[str, object], **more: str) -> Written:
    return Written(name=f"{family}: {name}", family=family, text=text, calls=calls, **more)


def as_json(call: tuple[str, object], field: str = "arguments") -> str:
    return json.dumps({"name": call[0], field: call[1]}, ensure_ascii=False)


def tagged(call: tuple[str, object]) -> str:
    return f"<tool_call>\n{as_json(call)}\n</tool_call>"


def coder(name: str, *pairs: tuple[str, str]) -> str:
    inside = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in pairs)
    return f"<tool_call>\n<function={name}>\n{inside}</function>\n</tool_call>"


def glm(name: str, *pairs: tuple[str, str]) -> str:
    inside = "".join(f"<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n" for key, value in pairs)
    return f"<tool_call>{name}\n{inside}</tool_call>"


def fenced(call: tuple[str, object]) -> str:
    return (
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{call[0]}\n```json\n{json.dumps(call[1])}\n```<｜tool▁call▁end｜>"
    )


def harmony(name: str, arguments: object) -> str:
    return f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{json.dumps(arguments)}"


LONG = ("add", {"city": "x" * 3000, "tags": list(range(200))})
DEEP = ("add", {"more": {"a": {"b": [1, {"c": "}</tool" + "_cal"}]}}})
QUOTES = ("add", {"city": 'He said "no", \\ and\nleft\t🎉'})
CALLS, END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CASES = [
    written("no call", "hermes", "How can I help you today?", said="How can I help you today?"),
    written("one call", "hermes", tagged(DALLAS), DALLAS),
    written("two calls", "hermes", f"{tagged(DALLAS)}\n{tagged(ORLANDO)}", DALLAS, ORLANDO),
    written("words before", "hermes", f"Let me check.\n{tagged(DALLAS)}", DALLAS, said="Let me check."),
    written("no end tag", "hermes", f"<tool_call>\n{as_json(DALLAS)}", DALLAS),
    written("no arguments", "hermes", tagged(NO_ARGUMENTS), NO_ARGUMENTS),
    written("letters and escapes", "hermes", tagged(QUOTES), QUOTES),
    written("an end tag's begin inside", "hermes", tagged(DEEP), DEEP),
    written("long arguments", "hermes", tagged(LONG), LONG),
    written("broken JSON", "hermes", '<tool_call>\n{"name": "get_weather", "arguments": {"city": \n</tool_call>', said='<tool_call>\n{"name": "get_weather", "arguments": {"city": \n</tool_call>'),
    written("cut off", "hermes", '<tool_call>\n{"name": "get_weather", "argu', said='<tool_call>\n{"name": "get_weather", "argu', finish_reason="length"),
    written("a lone end tag", "hermes", "so </tool_call> it is", said="so </tool_call> it is"),
    written("one call", "llama3", as_json(DALLAS, "parameters"), DALLAS),
    written("arguments in the place of parameters", "llama3", as_json(DALLAS), DALLAS),
    written("two calls", "llama3", f"<|python_tag|>{as_json(DALLAS, 'parameters')}; {as_json(ORLANDO, 'parameters')}", DALLAS, ORLANDO),
    written("marked", "llama3", f"<|python_tag|>{as_json(DALLAS, 'parameters')}", DALLAS),
    written("no call", "llama3", "The weather is fine.", said="The weather is fine."),
    written("an object that is an answer", "llama3", '{"result": 3}', said='{"result": 3}'),
    written("an unknown function", "llama3", '{"name": "fly", "parameters": {}}', said='{"name": "fly", "parameters": {}}'),
    written("a name that is no text", "llama3", '{"name": 123, "parameters": {}}', said='{"name": 123, "parameters": {}}'),
    written("a list", "mistral", f"[TOOL_CALLS][{as_json(DALLAS)}]", DALLAS),
    written("a list of two", "mistral", f"[TOOL_CALLS][{as_json(DALLAS)}, {as_json(ORLANDO)}]", DALLAS, ORLANDO),
    written("spaces", "mistral", f"[TOOL_CALLS]  [{as_json(DALLAS)} ]", DALLAS),
    written("by name", "mistral", '[TOOL_CALLS]get_weather{"city": "Dallas"}'.replace("{", "[ARGS]{", 1), ("get_weather", {"city": "Dallas"})),
    written("two by name", "mistral", '[TOOL_CALLS]add[ARGS]{"days": 3}[TOOL_CALLS]get_time[ARGS]{}', ("add", {"days": 3}), NO_ARGUMENTS),
    written("words before", "mistral", f"Sure.[TOOL_CALLS][{as_json(DALLAS)}]", DALLAS, said="Sure."),
    written("braces in a text", "mistral", '[TOOL_CALLS]add[ARGS]{"city": "}{[]"}', ("add", {"city": "}{[]"})),
    written("one call", "hermes-coder", coder("get_weather", ("city", "Dallas"), ("state", "TX")), DALLAS),
    written("types from the schema", "hermes-coder", coder("add", ("days", "3"), ("exact", "true"), ("tags", "[1, 2]"), ("more", '{"a": 1}')), ("add", {"days": 3, "exact": True, "tags": [1, 2], "more": {"a": 1}})),
    written("a number that is text", "hermes-coder", coder("add", ("city", "10001")), ("add", {"city": "10001"})),
    written("several lines", "hermes-coder", coder("add", ("city", "a\n  b\n\nc")), ("add", {"city": "a\n  b\n\nc"})),
    written("no parameters", "hermes-coder", coder("get_time"), NO_ARGUMENTS),
    written("two calls", "hermes-coder", coder("get_time") + "\n" + coder("add", ("days", "3")), NO_ARGUMENTS, ("add", {"days": 3})),
    written("tags in a value", "hermes-coder", coder("add", ("city", "a <b> </c> d")), ("add", {"city": "a <b> </c> d"})),
    written("one call", "glm", glm("get_weather", ("city", "Dallas"), ("state", "TX")), DALLAS),
    written("types from the schema", "glm", glm("add", ("days", "3"), ("tags", '["a"]')), ("add", {"days": 3, "tags": ["a"]})),
    written("two calls", "glm", f"{glm('get_time')}\n{glm('add', ('days', '3'))}", NO_ARGUMENTS, ("add", {"days": 3})),
    written("words before", "glm", f"I look.{glm('get_time')}", NO_ARGUMENTS, said="I look."),
    written("one call", "deepseek", f"{CALLS}{fenced(DALLAS)}{END}", DALLAS),
    written("two calls", "deepseek", f"{CALLS}{fenced(DALLAS)}\n{fenced(ORLANDO)}{END}", DALLAS, ORLANDO),
    written("words before", "deepseek", f"I look.{CALLS}{fenced(DALLAS)}{END}", DALLAS, said="I look."),
    written("one call", "harmony", harmony("get_weather", DALLAS[1]) + "<|call|>", DALLAS),
    written("a thought before", "harmony", f"<|channel|>analysis<|message|>Hm<|end|><|start|>assistant{harmony('get_time', {})}<|call|>", NO_ARGUMENTS, thought="Hm"),
    written("a preamble", "harmony", f"<|channel|>commentary<|message|>I look.<|end|><|start|>assistant{harmony('get_time', {})}", NO_ARGUMENTS, said="I look."),
    written("an answer", "harmony", "<|channel|>final<|message|>Done.", said="Done."),
    written("broken JSON", "harmony", "<|channel|>commentary to=functions.add <|constrain|>json<|message|>{\"days\": <|call|>", said='{"days": '),
]  # fmt: skip


@each(CASES)
def test_vllm_tool_parsers(case):
    family = case.family.removesuffix("-coder")
    for pieces in cuts(case.text)[: 3 if len(case.text) > 1000 else None]:
        found = answer_of(family, pieces, case.finish_reason, TOOLS, case.prompt_end)

        assert meaning(found) == (case.said, case.thought, list(case.calls)), pieces
