"""What clients send wrong, and who may ask: each is refused by its name, and nobody else notices."""

import asyncio
import gzip
import json
import socket
import threading
from types import SimpleNamespace

import pytest

from hetero_attn.server import bodies
from hetero_attn.server.bodies import _received, parse_object
from hetero_attn.server.failures import ApiError
from hetero_attn.server.settings import ServerSettings
from tests.server.test_lifecycle import read_until

HI = [{"role": "user", "content": "Hi"}]
FORM = {"type": "json_object"}
NOPE = {"type": "json_schema", "name": "form", "schema": {"type": "nope"}}
TALK = {"chat/completions": {"messages": HI}, "completions": {"prompt": "Hi"}, "responses": {"input": "Hi"}}


def chat(**more: object) -> bytes:
    return json.dumps({"messages": HI, "max_tokens": 2, **more}).encode()


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("chat/completions", b"", 400, "no JSON"),
        ("chat/completions", b"[1]", 400, "must be an object"),
        ("chat/completions", b'"x"', 400, "must be an object"),
        ("chat/completions", b"{", 400, "no JSON"),
        ("chat/completions", b"\xff\xfe\xff", 400, "UTF-8"),
        ("chat/completions", chat().decode().encode("utf-16"), 400, "UTF-8"),
        ("chat/completions", chat().decode().encode("utf-16-le"), 400, "no JSON"),
        ("chat/completions", b"\xef\xbb\xbf" + chat(), 400, "BOM"),
        ("chat/completions", b'{"messages": [], "messages": []}', 400, "twice"),
        ("chat/completions", b'{"temperature": NaN}', 400, "NaN"),
        ("chat/completions", b'{"a":' * 100 + b"1" + b"}" * 100, 400, "deep"),
        ("chat/completions", b"[" * 100_000, 400, "deep"),
        ("chat/completions", b"{}", 400, "messages"),
        ("chat/completions", chat(messages=[]), 400, "messages"),
        ("chat/completions", chat(messages="Hi"), 400, "messages"),
        ("chat/completions", chat(messages=["Hi"]), 400, "messages.0"),
        ("chat/completions", chat(messages=[{"content": "Hi"}]), 400, "messages.0.role"),
        ("chat/completions", chat(messages=[{"role": "cat", "content": "Hi"}]), 400, "messages.0.role"),
        ("chat/completions", chat(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), 400, "text only"),
        ("chat/completions", chat(messages=[{"role": "user", "content": "\ud800"}]), 400, "Unicode"),
        ("chat/completions", chat(temperature=-1), 400, "temperature"),
        ("chat/completions", chat(temperature="hot"), 400, "temperature"),
        ("chat/completions", chat(top_p=2), 400, "top_p"),
        ("chat/completions", chat(max_tokens=0), 400, "max_tokens"),
        ("chat/completions", chat(n=17), 400, "n is 17"),
        ("chat/completions", chat(n=0), 400, "n is 0"),
        ("completions", b'{"prompt": "a", "n": 0}', 400, "n is 0"),
        ("completions", b'{"prompt": [true]}', 400, "prompt"),
        ("completions", b'{"prompt": [[1, false]]}', 400, "prompt"),
        ("chat/completions", chat(stop=["x"] * 17), 400, "stop"),
        ("chat/completions", chat(logit_bias={"5000": 1}), 400, "logit_bias"),
        ("chat/completions", chat(top_logprobs=2), 400, "logprobs: true"),
        ("chat/completions", chat(logprobs=True, top_logprobs=21), 400, "top_logprobs"),
        ("chat/completions", chat(response_format={"type": "yaml"}), 400, "response_format"),
        ("chat/completions", chat(response_format={"type": "json_schema"}), 400, "without a schema"),
        ("chat/completions", chat(response_format=FORM, ignore_eos=True), 400, "ignore_eos"),
        ("chat/completions", chat(response_format=FORM, structured_outputs={"regex": "a"}), 400, "both given"),
        ("chat/completions", chat(structured_outputs={"regex": "("}), 400, "regex cannot be followed"),
        ("chat/completions", chat(structured_outputs={"grammar": "start: x"}), 400, "unknown name"),
        ("chat/completions", chat(structured_outputs={"yaml": "x"}), 400, "structured_outputs"),
        ("chat/completions", chat(structured_outputs={"json": {"type": "nope"}}), 400, "nope"),
        ("chat/completions", chat(structured_outputs={"json": {"enum": ["x" * 70_000]}}), 400, "65536"),
        ("chat/completions", chat(structured_outputs={"choice": []}), 400, "at least one"),
        ("chat/completions", chat(structured_outputs={"choice": ["a", 5]}), 400, "structured_outputs.choice"),
        ("chat/completions", chat(structured_outputs={"json": False}), 400, "outputs.json cannot be followed"),
        ("chat/completions", chat(structured_outputs={"regex": r"[^\s\S]"}, stream=True), 400, "no text that fits"),
        ("chat/completions", chat(guided_json={"type": "object"}), 400, "use structured_outputs.json"),
        ("completions", b'{"prompt": "a", "guided_choice": ["b"]}', 400, "use structured_outputs.choice"),
        ("chat/completions", b"null", 400, "a JSON null"),
        ("chat/completions", chat(tools=[{}]), 400, "tools.0 is no function"),
        ("chat/completions", chat(messages=[{"role": "user", "content": 5}]), 400, "messages.0.content is 5"),
        ("chat/completions", chat(tool_choice="required"), 400, "tool_choice"),
        ("chat/completions", chat(tool_choice="often"), 400, "tool_choice"),
        ("chat/completions", chat(tools=[{"type": "function"}]), 400, "tools"),
        ("chat/completions", chat(chat_template="{{ 1 }}"), 400, "chat_template"),
        ("chat/completions", chat(chat_template_kwargs={"tokenize": False}), 400, "chat_template_kwargs"),
        ("chat/completions", chat(model=""), 400, "model"),
        (
            "chat/completions",
            chat(messages=[{"role": "user", "content": "a b " * 600}]),
            400,
            "maximum context length is 512",
        ),
        ("completions", b"{}", 400, "prompt"),
        ("completions", b'{"prompt": []}', 400, "empty"),
        ("completions", b'{"prompt": [4096]}', 400, "4096"),
        ("completions", b'{"prompt": "a", "suffix": "b"}', 400, "suffix"),
        ("completions", b'{"prompt": "a", "best_of": 3}', 400, "best_of"),
        ("completions", b'{"prompt": "a", "max_tokens": 0}', 400, "max_tokens"),
        ("embeddings", b'{"input": "a"}', 404, "embeddings"),
        ("nothing", b"{}", 404, "nothing at this address"),
    ],
    ids=lambda value: value[:40].decode("latin-1") if isinstance(value, bytes) else str(value),
)
def test_a_bad_request_is_told_what_is_wrong(http, path, body, status, said):
    answer = http.post(f"/v1/{path}", content=body)
    error = answer.json()["error"]

    assert answer.status_code == status and said in error["message"], answer.text
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("path", "body", "param", "said"),
    [
        ("chat/completions", {"messages": []}, "messages", "at least 1"),
        ("chat/completions", {"messages": [{}], "stop": 5}, "stop", "valid string or Input should be a valid list"),
        ("chat/completions", {"messages": [{}], "stop": ["a", 5]}, "stop", "valid string"),
        ("chat/completions", {"messages": [{}], "logit_bias": {"a": 1}}, "logit_bias.a", "valid integer"),
        ("completions", {"prompt": {"a": 1}}, "prompt", "valid list"),
        ("completions", {"prompt": None}, "prompt", "valid string"),
        ("responses", {"input": 5}, "input", "valid list"),
        ("responses", {}, "input", "Field required"),
    ],
    ids=str,
)
def test_the_field_at_fault_is_named_as_the_client_wrote_it(http, path, body, param, said):
    error = http.post(f"/v1/{path}", json=body).json()["error"]

    assert (error["param"], error["message"].partition(":")[0]) == (param, param) and said in error["message"]


