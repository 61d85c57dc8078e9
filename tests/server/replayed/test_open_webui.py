"""What Open WebUI's backend sends: open-webui/open-webui, backend/open_webui (routers/openai.py, routers/tasks.py,
utils/middleware.py, utils/payload.py): the same fields and headers, the tasks' prompts in shorter words."""

import json

from tests.support.server.replayed import Case, each

CHAT = "/v1/chat/completions"
TALK = [{"role": "user", "content": "What is a list?"}, {"role": "assistant", "content": "A sequence."}]
USER = {"authorization": "Bearer none", "x-openwebui-user-name": "Ada", "x-openwebui-user-id": "1", "x-openwebui-user-email": "a@b.c", "x-openwebui-user-role": "admin"}  # fmt: skip
HISTORY = "### Chat History:\n<chat_history>\nUSER: What is a list?\nASSISTANT: A sequence.\n</chat_history>"
SEARCH = {"type": "function", "function": {"name": "search_web", "description": "Search the web", "parameters": {"type": "object", "properties": {"query": {"type": "string"}, "count": {"type": "integer", "default": 5}}, "required": ["query"]}}}  # fmt: skip
CALL = '<tool_call>\n{"name": "search_web", "arguments": {"query": "lists", "count": 2}}\n</tool_call>'


def task(name: str, prompt: str, answer: str, **more: object) -> Case:
    """A request that it makes by itself: no stream, one message, and JSON is read out of what comes."""
    body = {"model": "tiny", "messages": [{"role": "user", "content": f"### Task:\n{prompt}\n{HISTORY}"}], "stream": False, **more}  # fmt: skip
    return Case(name=name, path=CHAT, headers=USER, says=answer, body=body, check=lambda r: read_json(r.said) == json.loads(answer) and HISTORY in r.prompts[0])  # fmt: skip


def read_json(text: str) -> object:
    """As it does: from the first brace to the last."""
    return json.loads(text[text.find("{") : text.rfind("}") + 1])


def chat(name: str, check, says: str = "A list.", **more: object) -> Case:
    body = {"stream": True, "model": "tiny", "messages": TALK[:1], **more}
    return Case(name=name, path=CHAT, headers=USER, says=says, body=body, check=check)


def collected(reply) -> list[dict]:
    """Calls as its middleware puts them together: by index, arguments joined as text."""
    calls: list[dict] = []
    for delta in reply.deltas:
        for part in delta.get("tool_calls", ()):
            known = next((call for call in calls if call["index"] == part["index"]), None)
            if known is None:
                calls.append({**part, "function": {"arguments": "", **part["function"]}})
            else:
                known["function"]["arguments"] += part["function"].get("arguments") or ""
    return calls


def called(reply) -> bool:
    (call,) = collected(reply)
    return json.loads(call["function"]["arguments"]) == {"query": "lists", "count": 2} and bool(call["id"])


def results(reply) -> bool:
    return reply.prompts[0].index("search_web") < reply.prompts[0].index("Lists are sequences.")


