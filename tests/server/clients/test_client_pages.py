"""The pages of docs/clients hold: what they set is set, and each client's own kind of request is answered as it reads it.

The bodies have the fields, items and tools that Codex 0.171, Claude Code 2.1, aider 0.86 and opencode 1.18 sent when
they were run against this server, with shorter words. Where a client is installed it runs itself.
"""

import json
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import httpx
import pytest
import yaml

from tests.support.server.http_server import RunningServer
from tests.support.server.scripted import load_with, model_with, saying

PAGES = Path(__file__).resolve().parents[3] / "docs" / "clients"
ADDRESS = "http://localhost:8000"
SAID = "Hello from the tiny model."
OBJECT = {"type": "object", "properties": {"cmd": {"type": "string"}}, "required": ["cmd"]}
RUN_S = 110


def block(page: str, language: str, url: str) -> str:
    """The first fenced block of a page, with a server's address in it."""
    (text,) = re.findall(rf"^```{language}\n(.*?)^```$", (PAGES / f"{page}.md").read_text(), re.DOTALL | re.M)[:1]
    return text.replace(ADDRESS, url)


def exported(text: str) -> dict[str, str]:
    return dict(re.findall(r"^export (\w+)=(.*)$", text, re.M))


@pytest.fixture(scope="module")
def tooled(tmp_path_factory):
    """A server of a model that knows tools, with the context that agents need."""
    folder = model_with(tmp_path_factory.mktemp("model") / "tiny")
    config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 40960}
    (folder / "config.json").write_text(json.dumps(config))
    with RunningServer(lambda: load_with(folder, context=40960, batch=2)) as running:
        yield running


@pytest.fixture
def http():
    with httpx.Client(timeout=60, trust_env=False) as client:
        yield client


def events(answer: httpx.Response) -> list[dict]:
    """What a stream holds, in order; each event's `type` is its name where it has one."""
    assert answer.status_code == 200, answer.text
    found = []
    for frame in answer.text.strip().split("\n\n"):
        name = re.search(r"^event: (.*)$", frame, re.M)
        data = re.search(r"^data: (.*)$", frame, re.M)[1]
        if data != "[DONE]":
            found.append(json.loads(data))
            assert name is None or name[1] == found[-1]["type"]
    return found