@pytest.mark.parametrize(
    ("path", "more", "param", "said"),
    [
        ("chat/completions", {"temperature": -1}, "temperature", "at least 0"),
        ("chat/completions", {"max_completion_tokens": 0}, "max_completion_tokens", "at least 1"),
        ("chat/completions", {"stop": ["x"] * 17}, "stop", "at most 16"),
        ("chat/completions", {"stop_token_ids": [-1]}, "stop_token_ids", "item must be"),
        ("chat/completions", {"logit_bias": {"5000": 1}}, "logit_bias", "vocabulary"),
        ("chat/completions", {"response_format": FORM, "ignore_eos": True}, "ignore_eos", "where an answer ends"),
        ("chat/completions", {"structured_outputs": {"choice": ["a" * 70_000]}}, "structured_outputs.choice", "65536"),
        (
            "chat/completions",
            {"structured_outputs": {"regex": "a", "choice": ["b"]}},
            "structured_outputs.choice",
            "one of",
        ),
        ("chat/completions", {"structured_outputs": {"regex": "("}}, "structured_outputs.regex", "cannot be followed"),
        ("completions", {"min_tokens": 5, "max_tokens": 3}, "min_tokens", "at most max_tokens"),
        ("completions", {"top_p": 2}, "top_p", "(0, 1]"),
        ("responses", {"max_output_tokens": 0}, "max_output_tokens", "at least 1"),
        ("responses", {"text": {"format": NOPE}}, "text.format", "nope"),
    ],
    ids=str,
)
def test_a_parameter_at_fault_is_named_as_the_client_wrote_it(http, path, more, param, said):
    """`param` was null, and the message spoke of max_tokens and json_schema."""
    answer = http.post(f"/v1/{path}", json=TALK[path] | more)
    error = answer.json()["error"]

    assert (answer.status_code, error["param"]) == (400, param) and said in error["message"]
    assert error["message"].startswith(param) or param == "ignore_eos" or f"and {param} are given" in error["message"]


