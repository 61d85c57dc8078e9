"""Messages of a chat and the variables of its template: taken, or refused by name."""

from pathlib import Path

import pytest

from hetero_attn import LLM
from hetero_attn.errors import PromptError
from hetero_attn.serving.prompts import as_messages
from hetero_attn.serving.text.tokenizer import Tokenizer
from tests.support.models.toy import make_checkpoint
from tests.support.planning.wishes import GREEDY, OPTIONS

CONTENTS = {
    "text": ("hello", "hello"),
    "parts": ([{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}], "hello"),
}


@pytest.mark.parametrize("kind", CONTENTS)
def test_parts_of_text_are_joined(path, kind):
    """A template with a filter put Python's own form of the list into the prompt."""
    content, expected = CONTENTS[kind]
    tokenizer = Tokenizer.open(path)

    ids = tokenizer.encode_chat([{"role": "user", "content": content}])
    assert ids == tokenizer.encode_chat([{"role": "user", "content": expected}])


@pytest.mark.parametrize(
    "message",
    [
        None,
        "hello",
        {},
        {"role": "user"},
        {"role": "user", "content": None},
        {"role": "user", "content": 3},
        {"role": 1, "content": "x"},
        {"role": "user", "content": []},
        {"role": "user", "content": [{"type": "image_url", "image_url": "x"}]},
        {"role": "user", "content": [{"type": "text"}]},
        {"role": "user", "content": ["hello"]},
        {"role": "user", "content": b"x"},
        {"role": "user", "content": "half \ud800"},
        {"role": "user", "content": [{"type": "text", "text": "\udcff"}]},
    ],
    ids=ascii,
)
def test_other_content_is_refused(message):
    with pytest.raises(PromptError, match="message"):
        as_messages([message])


@pytest.mark.parametrize("messages", [None, [], "hello", {"role": "user", "content": "x"}, 3], ids=repr)
def test_messages_are_a_list(llm, messages):
    with pytest.raises(PromptError, match="messages"):
        llm.chat(messages, GREEDY)


def test_a_message_may_carry_tool_calls_in_place_of_text():
    message = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}

    assert as_messages([message]) == [message]


@pytest.fixture
def thinking(tmp_path) -> Path:
    """A model whose template takes a variable."""
    path = make_checkpoint(tmp_path, "llama", layers=1)
    (path / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if enable_thinking is defined %}{{ enable_thinking }}{% endif %}"
    )
    return path


def test_template_variables_reach_the_template(thinking):
    tokenizer, messages = Tokenizer.open(thinking), [{"role": "user", "content": "x"}]
    texts = [
        tokenizer.decode(tokenizer.encode_chat(messages, True, variables))
        for variables in (None, {"enable_thinking": False}, {"tools": [], "enable_thinking": True})
    ]

    assert texts == ["x", "xFalse", "xTrue"]
    with LLM(thinking, progress=False, **OPTIONS) as llm:
        output = llm.chat(messages, GREEDY, template_variables={"enable_thinking": False})
        assert llm.tokenizer.decode(output.prompt_token_ids) == "xFalse"
        pieces = list(llm.stream_chat(messages, GREEDY, template_variables={"enable_thinking": False}))
        assert "".join(piece.text for piece in pieces) == output.text


@pytest.mark.parametrize(
    "variables", [3, [("a", 1)], {1: 2}, {"tokenize": False}, {"add_generation_prompt": 1}], ids=repr
)
def test_template_variables_that_are_none_are_refused(llm, variables):
    with pytest.raises(PromptError, match="template_variables"):
        llm.chat([{"role": "user", "content": "x"}], GREEDY, template_variables=variables)
