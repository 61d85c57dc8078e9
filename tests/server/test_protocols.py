"""Anthropic's messages, OpenAI's responses, Ollama's lines: read by the clients that people have."""

import json

import httpx
import pytest

from hetero_attn.serving.sampling_params import SamplingParams
from tests.support.server.scripted import saying

QUESTION = "What is a list?"
USER = [{"role": "user", "content": QUESTION}]
CALLED = "Let me see.\n<tool_call>\n" + json.dumps({"name": "look", "arguments": {"at": "é"}}) + "\n</tool_call>"
LOOK = {"name": "look", "description": "Look at a thing.", "parameters": {"type": "object", "properties": {"at": {"type": "string"}}}}  # fmt: skip


def events(text: str) -> list[dict]:
    """Named events, whose names their data repeat."""
    found = []
    for frame in text.removesuffix("\n\n").split("\n\n"):
        name, data = frame.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def streamed(http: httpx.Client, path: str, **body: object) -> str:
    answer = http.post(path, json={**body, "stream": True})
    assert answer.status_code == 200, answer.text
    return answer.text


@pytest.fixture(scope="module")
def expected(server) -> str:
    """The greedy answer."""
    return server.llm.chat(USER, SamplingParams(temperature=0.0, max_tokens=30)).text


def test_every_protocol_gives_the_same_answer(http, expected):
    greedy = {"model": "m", "temperature": 0}
    message = http.post("/v1/messages", json={**greedy, "messages": USER, "max_tokens": 30}).json()
    response = http.post("/v1/responses", json={**greedy, "input": QUESTION, "max_output_tokens": 30}).json()
    options = {"options": {"temperature": 0, "num_predict": 30}, "stream": False}
    chat = http.post("/api/chat", json={"model": "m", "messages": USER, **options}).json()
    text = http.post("/api/generate", json={"model": "m", "prompt": QUESTION, **options}).json()

    assert message["content"] == [{"type": "text", "text": expected}] and message["stop_reason"] == "end_turn"
    assert response["output"][0]["content"][0]["text"] == expected and response["status"] == "completed"
    assert chat["message"] == {"role": "assistant", "content": expected} and chat["done_reason"] == "stop"
    assert text["response"] == expected
    counts = {message["usage"]["input_tokens"] + message["usage"]["cache_read_input_tokens"]}
    assert counts == {response["usage"]["input_tokens"]} == {chat["prompt_eval_count"]} == {text["prompt_eval_count"]}
    assert message["usage"]["output_tokens"] == response["usage"]["output_tokens"] == chat["eval_count"]


def test_events_of_a_message_come_in_their_order(http, expected):
    found = events(streamed(http, "/v1/messages", model="m", messages=USER, max_tokens=30, temperature=0))
    kinds = [each["type"] for each in found]

    assert kinds[:2] == ["message_start", "content_block_start"]
    assert set(kinds[2:-3]) == {"content_block_delta"}
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert "".join(each["delta"]["text"] for each in found[2:-3]) == expected
    assert found[0]["message"]["content"] == [] and found[0]["message"]["usage"]["input_tokens"] > 0
    assert found[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}


def test_events_of_a_response_are_numbered_and_come_in_their_order(http, expected):
    found = events(streamed(http, "/v1/responses", input=QUESTION, temperature=0, max_output_tokens=30))
    kinds = [each["type"].removeprefix("response.") for each in found]

    assert [each["sequence_number"] for each in found] == list(range(len(found)))
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert set(kinds[4:-4]) == {"output_text.delta"}
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "completed"]
    assert found[-4]["text"] == expected == found[-1]["response"]["output"][0]["content"][0]["text"]