def test_a_token_that_is_none_is_a_fault_of_the_prompt(http):
    error = http.post("/v1/completions", json={"prompt": [1, 4096]}).json()["error"]

    assert error["param"] == "prompt" and "token 4096 at position 1" in error["message"]


def test_an_encoded_body_is_told_so(http):
    """It was told that it is no UTF-8."""
    headers = {"content-encoding": "gzip"}
    answer = http.post("/v1/completions", content=gzip.compress(b'{"prompt": "a"}'), headers=headers)

    assert answer.status_code == 415 and "content-encoding is 'gzip'" in answer.json()["error"]["message"]


def test_a_large_body_is_read_beside_the_loop(http, monkeypatch):
    """One of 8 MiB kept every stream waiting for up to 1.5 s."""
    read = []

    def noted(data, *more):
        read.append((len(data), threading.current_thread().name))
        return parse_object(data, *more)

    monkeypatch.setattr(bodies, "parse_object", noted)
    small = http.post("/tokenize", json={"prompt": "a"})
    large = http.post("/tokenize", json={"prompt": "a", "numbers": list(range(20_000))})
    twice = http.post("/tokenize", content=b'{"prompt": "a", "prompt": "b", "more": "' + b"c" * 100_000 + b'"}')
    names = [name for _, name in read]

    assert (small.status_code, large.status_code, twice.status_code) == (200, 200, 400)
    assert small.json() == large.json() and "stands twice" in twice.json()["error"]["message"]
    assert [name.startswith("hetero-attn-bodies") for name in names] == [False, True, True], read


def test_an_overlong_prompt_has_the_code_that_agents_know(http):
    answer = http.post(
        "/v1/chat/completions", json={"messages": [{"role": "user", "content": "a b " * 600}], "stream": True}
    )

    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    assert answer.json()["error"]["param"] == "messages"


@pytest.mark.parametrize("kind", ["declared", "chunked"])
def test_a_huge_body_is_not_read(server, kind):
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as sock:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
        if kind == "declared":
            sock.sendall(head + b"Content-Length: 200000000\r\n\r\n")
        else:
            sock.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n")
            for _ in range(8):
                sock.sendall(b"100000\r\n" + b" " * 0x100000 + b"\r\n")
            sock.sendall(b"1\r\n \r\n")
        assert read_until(sock, b"\r\n").startswith(b"HTTP/1.1 413")


