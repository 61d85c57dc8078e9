"""Questions of benchmarks: functions with the types of the Berkeley function-calling leaderboard (bfcl-eval: simple,
multiple, parallel, irrelevance, Java's and JavaScript's types) and prompts in HumanEval's form (openai/human-eval)."""

import json

from tests.support.server.replayed import Case, each

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
STOPS = ["\nclass", "\ndef", "\n#", "\nif"]
PROMPT = 'def has_close_elements(numbers, threshold):\n    """ Check if any two numbers are closer than threshold.\n    """\n'
BODY = "    return any(abs(a - b) < threshold for a in numbers for b in numbers if a is not b)"


def function(name: str, properties: dict, required: list[str] | None = None) -> dict:
    schema = {
        "type": "object",
        "properties": properties,
        "required": list(properties) if required is None else required,
    }
    return {"type": "function", "function": {"name": name, "description": f"Call {name}.", "parameters": schema}}


def said(*calls: tuple[str, dict]) -> str:
    return "\n".join("<tool_call>\n" + json.dumps({"name": n, "arguments": a}) + "\n</tool_call>" for n, a in calls)


def asked(name: str, question: str, tools: list[dict], *calls: tuple[str, dict], answer: str | None = None) -> Case:
    body = {"messages": [{"role": "user", "content": question}], "tools": tools, "max_tokens": 300}
    return Case(
        name=name,
        path=CHAT,
        says=said(*calls) if answer is None else answer,
        body=body,
        check=lambda r: r.calls == list(calls),
    )


AREA = function("calculate_triangle_area", {"base": {"type": "integer"}, "height": {"type": "integer"}, "unit": {"type": "string"}}, ["base", "height"])  # fmt: skip
FACTORIAL = function("math.factorial", {"number": {"type": "integer"}})
SPOTIFY = function("spotify.play", {"artist": {"type": "string"}, "duration": {"type": "number"}})
NESTED = function("database_query", {"table": {"type": "string"}, "conditions": {"type": "array", "items": {"type": "object", "properties": {"field": {"type": "string"}, "value": {"type": "string"}}}}})  # fmt: skip
FORCED = {"type": "function", "function": {"name": "calculate_triangle_area"}}
CASES = [
    asked("simple", "Find the area of a triangle with a base of 10 units and height of 5 units.", [AREA], ("calculate_triangle_area", {"base": 10, "height": 5})),
    asked("a name with a dot", "Calculate the factorial of 5.", [FACTORIAL], ("math.factorial", {"number": 5})),
    asked("multiple", "Calculate the factorial of 5.", [AREA, FACTORIAL, SPOTIFY], ("math.factorial", {"number": 5})),
    asked("parallel", "Play songs of two artists.", [SPOTIFY], ("spotify.play", {"artist": "Taylor Swift", "duration": 20}), ("spotify.play", {"artist": "Maroon 5", "duration": 15.5})),
    asked("parallel multiple", "Play a song, and the factorial of 5.", [SPOTIFY, FACTORIAL], ("spotify.play", {"artist": "Maroon 5", "duration": 15}), ("math.factorial", {"number": 5})),
    asked("nested", "Find users older than 25.", [NESTED], ("database_query", {"table": "user", "conditions": [{"field": "age", "value": "25"}]})),
    asked("irrelevance", "What is the capital of France?", [AREA], answer="None of the functions can be used."),
    Case(name="a call that must come has the schema's types", path=CHAT, body={"messages": [{"role": "user", "content": "Area?"}], "tools": [AREA], "tool_choice": FORCED, "temperature": 1, "seed": 2, "max_tokens": 200},
         check=lambda r: all(type(r.calls[0][1][name]) is int for name in ("base", "height"))),
    Case(name="code ends where the next thing begins", path=TEXT, says=f"{BODY}\n\ndef next():\n", body={"prompt": PROMPT, "max_tokens": 300, "temperature": 0, "stop": STOPS}, check=lambda r: r.said == BODY + "\n" and r.choice["finish_reason"] == "stop"),
    Case(name="many samples of a prompt", path=TEXT, body={"prompt": PROMPT, "max_tokens": 8, "temperature": 0.8, "n": 8, "stop": STOPS}, check=lambda r: len(r.json["choices"]) == 8),
    Case(name="a prompt is scored", path=TEXT, body={"prompt": PROMPT, "max_tokens": 0, "echo": True, "logprobs": 1}, check=lambda r: len(r.choice["logprobs"]["token_logprobs"]) == r.json["usage"]["prompt_tokens"]),
]  # fmt: skip


@each(CASES)
def test_bfcl_humaneval(replay, case):
    replay(case)
