"""Chat and text completions: what is streamed is what is answered, scores are the model's own."""

import json
import threading

import httpx
import pytest
import torch

from hetero_attn.serving.sampling_params import SamplingParams
from hetero_attn.serving.text.tokenizer import Tokenizer
from tests.server.test_lifecycle import gauges
from tests.support.suite.names import case_name

QUESTION = [{"role": "user", "content": "What is a list?"}]


def post(http: httpx.Client, path: str, **body: object) -> dict:
    answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def chunks(http: httpx.Client, path: str, **body: object) -> list[dict]:
    """The chunks of a stream, whose framing is checked."""
    with http.stream("POST", path, json={**body, "stream": True}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["cache-control"] == "no-store"
        text = answer.read().decode()
    frames = text.split("\n\n")
    assert frames[-2:] == ["data: [DONE]", ""] and "\r" not in text
    assert all(frame.startswith("data: ") and "\n" not in frame for frame in frames[:-1])
    return [json.loads(frame.removeprefix("data: ")) for frame in frames[:-2]]


def joined(found: list[dict], choice: int = 0) -> str:
    deltas = [each for chunk in found for each in chunk["choices"] if each["index"] == choice]
    return "".join(each["delta"].get("content") or "" if "delta" in each else each["text"] for each in deltas)


def test_a_chat_is_answered_as_the_python_api_does(http, server):
    answer = post(http, "/v1/chat/completions", messages=QUESTION, temperature=0, max_tokens=30)
    expected = server.llm.chat(QUESTION, SamplingParams(temperature=0.0, max_tokens=30))

    assert answer["choices"][0]["message"]["content"] == expected.text
    assert answer["choices"][0]["finish_reason"] == expected.finish_reason == "stop"
    assert answer["usage"]["prompt_tokens"] == len(expected.prompt_token_ids)
    assert answer["usage"]["completion_tokens"] == len(expected.token_ids)


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 0.9, "seed": 5, "top_k": 40}], ids=str)
def test_a_stream_joins_to_the_answer(http, sampling):
    body = {"messages": QUESTION, "max_tokens": 24, **sampling}
    found = chunks(http, "/v1/chat/completions", **body)
    whole = post(http, "/v1/chat/completions", **body)["choices"][0]

    assert joined(found) == whole["message"]["content"]
    assert found[-1]["choices"][0]["finish_reason"] == whole["finish_reason"]
    assert [chunk["choices"][0]["delta"].get("role") for chunk in found].count("assistant") == 1
    assert found[0]["choices"][0]["delta"]["role"] == "assistant"
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in found}) == 1


def test_usage_comes_last_and_only_when_asked_for(http):
    body = {"messages": QUESTION, "max_tokens": 4, "temperature": 0}
    plain = chunks(http, "/v1/chat/completions", **body)
    last = chunks(http, "/v1/chat/completions", **body, stream_options={"include_usage": True})[-1]
    always = {"include_usage": True, "continuous_usage_stats": True}
    counts = [chunk["usage"] for chunk in chunks(http, "/v1/chat/completions", **body, stream_options=always)]

    assert all("usage" not in chunk for chunk in plain)
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 4
    assert [each["completion_tokens"] for each in counts] == sorted(each["completion_tokens"] for each in counts)
    assert counts[-1]["completion_tokens"] == 4


def test_several_choices_differ_and_each_is_repeatable(http):
    body = {"messages": QUESTION, "max_tokens": 12, "temperature": 1.0, "seed": 3, "n": 3}
    texts = [
        [choice["message"]["content"] for choice in post(http, "/v1/chat/completions", **body)["choices"]] for _ in "12"
    ]
    streamed = chunks(http, "/v1/chat/completions", **body)

    assert texts[0] == texts[1] == [joined(streamed, choice) for choice in range(3)]
    assert len(set(texts[0])) == 3


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/api/chat"])
def test_a_seed_of_minus_one_leaves_answers_to_chance(http, path):
    """It was taken for 2**63 - 1: every answer was the same."""
    chance = {"temperature": 1.0, "seed": -1}
    body = {"messages": QUESTION, "max_tokens": 24, **chance}
    if path == "/api/chat":
        body = {"messages": QUESTION, "stream": False, "options": {"num_predict": 24, **chance}}
    elif path == "/v1/completions":
        body = {"prompt": "A list is", "max_tokens": 24, **chance}
    answers = [post(http, path, **body) for _ in range(4)]
    texts = {str(each.get("message") or each["choices"]) for each in answers}

    assert len(texts) > 1