@pytest.mark.parametrize(
    ("path", "body", "reason"),
    [
        ("/v1/messages", {"messages": USER, "max_tokens": 3}, ("stop_reason", "max_tokens")),
        ("/v1/messages", {"messages": USER, "max_tokens": 30, "stop_sequences": ["list", "statement"]}, ("stop_sequence", "statement")),
        ("/v1/messages", {"messages": USER, "max_tokens": 30, "stop_sequences": ["statement"]}, ("stop_reason", "stop_sequence")),
        ("/v1/responses", {"input": QUESTION, "max_output_tokens": 3}, ("status", "incomplete")),
        ("/api/chat", {"messages": USER, "options": {"num_predict": 3, "temperature": 0}}, ("done_reason", "length")),
        ("/api/chat", {"messages": []}, ("done_reason", "load")),
        ("/api/generate", {"prompt": ""}, ("done_reason", "load")),
        ("/api/generate", {"prompt": "A list", "raw": True, "options": {"num_predict": 2}}, ("prompt_eval_count", 3)),
    ],
    ids=str,
)  # fmt: skip
def test_it_is_told_why_an_answer_ended(http, path, body, reason):
    field, value = reason
    answer = http.post(path, json={"temperature": 0, "model": "m", "stream": False, **body})

    assert answer.json()[field] == value, answer.text


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("messages", {"messages": USER}, "max_tokens"),
        ("messages", {"messages": [], "max_tokens": 1}, "messages"),
        ("messages", {"messages": [{"role": "user", "content": ["x"]}], "max_tokens": 1}, "messages.0.content.0"),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "image"}]}], "max_tokens": 1}, "text only"),
        ("messages", {"messages": [{"role": "assistant", "content": [{"type": "document"}]}], "max_tokens": 1}, "document"),
        ("messages", {"messages": USER, "max_tokens": 1, "tools": [{"type": "bash_20250124"}]}, "bash_20250124"),
        ("messages", {"messages": USER, "max_tokens": 1, "tool_choice": {"type": "some"}}, "tool_choice.type"),
        ("messages", {"messages": USER, "max_tokens": 1, "tools": [{"name": "f"}]}, "knows no tools"),
        ("messages", {"messages": USER, "max_tokens": 1, "container": "x"}, "container"),
        ("responses", {"input": ""}, "input is empty"),
        ("responses", {"input": [{"type": "item_reference", "id": "x"}]}, "item_reference"),
        ("responses", {"input": "a", "previous_response_id": "resp_1"}, "send the whole conversation"),
        ("responses", {"input": "a", "background": True}, "background"),
        ("responses", {"input": "a", "truncation": "auto"}, "truncation"),
        ("responses", {"input": "a", "include": ["message.output_text.logprobs"]}, "include"),
        ("responses", {"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "text only"),
        ("chat", {"messages": [{"role": "user", "content": "a", "images": ["x"]}]}, "images"),
        ("chat", {"messages": USER, "options": {"num_predict": "many"}}, "num_predict"),
        ("chat", {"messages": USER, "options": {"temperature": -1}}, "temperature"),
        ("generate", {"prompt": "a", "suffix": "b"}, "suffix"),
        ("generate", {"prompt": "a", "images": ["b"]}, "images"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_done_is_refused_in_the_protocols_form(http, path, body, said):
    is_ollama = path in ("chat", "generate")
    answer = http.post(f"/api/{path}" if is_ollama else f"/v1/{path}", json=body)
    error = answer.json()["error"]

    assert answer.status_code == 400 and said in (error if is_ollama else error["message"]), answer.text
    if path == "messages":
        assert answer.json()["type"] == "error" and error["type"] == "invalid_request_error"


def test_an_overlong_prompt_is_refused_in_each_protocols_words(http):
    long = "a b " * 600
    message = http.post("/v1/messages", json={"messages": [{"role": "user", "content": long}], "max_tokens": 1})
    failed = events(streamed(http, "/v1/responses", input=long))
    whole = http.post("/v1/responses", json={"input": long})

    assert message.status_code == 400 and "maximum context length is 512" in message.json()["error"]["message"]
    assert [each["type"] for each in failed] == ["response.created", "response.in_progress", "response.failed"]
    assert failed[-1]["response"]["error"]["code"] == "context_length_exceeded"
    assert whole.status_code == 400 and whole.json()["error"]["code"] == "context_length_exceeded"


def test_tokens_are_counted_as_the_request_will_have_them(http):
    body = {"model": "m", "messages": USER, "system": [{"type": "text", "text": "Be short."}]}
    counted = http.post("/v1/messages/count_tokens", json=body).json()["input_tokens"]
    usage = http.post("/v1/messages", json={**body, "max_tokens": 1}).json()["usage"]
    long = http.post("/v1/messages/count_tokens", json={"messages": [{"role": "user", "content": "a b " * 600}]})

    assert counted == usage["input_tokens"] + usage["cache_read_input_tokens"]
    assert long.json()["input_tokens"] > 600, "what is beyond the context can be counted, too"


def test_a_message_without_a_block_is_an_empty_one(http):
    """It met an IndexError: 500."""
    counted = [
        http.post("/v1/messages/count_tokens", json={"messages": [{"role": "user", "content": content}]})
        for content in ([], "", [{"type": "text", "text": ""}])
    ]

    assert [each.status_code for each in counted] == [200] * 3
    assert len({each.json()["input_tokens"] for each in counted}) == 1


def test_a_clients_changing_line_is_no_part_of_the_prompt(http):
    def count(*texts: str) -> int:
        system = [{"type": "text", "text": text} for text in texts]
        body = {"messages": USER, "system": system}
        return http.post("/v1/messages/count_tokens", json=body).json()["input_tokens"]

    assert count("x-anthropic-billing-header: cc_version=1; cch=123", "Be short.") == count("Be short.")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_anthropic_python_reads_text_thoughts_and_calls(tooled, stream):
    anthropic = pytest.importorskip("anthropic", reason="the anthropic package is not installed")
    client = anthropic.Anthropic(base_url=tooled.url, api_key="none", max_retries=0)
    tool = {"name": "look", "description": "Look", "input_schema": LOOK["parameters"]}
    body = {"model": "tiny", "max_tokens": 100, "messages": USER, "tools": [tool], "system": "Be short."}
    with saying(tooled.llm, f"<think>\nHm\n</think>\n\n{CALLED}") as prompts:
        if stream:
            with client.messages.stream(**body) as answer:
                message = answer.get_final_message()
        else:
            message = client.messages.create(**body)

    thought, text, call = message.content
    assert (thought.type, thought.thinking) == ("thinking", "Hm")
    assert (text.type, text.text) == ("text", "Let me see.")
    assert (call.type, call.name, call.input) == ("tool_use", "look", {"at": "é"})
    assert message.stop_reason == "tool_use" and message.usage.output_tokens > 10
    assert '"name": "look"' in prompts[0] and "Be short." in prompts[0]

    back = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "A wall."}]}
    history = [*USER, message.to_param(), {"role": "user", "content": [back, {"type": "text", "text": "And?"}]}]
    with saying(tooled.llm, "Fine.") as prompts:
        final = client.messages.create(**body | {"messages": history})
    counted = client.messages.count_tokens(model="tiny", messages=history, tools=[tool], system="Be short.")

    assert final.content[0].text == "Fine." and final.usage.cache_read_input_tokens > 0
    assert counted.input_tokens == final.usage.input_tokens + final.usage.cache_read_input_tokens
    assert '<tool_call>\n{"name": "look", "arguments": {"at": "é"}}\n</tool_call>' in prompts[0]
    assert prompts[0].index("<|tool|>A wall.") < prompts[0].index("<|user|>And?") and "<think>Hm</think>" in prompts[0]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_openai_python_reads_calls_of_chat_completions(tooled, stream):
    openai = pytest.importorskip("openai", reason="the openai package is not installed")
    client = openai.OpenAI(base_url=tooled.url + "/v1", api_key="none", max_retries=0)
    body = {"model": "tiny", "messages": USER, "tools": [{"type": "function", "function": LOOK}]}
    with saying(tooled.llm, f"<think>\nHm\n</think>\n\n{CALLED}"):
        if stream:
            with client.chat.completions.stream(**body, stream_options={"include_usage": True}) as answer:
                answer.until_done()
                completion = answer.get_final_completion()
        else:
            completion = client.chat.completions.create(**body)

    (choice,), usage = completion.choices, completion.usage
    (call,) = choice.message.tool_calls
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Let me see.")
    assert choice.message.model_extra["reasoning_content"] == "Hm"
    assert usage.completion_tokens_details.reasoning_tokens == len(
        tooled.llm.tokenizer.encode("\nHm\n", add_special_tokens=False)
    )
    assert (call.function.name, json.loads(call.function.arguments)) == ("look", {"at": "é"})


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_openai_python_reads_calls_of_responses(tooled, stream):
    openai = pytest.importorskip("openai", reason="the openai package is not installed")
    client = openai.OpenAI(base_url=tooled.url + "/v1", api_key="none", max_retries=0)
    tools = [{"type": "function", **LOOK}, {"type": "web_search"}]
    body = {"model": "tiny", "input": QUESTION, "tools": tools, "instructions": "Be short."}
    with saying(tooled.llm, f"<think>\nHm\n</think>\n\n{CALLED}") as prompts:
        if stream:
            with client.responses.stream(**body) as answer:
                answer.until_done()
                response = answer.get_final_response()
        else:
            response = client.responses.create(**body)

    thought, message, call = response.output
    assert thought.content[0].text == "Hm" and message.content[0].text == response.output_text == "Let me see."
    assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "look", {"at": "é"})
    assert "web_search" not in prompts[0] and "Be short." in prompts[0] and response.store is False

    history = [{"role": "user", "content": QUESTION}, *(item.model_dump(exclude_none=True) for item in response.output)]
    history.append({"type": "function_call_output", "call_id": call.call_id, "output": "A wall."})
    with saying(tooled.llm, "Fine.") as prompts:
        final = client.responses.create(**body | {"input": history})

    assert final.output_text == "Fine." and final.usage.input_tokens_details.cached_tokens > 0
    assert '<think>Hm</think>Let me see.<tool_call>\n{"name": "look"' in prompts[0] and "A wall." in prompts[0]