def run(command: list[str], home: Path, **variables: str) -> str:
    """What a client that is installed prints."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "TERM") if name in os.environ}
    environment = kept | {"HOME": str(home), "NO_PROXY": "localhost", **variables}
    done = subprocess.run(
        command, cwd=home, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=RUN_S
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def needs(program: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"{program} is not installed")


def codex_body() -> dict:
    def message(role: str, *texts: str) -> dict:
        content = [{"type": "input_text", "text": text} for text in texts]
        return {"type": "message", "id": "msg_1", "role": role, "content": content}

    tools = [{"type": "function", "name": "exec_command", "description": "d", "strict": False, "parameters": OBJECT}]
    tools += [{"type": "namespace", "name": "agents", "description": "d", "tools": []}, {"type": "web_search", "external_web_access": False}]  # fmt: skip
    return {
        "model": "tiny", "stream": True, "tools": tools, "tool_choice": "auto", "parallel_tool_calls": True,
        "input": [message("developer", "Be short."), message("developer", "a", "b"), message("user", "Say hello")],
        "reasoning": {"summary": "auto"}, "store": False, "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "k", "client_metadata": {"session_id": "s"},
    }  # fmt: skip


def test_codex_begins_calls_and_goes_on(tooled, http):
    config = tomllib.loads(block("codex", "toml", tooled.url))
    provider = config["model_providers"][config["model_provider"]]
    assert provider["wire_api"] == "responses"
    url, body = provider["base_url"] + "/responses", codex_body()
    with saying(tooled.llm, 'I look.<tool_call>\n{"name": "exec_command", "arguments": {"cmd": "ls"}}\n</tool_call>'):
        first = events(http.post(url, json=body))
    items = first[-1]["response"]["output"]
    call = items[-1]
    output = {"type": "function_call_output", "call_id": call["call_id"], "output": "a.txt"}
    with saying(tooled.llm, SAID) as prompts:
        second = events(http.post(url, json=body | {"input": [*body["input"], *items, output]}))
    done = second[-1]["response"]

    assert [each["type"] for each in first[:2]] == ["response.created", "response.in_progress"]
    assert first[-1]["type"] == second[-1]["type"] == "response.completed"
    assert (call["type"], call["name"], json.loads(call["arguments"])) == (
        "function_call",
        "exec_command",
        {"cmd": "ls"},
    )
    assert done["output"][-1]["content"][0]["text"] == SAID and "a.txt" in prompts[0]
    assert done["usage"]["input_tokens_details"]["cached_tokens"] > 0, "what the first turn computed is found"


@needs("codex")
def test_codex_itself(tooled, tmp_path):
    (tmp_path / ".codex").mkdir()
    (tmp_path / ".codex" / "config.toml").write_text(block("codex", "toml", tooled.url))
    command = block("codex", "sh", tooled.url).split('"')
    with saying(tooled.llm, SAID):
        assert SAID in run([*command[0].split(), command[1]], tmp_path)


def claude_body() -> dict:
    tool = {"name": "Bash", "description": "d", "input_schema": OBJECT}
    return {
        "model": "tiny", "max_tokens": 32000, "stream": True, "tools": [tool], "thinking": {"type": "adaptive"},
        "system": [{"type": "text", "text": "x-anthropic-billing-header: a=1;"}, {"type": "text", "text": "Be short.", "cache_control": {"type": "ephemeral"}}],
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Say hello", "cache_control": {"type": "ephemeral"}}]}],
        "metadata": {"user_id": "u"}, "context_management": {"edits": []}, "output_config": {"effort": "high"},
    }  # fmt: skip


def test_claude_code_begins_calls_and_counts(tooled, http):
    settings = exported(block("claude_code", "sh", tooled.url))
    url, body = settings["ANTHROPIC_BASE_URL"] + "/v1/messages", claude_body()
    headers = {"authorization": "Bearer " + settings["ANTHROPIC_AUTH_TOKEN"], "anthropic-version": "2023-06-01"}
    with saying(
        tooled.llm, 'I look.<tool_call>\n{"name": "Bash", "arguments": {"cmd": "ls"}}\n</tool_call>'
    ) as prompts:
        told = events(http.post(url + "?beta=true", json=body, headers=headers))
    counted = {name: body[name] for name in ("model", "messages", "system", "tools")}
    count = http.post(url + "/count_tokens?beta=true", json=counted, headers=headers).json()["input_tokens"]
    usage = told[-2]["usage"]

    assert [each["type"] for each in (told[0], told[-2], told[-1])] == [
        "message_start",
        "message_delta",
        "message_stop",
    ]
    assert [each["content_block"]["type"] for each in told if each["type"] == "content_block_start"] == [
        "text",
        "tool_use",
    ]
    assert told[-2]["delta"]["stop_reason"] == "tool_use" and "billing" not in prompts[0]
    assert count == usage["input_tokens"] + usage["cache_read_input_tokens"]


@needs("claude")
def test_claude_code_itself(tooled, tmp_path):
    text = block("claude_code", "sh", tooled.url)
    with saying(tooled.llm, SAID):
        assert SAID in run(["claude", "-p", "Say hello"], tmp_path, IS_SANDBOX="1", **exported(text))


def test_what_editors_read(tooled, http):
    (model,) = yaml.safe_load(block("editors", "yaml", tooled.url))["models"]
    card = http.get(model["apiBase"] + "/models", headers={"api-key": model["apiKey"]}).json()["data"][0]
    (local,) = json.loads(block("editors", "json", tooled.url))["provider"].values()
    address = re.search(r"--openai-api-base (\S+)", block("editors", "sh", tooled.url))[1]
    talk = [{"role": "system", "content": "s"}, {"role": "user", "content": "Say hello"}]
    aider = {"model": "tiny", "messages": talk, "stream": True, "temperature": 0}
    tool = {"type": "function", "function": {"name": "bash", "description": "d", "parameters": OBJECT}}
    opencode = {"model": "tiny", "messages": talk, "stream": True, "max_tokens": 32000, "tools": [tool], "tool_choice": "auto", "stream_options": {"include_usage": True}}  # fmt: skip
    with saying(tooled.llm, SAID):
        plain = events(http.post(address + "/chat/completions", json=aider))
        counted = events(http.post(local["options"]["baseURL"] + "/chat/completions", json=opencode))

    assert card["id"] and card["max_model_len"] == tooled.llm.plan.max_context
    for chunks in (plain, counted):
        said = "".join(each["choices"][0]["delta"].get("content") or "" for each in chunks if each["choices"])
        assert said == SAID
    assert counted[-1]["choices"] == [] and counted[-1]["usage"]["completion_tokens"] > 3


@needs("aider")
def test_aider_itself(tooled, tmp_path):
    command = block("editors", "sh", tooled.url).split()
    command += ["--no-git", "--yes-always", "--no-check-update", "--no-show-model-warnings", "--analytics-disable"]
    with saying(tooled.llm, SAID):
        assert SAID in run([*command, "--message", "Say hello"], tmp_path)


def test_open_webui_lists_models_and_stops(tooled, http):
    settings = exported(block("open_webui", "sh", tooled.url))
    headers = {"authorization": f"Bearer {settings['OPENAI_API_KEY']}"}
    base = settings["OPENAI_API_BASE_URL"]
    for slip in (base, base + "/", tooled.url + "//v1"):
        assert http.get(slip.rstrip("/") + "/models", headers=headers).json()["data"][0]["id"]
    talk = [{"role": "user", "content": "Say hello"}]
    body = {"model": "tiny", "messages": talk, "stream": True, "max_tokens": 20000, "ignore_eos": True}
    with http.stream("POST", base + "/chat/completions", json=body, headers=headers) as answer:
        next(answer.iter_bytes())
    tooled.wait_until(lambda: not tooled.service.driver.live, 60)


def test_the_harness_asks_for_scores_as_its_page_says(tooled, http):
    settings = dict(re.findall(r"(\w+)=([^,\s]+)", block("lm_eval", "sh", tooled.url)))
    ids = http.post(tooled.url + "/tokenize", json={"prompt": "A list is"}).json()["tokens"]
    body = {"model": settings["model"], "prompt": [ids, ids[:3]], "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0, "seed": 1234}  # fmt: skip
    choices = http.post(settings["base_url"], json=body).json()["choices"]

    assert settings["tokenizer_backend"] == "remote" and len(choices) == 2
    assert len(choices[0]["logprobs"]["token_logprobs"]) == len(ids) + 1
    assert choices[0]["logprobs"]["token_logprobs"][0] is None


PYTHON = re.findall(r"^```python\n(.*?)^```$", (PAGES / "python_clients.md").read_text(), re.DOTALL | re.M)


@pytest.mark.parametrize("text", PYTHON, ids=lambda text: re.search(r"from (\w+)", text)[1])
def test_the_python_of_the_page_runs(tooled, text, capsys):
    package = re.search(r"from ([\w.]+)", text)[1]
    pytest.importorskip(package, reason=f"{package} is not installed")
    with saying(tooled.llm, SAID):
        exec(compile(text.replace(ADDRESS, tooled.url), package, "exec"), {})

    assert SAID in capsys.readouterr().out


def test_every_page_is_found_and_short():
    listed = (PAGES.parent / "server.md").read_text()
    for page in PAGES.glob("*.md"):
        assert f"clients/{page.name}" in listed and len(page.read_text().splitlines()) <= 55
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), target