AFTER = [
    {"role": "assistant", "content": "", "tool_calls": [{"index": 0, "id": "call_1", "type": "function", "function": {"name": "search_web", "arguments": '{"query": "lists"}'}}]},
    {"role": "tool", "tool_call_id": "call_1", "content": "Lists are sequences."},
]  # fmt: skip
CONTEXT = "### Task:\nRespond to the user query using the provided context.\n<context>\n<source id=\"1\" name=\"lists.txt\">A list is mutable.</source>\n</context>\n"  # fmt: skip
PIXEL = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
CASES = [
    Case(name="models", path="/v1/models", headers=USER, check=lambda r: [card["id"] for card in r.json["data"]] and r.json["data"][0]["owned_by"]),
    Case(name="models of an address with a slash too many", path="/v1//models", headers=USER),
    Case(name="models with an empty key", path="/v1/models", headers={"authorization": "Bearer"}),
    Case(name="a connection is verified", path="/v1/models", headers={"authorization": "Bearer None", "content-type": "application/json"}),
    chat("a conversation", lambda r: r.streamed == "A list."),
    chat("usage", lambda r: r.events[-1]["usage"]["completion_tokens"] > 0, stream_options={"include_usage": True}),
    chat("parameters of a model's card", lambda r: r.streamed == "A list", temperature=0.8, top_p=0.9, max_tokens=64, frequency_penalty=0.0, presence_penalty=0.0, seed=42, stop=["."], logit_bias={"5": -10}),
    chat("reasoning is folded", lambda r: "".join(d.get("reasoning_content") or "" for d in r.deltas) == "Hm" and r.streamed == "A list.", says="<think>Hm</think>\n\nA list."),
    chat("reasoning_effort", lambda r: r.streamed == "A list.", reasoning_effort="high"),
    chat("native calls", called, says=CALL, tools=[SEARCH]),
    chat("results of native calls", results, messages=[*TALK[:1], *AFTER], tools=[SEARCH]),
    chat("a file as context", lambda r: "A list is mutable." in r.prompts[0], messages=[{"role": "system", "content": CONTEXT}, *TALK[:1]]),
    chat("a system text and a changed one", lambda r: "Be kind." in r.prompts[0] and "Today is Friday." in r.prompts[0], messages=[{"role": "system", "content": "Be kind."}, *TALK, {"role": "system", "content": "Today is Friday."}, *TALK[:1]]),
    chat("a text in parts", lambda r: "What is a list?" in r.prompts[0], messages=[{"role": "user", "content": [{"type": "text", "text": "What is a list?"}]}]),
    Case(name="an image", path=CHAT, headers=USER, body={"stream": True, "model": "tiny", "messages": [{"role": "user", "content": [{"type": "text", "text": "What?"}, PIXEL]}]}, status=400, error="text only"),
    chat("it goes on where it was stopped", lambda r: r.prompts[0].count("<|assistant|>") >= 1 and "A sequence." in r.prompts[0], messages=TALK),
    task("title", "Generate a concise, 3-5 word title with an emoji summarizing the chat history.", '{"title": "🎉 Lists"}', max_completion_tokens=1000),
    task("title by Ollama's field", "Generate a concise title.", '{"title": "Lists"}', max_tokens=1000),
    task("tags", "Generate 1-3 broad tags categorizing the main themes of the chat history.", '{"tags": ["Python", "Lists"]}'),
    task("follow-up questions", "Suggest 3-5 relevant follow-up questions.", '{"follow_ups": ["What is a tuple?"]}'),
    task("queries for a search", "Determine the necessity of generating search queries.", '{"queries": ["python list"]}', temperature=0.1),
    task("completion of what is typed", "Generate a single completion for the text.", '{"text": "is a list?"}', max_completion_tokens=50),
    Case(name="emoji", path=CHAT, headers=USER, says="🎉", body={"model": "tiny", "messages": [{"role": "user", "content": "Give one emoji."}], "stream": False, "max_completion_tokens": 4, "chat_id": "c1"}, check=lambda r: r.said == "🎉"),
    Case(name="embeddings for files", path="/v1/embeddings", headers=USER, body={"model": "tiny", "input": ["A list is mutable."]}, status=404, error="embeddings"),
    Case(name="as Ollama: version", path="/api/version", headers=USER, check=lambda r: r.json["version"].count(".") == 2),
    Case(name="as Ollama: tags", path="/api/tags", headers=USER, check=lambda r: r.json["models"][0]["model"]),
    Case(name="as Ollama: a conversation", path="/api/chat", headers=USER, says="A list.", body={"model": "tiny", "messages": TALK[:1], "stream": True, "options": {"temperature": 0.8}, "keep_alive": "5m"}, check=lambda r: "".join(line["message"]["content"] for line in r.lines) == "A list."),
]  # fmt: skip


@each(CASES)
def test_open_webui(replay, case):
    replay(case)