def test_ollama_python_reads_everything(tooled):
    ollama = pytest.importorskip("ollama", reason="the ollama package is not installed")
    client = ollama.Client(host=tooled.url)
    tool = {"type": "function", "function": LOOK}
    with saying(tooled.llm, f"<think>\nHm\n</think>\n\n{CALLED}"):
        whole = client.chat(model="tooled", messages=USER, tools=[tool], think=True)
        parts = list(client.chat(model="tooled", messages=USER, tools=[tool], think=True, stream=True))
    calls = [call for part in parts for call in part.message.tool_calls or ()]

    assert (whole.message.content, whole.message.thinking) == ("Let me see.", "Hm")
    assert "".join(part.message.content for part in parts) == "Let me see."
    for call in (whole.message.tool_calls[0], *calls):
        assert (call.function.name, call.function.arguments) == ("look", {"at": "é"})
    assert len(calls) == 1 and parts[-1].done and parts[-1].eval_count > 10

    history = [*USER, whole.message, {"role": "tool", "tool_name": "look", "content": "A wall."}]
    with saying(tooled.llm, "Fine.") as prompts:
        assert client.chat(model="tooled", messages=history, tools=[tool], think=False).message.content == "Fine."
        assert client.generate(model="tooled", prompt="Hi", system="Be short.").response == "Fine."
    assert "A wall." in prompts[0] and prompts[0].endswith("<think></think>") and "Be short." in prompts[1]

    assert [model.model for model in client.list().models] == ["tooled"]
    shown = client.show("tooled")
    assert shown.capabilities == ["completion", "tools", "thinking"]
    assert shown.modelinfo["LlamaForCausalLM.context_length"] == 1024
    assert httpx.get(tooled.url + "/api/version", trust_env=False).json()["version"].count(".") == 2
    with pytest.raises(ollama.ResponseError, match="maximum context length"):
        client.generate(model="tooled", prompt="a b " * 1200)


