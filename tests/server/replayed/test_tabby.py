"""TabbyAPI's tests: theroyallab/tabbyAPI, tests (test_context_length_errors, test_stream_parser, test_tool_message_order,
test_continue_final_message, test_stream_role, test_usage_stats, test_best_of, test_template_vars)."""

from tests.server.test_dialogue import answer_of, meaning
from tests.support.server.replayed import Case, Written, each

CHAT = "/v1/chat/completions"
OPEN = "<|im_start|>assistant\n<think>\n"
LONG = "word " * 4000
SHAPE = {"message", "type", "param", "code"}
CALLED = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": None, "tool_calls": [{"id": i, "type": "function", "function": {"name": "f", "arguments": "{}"}} for i in "abc"]},
]  # fmt: skip


def overflow(name: str, path: str, body: dict) -> Case:
    def is_told(reply) -> bool:
        error = reply.json["error"]
        return (
            set(error) == SHAPE
            and error["code"] == "context_length_exceeded"
            and "maximum context length is 1024" in error["message"]
        )

    return Case(name=name, path=path, body=body, status=400, check=is_told)


def tool(call_id: str) -> dict:
    return {"role": "tool", "tool_call_id": call_id, "content": f"result of {call_id}"}


CASES = [
    overflow("a chat", CHAT, {"messages": [{"role": "user", "content": LONG}]}),
    overflow("a chat's stream is refused before headers", CHAT, {"messages": [{"role": "user", "content": LONG}], "stream": True}),
    overflow("a completion", "/v1/completions", {"prompt": LONG}),
    overflow("one of several prompts", "/v1/completions", {"prompt": ["short", LONG]}),
    Case(name="another error has another code", path=CHAT, body={"messages": []}, status=400, check=lambda r: r.json["error"]["code"] != "context_length_exceeded"),
    Case(name="results of tools in their calls' order", path=CHAT, says="A.", body={"messages": [*CALLED, tool("a"), tool("b"), tool("c")]}, check=lambda r: 0 < r.prompts[0].index("result of a") < r.prompts[0].index("result of b")),
    Case(name="a result of a call that is unknown", path=CHAT, says="A.", body={"messages": [*CALLED, tool("x")]}, check=lambda r: "result of x" in r.prompts[0]),
    Case(name="an open message goes on", path=CHAT, says="er", body={"messages": [CALLED[0], {"role": "assistant", "content": "Whill"}], "continue_final_message": True, "add_generation_prompt": False}, check=lambda r: r.said == "er" and r.prompts[0].endswith("Whill")),
    Case(name="the role comes once", path=CHAT, says="a b c", body={"messages": [CALLED[0]], "stream": True}, check=lambda r: [d.get("role") for d in r.deltas].count("assistant") == 1 and r.deltas[0]["role"] == "assistant"),
    Case(name="usage", path=CHAT, says="a b c", body={"messages": [CALLED[0]]}, check=lambda r: r.json["usage"]["total_tokens"] == r.json["usage"]["prompt_tokens"] + r.json["usage"]["completion_tokens"]),
    Case(name="best_of", path="/v1/completions", body={"prompt": "a", "n": 1, "best_of": 4}, status=400, error="best_of"),
    Case(name="variables of the template", path=CHAT, says="a", body={"messages": [CALLED[0]], "chat_template_kwargs": {"enable_thinking": False}}, check=lambda r: r.prompts[0].endswith("<think></think>")),
    Case(name="a variable that may not be set", path=CHAT, body={"messages": [CALLED[0]], "chat_template_kwargs": {"tokenize": False}}, status=400, error="chat_template_kwargs"),
]  # fmt: skip
PARSED = [
    (Written(name="reasoning and an answer", family="qwen3", text="", said="answer", thought="thinking...", prompt_end=OPEN), ["thinking...", "</think>", "\n\n", "answer"]),
    (Written(name="a tag inside a span", family="qwen3", text="", said="answer", thought="thinking", prompt_end=OPEN), ["thinking\n</think>\n\nanswer"]),
    (Written(name="a tag in two pieces", family="qwen3", text="", said="answer", thought="thinking", prompt_end=OPEN), ["thinking", "</th", "ink>", "answer"]),
    (Written(name="a tag letter by letter", family="qwen3", text="", said="b", thought="a", prompt_end=OPEN), ["a", *"</think>", "b"]),
    (Written(name="what only looks like a tag", family="qwen3", text="", said="use <the table> tag"), ["use <th", "e table> tag"]),
    (Written(name="a tag's begin at the end", family="qwen3", text="", said="text ends with <thi"), ["text ends with <thi"]),
    (Written(name="reasoning that the answer opens", family="qwen3", text="", said="final", thought="deep"), ["<think>deep", "</think>", "final"]),
    (Written(name="nothing but blanks behind reasoning", family="qwen3", text="", thought="think", prompt_end=OPEN), ["think", "</think>", "\n\n  \n"]),
    (Written(name="a call in reasoning is reasoning", family="qwen3", text="", said="done", thought="hm <tool_call>x</tool_call> more", prompt_end=OPEN), ["hm <tool_call>x</tool_call> more", "</think>", "done"]),
    (Written(name="no tags", family="plain", text="", said="plain text"), ["plain ", "text"]),
    (Written(name="pieces keep every letter", family="qwen3", text="", said="Yes, 4.", thought="I think so", prompt_end=OPEN), ["I ", "think", " so", "\n</think>\n\nYes", ", 4", "."]),
    (Written(name="channels", family="harmony", text="", said="The answer is 4.", thought="Let me think."), ["<|channel|>analysis<|message|>Let me think.", "<|end|>", "<|start|>assistant<|channel|>final<|message|>", "The answer is 4."]),
    (Written(name="a marker of channels in two pieces", family="harmony", text="", said="b", thought="a"), ["<|channel|>analysis<|mess", "age|>a<|e", "nd|><|start|>assistant", "<|channel|>final<|message|>b"]),
    (Written(name="a header that is cut off", family="harmony", text="", finish_reason="length"), ["<|channel|>anal"]),
    (Written(name="a call by channels", family="harmony", text="", thought="Time.", calls=(("get_time", {"location": "Tokyo"}),)), ["<|channel|>analysis<|message|>Time.<|end|>", "<|start|>assistant<|channel|>commentary", " to=functions.get_time <|constrain|>json", "<|message|>", '{"location": ', '"Tokyo"}']),
    (Written(name="the receiver before the channel", family="harmony", text="", calls=(("get_time", {}),)), ["<|channel|>analysis<|message|><|end|>", "<|start|>assistant to=functions.get_time<|channel|>commentary json<|message|>{}"]),
]  # fmt: skip
PIECES = {case.name: pieces for case, pieces in PARSED}
CASES += [case for case, _ in PARSED]


@each(CASES)
def test_tabby(replay, case):
    if isinstance(case, Case):
        replay(case)
        return
    found = answer_of(case.family, PIECES[case.name], case.finish_reason, prompt_end=case.prompt_end)
    assert meaning(found) == (case.said, case.thought, list(case.calls))