def test_of_a_body_without_end_no_more_is_taken_than_may_be_kept():
    """The memory that 200 MB cost is what a body may have, and one piece."""
    settings, taken = ServerSettings(), []

    async def stream():
        while len(taken) < 200_000_000 >> 16:
            taken.append(65_536)
            yield bytes(65_536)

    with pytest.raises(ApiError) as refused:
        asyncio.run(_received(SimpleNamespace(stream=stream), settings))
    assert refused.value.status == 413 and sum(taken) <= settings.body_bytes + 65_536 <= 10 << 20


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "localhost:1"}, 200),
        ({"host": "evil.example"}, 400),
        ({"host": "127.0.0.1.evil.example"}, 400),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"host": "localhost:9", "origin": "http://localhost:9"}, 200),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
        ({"sec-fetch-site": "same-origin"}, 200),
        ({"sec-fetch-site": "none"}, 200),
    ],
    ids=str,
)
def test_strangers_pages_may_not_ask(http, server, headers, status):
    refused = server.service.metrics._refused.labels(str(status))._value
    before = refused.get()

    assert http.get("/v1/models", headers=headers).status_code == status
    assert refused.get() == before + (status != 200), "it is counted as every other answer that is an error"


def test_an_allowed_origin_may_ask_before_it_asks():
    from starlette.testclient import TestClient

    from hetero_attn.server.app import make_app
    from hetero_attn.server.service import Service

    settings = ServerSettings(api_key="k", allowed_origins=("https://a.example",))
    client = TestClient(make_app(Service(lambda: None, settings)), base_url="http://localhost")
    asked = client.options("/v1/models", headers={"origin": "https://a.example"})

    assert asked.status_code == 204 and asked.headers["access-control-allow-origin"] == "https://a.example"
    assert client.get("/v1/models", headers={"origin": "https://a.example"}).status_code == 401
    assert client.get("/health", headers={"origin": "https://a.example"}).status_code == 503
    asked = {"origin": "https://a.example", "sec-fetch-site": "cross-site", "x-api-key": "k"}
    assert client.get("/v1/models", headers=asked).status_code == 503, "loading"


def test_a_text_cut_anywhere_by_the_socket_arrives_whole(http, server):
    """Every offset of the body, one byte at a time: emoji and letters of two bytes come back as they went."""
    text = "déjà 🎉"
    body = json.dumps({"prompt": text, "max_tokens": 0, "echo": True}, ensure_ascii=False).encode()
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.sendall(
            f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        )
        for offset in range(len(body)):
            sock.sendall(body[offset : offset + 1])
        answer = read_until(sock, b"}}")

    assert text in answer.decode()


def test_a_slow_body_is_given_up():
    from tests.support.server.http_server import RunningServer

    with RunningServer(body_s=0.3) as server, socket.create_connection(("127.0.0.1", server.port), timeout=60) as sock:
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        assert read_until(sock, b"\r\n").startswith(b"HTTP/1.1 408")


def test_a_slow_head_is_given_up(monkeypatch):
    from tests.support.server.http_server import RunningServer

    monkeypatch.setattr("hetero_attn.server.connection.HEAD_S", 0.3)
    with RunningServer() as server, socket.create_connection(("127.0.0.1", server.port), timeout=60) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nHos")
        assert sock.recv(100) == b""


def test_a_head_without_end_is_told_so(server):
    """What comes behind the answer is read: else the client would meet a reset, and never see it."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-More: ")
        for _ in range(8):
            sock.sendall(b"a" * 100_000)
        told = b""
        while data := sock.recv(65536):
            told += data
        sock.sendall(b"a" * 100_000)

    assert told.startswith(b"HTTP/1.1 431 ") and told.endswith(b"larger than 65536 bytes; send less in it")


def test_a_reader_that_reads_nothing_stops_nobody(http, server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as sock:
        body = chat(max_tokens=300, ignore_eos=True, stream=True)
        sock.sendall(
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        for _ in range(3):
            assert http.post("/v1/completions", json={"prompt": "A list", "max_tokens": 4}).status_code == 200


def test_an_address_of_ipv6_is_written_in_brackets():
    addresses = [ServerSettings(host=host, port=80).address for host in ("::1", "localhost")]

    assert addresses == [f"http://{host}:80" for host in ("[::1]", "localhost")]