def test_scored_prompts_are_counted(http, server):
    """Their tokens were in no counter."""
    before = gauges(server.url)["vllm:prompt_tokens_total"]
    answer = post(http, "/v1/completions", prompt=["A list is", "A set"], echo=True, logprobs=0, max_tokens=0)

    assert gauges(server.url)["vllm:prompt_tokens_total"] - before == answer["usage"]["prompt_tokens"] > 0


def test_logprobs_are_the_models_own(http, server):
    answer = post(
        http, "/v1/chat/completions", messages=QUESTION, temperature=0, max_tokens=30, logprobs=True, top_logprobs=3
    )
    content, text = answer["choices"][0]["logprobs"]["content"], answer["choices"][0]["message"]["content"]
    output = server.llm.chat(QUESTION, SamplingParams(temperature=0.0, max_tokens=30, logprobs=3))

    assert b"".join(bytes(each["bytes"]) for each in content).decode() == text
    for entry, own in zip(content, output.logprobs):
        assert entry["logprob"] == pytest.approx(own.logprob, abs=1e-5)
        assert [each["logprob"] for each in entry["top_logprobs"]] == sorted(
            (each["logprob"] for each in entry["top_logprobs"]), reverse=True
        )
        assert len(entry["top_logprobs"]) == 3


def test_echo_scores_a_prompt_as_evaluations_do(http, server):
    """What lm-eval's client sends and reads: ids, echo, one top token; the greedy flag by equality of floats."""
    prompts = [server.llm.tokenizer.encode(text) for text in ("A list is a sequence", "The file is opened")]
    answer = post(
        http, "/v1/completions", prompt=prompts, echo=True, logprobs=1, max_tokens=1, temperature=0, seed=1234
    )

    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    for ids, choice in zip(prompts, answer["choices"]):
        rows = torch.log_softmax(server.llm.logits(ids).double(), dim=1)
        scores, tops = choice["logprobs"]["token_logprobs"], choice["logprobs"]["top_logprobs"]
        assert scores[0] is tops[0] is None and len(scores) == len(ids) + 1
        assert scores[1:-1] == pytest.approx(
            [float(rows[place, token]) for place, token in enumerate(ids[1:])], abs=1e-5
        )
        greedy = [score == max(top.values()) for score, top in zip(scores[1:-1], tops[1:-1])]
        assert greedy == [int(rows[place].argmax()) == token for place, token in enumerate(ids[1:])]