def test_a_malformed_call_reaches_clients_as_text(tooled):
    broken = '<tool_call>\n{"name": "look", "arguments": {"at": </tool_call>'
    body = {"messages": USER, "tools": [{"type": "function", "function": LOOK}], "tool_choice": "auto"}
    with saying(tooled.llm, broken):
        choice = httpx.post(tooled.url + "/v1/chat/completions", json=body, trust_env=False, timeout=60).json()[
            "choices"
        ][0]

    assert (choice["message"]["content"], choice["finish_reason"]) == (broken, "stop")
    assert "tool_calls" not in choice["message"]


def test_a_call_cut_by_the_limit_is_no_call(tooled):
    body = {"messages": USER, "tools": [{"type": "function", "function": LOOK}], "max_tokens": 20}
    with saying(tooled.llm, CALLED):
        choice = httpx.post(tooled.url + "/v1/chat/completions", json=body, trust_env=False, timeout=60).json()[
            "choices"
        ][0]

    assert choice["finish_reason"] == "length" and choice["message"]["content"].startswith("Let me see.\n<tool_call>")


def test_effort_none_means_no_thinking(tooled):
    with saying(tooled.llm, "Yes.") as prompts:
        for body in ({"reasoning_effort": "none"}, {"chat_template_kwargs": {"enable_thinking": False}}, {}):
            httpx.post(
                tooled.url + "/v1/chat/completions", json={"messages": USER, **body}, trust_env=False, timeout=60
            )

    assert [prompt.endswith("<think></think>") for prompt in prompts] == [True, True, False]


ROUNDS = {
    "/v1/chat/completions": lambda answer: [
        answer["choices"][0]["message"],
        {"role": "tool", "tool_call_id": answer["choices"][0]["message"]["tool_calls"][0]["id"], "content": "A wall."},
    ],
    "/v1/messages": lambda answer: [
        {"role": "assistant", "content": answer["content"]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": answer["content"][-1]["id"], "content": "A wall."}]},
    ],
    "/v1/responses": lambda answer: [
        *answer["output"],
        {"type": "function_call_output", "call_id": answer["output"][-1]["call_id"], "output": "A wall."},
    ],
}  # fmt: skip


@pytest.mark.parametrize("path", ROUNDS)
def test_a_turn_that_is_sent_back_is_found_again(tooled, path):
    """At least 95 of 100 tokens in whole pages of the first turn, thoughts and a call among them, are not computed again."""
    is_chat, words = path.endswith("completions"), "input" if path.endswith("responses") else "messages"
    tool = {"type": "function", "function": LOOK} if is_chat else {"type": "function", **LOOK}
    if path.endswith("messages"):
        tool = {"name": "look", "description": LOOK["description"], "input_schema": LOOK["parameters"]}
    question = [{"role": "user", "content": f"What is a list, asked by {path}? " * 6}]
    more = {"max_tokens": 200} if path.endswith("messages") else {}

    def ask(history: list) -> dict:
        body = {"tools": [tool], words: history, **more}
        return httpx.post(tooled.url + path, json=body, trust_env=False, timeout=60).json()

    def counts(usage: dict) -> tuple[int, int, int]:
        """Of the prompt, of those that were found, of the answer."""
        if "prompt_tokens" in usage:
            return usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"], usage["completion_tokens"]
        if "cache_read_input_tokens" in usage:
            found = usage["cache_read_input_tokens"]
            return usage["input_tokens"] + found, found, usage["output_tokens"]
        return usage["input_tokens"], usage["input_tokens_details"]["cached_tokens"], usage["output_tokens"]

    written = CALLED.replace(".\n", ".").replace("\\u00e9", "é")  # as the template writes it
    with saying(tooled.llm, f"<think>Hm, let me think of what that is.</think>{written}"):
        first = ask(question)
    with saying(tooled.llm, "Fine."):
        second = ask([*question, *ROUNDS[path](first)])
    prompt, _, generated = counts(first["usage"])
    whole, found, _ = counts(second["usage"])

    page_size = tooled.llm.plan.page_size
    in_pages = (prompt + generated - 1) // page_size * page_size  # the last token was never computed
    assert whole > prompt + generated and found >= 0.95 * in_pages > 2 * page_size