def test_text_offsets_point_into_the_echoed_text(http):
    for max_tokens in (0, 5):
        choice = post(
            http, "/v1/completions", prompt="A list is", echo=True, logprobs=0, max_tokens=max_tokens, temperature=0
        )["choices"][0]
        marks = list(zip(choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"]))[1:]

        assert all(choice["text"][offset:].startswith(token) for token, offset in marks)
        assert choice["text"].startswith("A list is")


def test_a_character_of_several_tokens_is_one_of_the_text(http):
    """Each of its tokens counted as what it reads alone: offsets behind it lay beyond the text's end."""
    said = "a déjà 🎉 vu"
    choice = post(http, "/v1/completions", prompt=said, echo=True, logprobs=0, max_tokens=0)["choices"][0]
    marks = list(zip(choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"]))[1:]

    assert choice["text"] == said and any("\ufffd" in token for token, _ in marks)
    assert all(said[offset:].startswith(token) for token, offset in marks if "\ufffd" not in token)


def test_a_streamed_completion_is_the_whole_one(http):
    body = {"prompt": ["A list is", "A set is"], "max_tokens": 8, "temperature": 0, "echo": True, "logprobs": 1}
    found, whole = chunks(http, "/v1/completions", **body), post(http, "/v1/completions", **body)

    for number, choice in enumerate(whole["choices"]):
        parts = [each for chunk in found for each in chunk["choices"] if each["index"] == number]
        assert "".join(each["text"] for each in parts) == choice["text"]
        assert (
            sum((each["logprobs"]["tokens"] for each in parts if each["logprobs"]), []) == choice["logprobs"]["tokens"]
        )


@pytest.mark.parametrize(
    ("given", "holds"),
    [
        ({"stop": ["list", "x"]}, lambda text: "x" not in text),
        ({"stop": "statement"}, lambda text: "statement" not in text),
        ({"logit_bias": {"484": -100}}, lambda text: not text.startswith("The")),
        ({"max_completion_tokens": 1, "max_tokens": 9}, lambda text: text == "The"),
        ({"min_tokens": 20, "max_tokens": 20}, lambda text: len(text) > 20),
        ({"top_k": 1, "temperature": 2.0}, lambda text: text.startswith("The")),
        ({"repetition_penalty": 1.5, "presence_penalty": 0.5, "frequency_penalty": 0.5, "min_p": 0.1}, bool),
        ({"tool_choice": None, "user": "x", "some_new_field": {"a": 1}, "model": "anything"}, bool),
    ],
    ids=case_name,
)
def test_sampling_parameters_reach_the_sampler(http, given, holds):
    body = {"messages": QUESTION, "temperature": 0, "max_tokens": 24} | given

    assert holds(post(http, "/v1/chat/completions", **body)["choices"][0]["message"]["content"])


def test_messages_are_made_plain_for_the_template(http):
    odd = [
        {"role": "developer", "content": "Be short."},
        {"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "a list?"}]},
        {"role": "assistant", "content": None, "reasoning": "hm"},
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Go on", "name": "me"},
    ]
    plain = [
        {"role": "system", "content": "Be short.\n\nBe kind."},
        {"role": "user", "content": "What is a list?"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "Go on"},
    ]

    assert post(http, "/tokenize", messages=odd)["tokens"] == post(http, "/tokenize", messages=plain)["tokens"]


def test_an_open_message_is_gone_on_with(http, server):
    messages = [*QUESTION, {"role": "assistant", "content": 'The "x" statement'}]
    body = {"messages": messages, "continue_final_message": True, "temperature": 0, "max_tokens": 30}

    assert post(http, "/v1/chat/completions", **body)["choices"][0]["message"]["content"].startswith(" is used")


def test_tokens_and_text_go_both_ways(http, server):
    text = "A list of déjà vu 🎉"
    found = post(http, "/tokenize", prompt=text)

    assert found["tokens"] == server.llm.tokenizer.encode(text) and found["max_model_len"] == 512
    assert post(http, "/detokenize", tokens=found["tokens"][1:])["prompt"] == text
    assert post(http, "/tokenize", prompt=text, add_special_tokens=False)["tokens"] == found["tokens"][1:]
    assert http.get("/tokenizer_info").json()["eos_token"] == "<|end|>"


def test_tokens_are_named_beside_the_loop(http, monkeypatch):
    """Those of some megabytes took seconds, in which no stream got a token."""
    threads, token_bytes = set(), Tokenizer.token_bytes

    def watched(self, token_id):
        threads.add(threading.current_thread().name)
        return token_bytes(self, token_id)

    monkeypatch.setattr(Tokenizer, "token_bytes", watched)
    found = post(http, "/tokenize", prompt="A list", return_token_strs=True)

    assert "".join(found["token_strs"][1:]) == "A list"
    assert all(name.startswith("hetero-attn-text") for name in threads), threads


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/", "/v1//models"])
def test_the_model_is_listed_at_any_spelling_of_the_address(http, path):
    (card,) = http.get(path).json()["data"]

    assert (card["id"], card["max_model_len"], card["object"]) == ("tiny", 512, "model")
    assert http.get("/v1/models/tiny").json() == card
    assert http.get("/v1/models/other").status_code == 404


def test_openai_python_reads_everything(server):
    openai = pytest.importorskip("openai", reason="the openai package is not installed")
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
    body = {"model": "tiny", "messages": QUESTION, "temperature": 0, "max_tokens": 40}
    whole = client.chat.completions.create(**body).choices[0].message.content
    with client.chat.completions.stream(**body, stream_options={"include_usage": True}) as stream:
        stream.until_done()
        final = stream.get_final_completion()
    text = client.completions.create(model="tiny", prompt="A list is", max_tokens=4, temperature=0, logprobs=2)

    assert final.choices[0].message.content == whole and final.usage.completion_tokens == 18
    assert len(text.choices[0].logprobs.tokens) == 4
    assert [model.id for model in client.models.list()] == ["tiny"]
    with pytest.raises(openai.BadRequestError, match="maximum context length is 512"):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "a b c " * 400}])
