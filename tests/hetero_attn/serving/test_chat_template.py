"""Chat templates: the text that transformers makes, without it; and bounds for what a stranger's template builds."""

import random
import time
import tracemalloc

import pytest

from hetero_attn.checkpoints.template_time import bounded_template
from hetero_attn.errors import PromptError
from hetero_attn.serving.text.chat_template import ChatTemplate, variables_of
from hetero_attn.serving.text.template_sandbox import MOST_CHARACTERS, size_of

TOOLS = [{"type": "function", "function": {"name": "now", "parameters": {"type": "object", "x": ["<é>", 1.5, None]}}}]
TEMPLATES = {
    "chatml": (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou"
        " are.<|im_end|>\\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' +"
        " '\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "alternating": (
        "{{ bos_token }}{% for m in messages %}\n    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}\n"
        "  {{ raise_exception('roles must alternate') }}\n{% endif %}\n"
        "    {{- '[INST] ' ~ m.content|trim ~ ' [/INST]' if m.role == 'user' else ' ' ~ m.content ~ eos_token }}{% endfor %}"
    ),
    "tools and a namespace": (
        "{%- set ns = namespace(last=-1, text='') -%}{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last ="
        " loop.index0 -%}{%- endif -%}{%- endfor -%}\n{%- if tools %}{{ '# Tools\\n' }}{%- for tool in tools %}"
        "{{ tool | tojson }}\n{{ tool.function | tojson(indent=2) }}{%- endfor %}{%- endif %}\n"
        "{%- for m in messages[::-1]|reverse|list %}{%- if m.tool_calls is defined %}{% for c in m.tool_calls %}"
        "{{ c.function.arguments | tojson(sort_keys=true) }}{% endfor %}{%- endif %}"
        "<{{ m['role'] | upper }}>{{ (m.content or '').split('</think>')[-1].lstrip('\\n') }}"
        "{%- if loop.index0 > ns.last and m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
        "{%- endfor %}{{ documents is none }}{{ enable_thinking | default('unset') }}"
    ),
    "thinking": "{% for m in messages %}{{ m.thinking }}|{{ m.get('reasoning_content', '-') }};{% endfor %}",
    "macros, generation, break": (
        "{% macro turn(m) %}[{{ m.role }}: {{ m.content | replace('a', 'bb') | indent(4) }}]{% endmacro %}\n"
        "{% for m in messages %}\n  {% if loop.index > 3 %}{% break %}{% endif %}\n"
        "  {% generation %}{{ turn(m) }}{% endgeneration %}\n{% endfor %}\n"
        "{% set text %}{{ messages | map(attribute='role') | join(', ') }}{% endset %}{{ text ~ 1 ~ none }}"
        "{{ '%s and %05.1f' % (text, 2.25) }}{{ '{:>8}'.format(text[:4]) }}{{ dict(a=1, **{'b': [2]}) }}{{ 'x' * 3 }}"
        "{{ ['b', 'a'] | sort | first }}{{ 2 ** 10 }}{{ ([1] + [2]) | length }}{{ 'ab'.center(9) }}{{ ','.join(['q', 'r']) }}"
    ),
}


def test_what_a_caller_may_give_is_what_a_template_reads_as_a_variable():
    """Any part of its text passed for one: `/set n 3` was taken, for a line end is written with an n."""
    read = variables_of(TEMPLATES["tools and a namespace"])

    assert read == {"messages", "tools", "documents", "enable_thinking"}


def drawn_talk(rng: random.Random) -> list[dict]:
    talk = []
    for turn in range(rng.randint(1, 5)):
        message = {
            "role": ("user", "assistant")[turn % 2],
            "content": rng.choice(["hi", " a  b\n", "<é> 日本\n\n", "{{ x }}"]),
        }
        if turn % 2 and rng.random() < 0.5:
            message[rng.choice(["reasoning", "thinking", "reasoning_content"])] = rng.choice(["hm", None])
            message["tool_calls"] = [{"type": "function", "function": {"name": "now", "arguments": {"b": 1, "a": "é"}}}]
        talk.append(message)
    return talk


def theirs(source: str, talk: list[dict], **options) -> str:
    """The text by transformers, which drops keys whose value is None before it renders."""
    from transformers.utils.chat_template_utils import render_jinja_template

    talk = [{key: value for key, value in message.items() if value is not None} for message in talk]
    return render_jinja_template(conversations=[talk], chat_template=source, **options)[0][0]


@pytest.mark.parametrize("source", TEMPLATES.values(), ids=TEMPLATES)
def test_the_text_is_that_of_transformers(source: str) -> None:
    template, rng = ChatTemplate(source), random.Random(5)
    for _ in range(12):
        talk, tools = drawn_talk(rng), rng.choice([None, TOOLS])
        options = {"bos_token": "<s>", "eos_token": "</s>", "tools": tools, "add_generation_prompt": rng.random() < 0.5}
        if rng.random() < 0.3:
            options |= {"enable_thinking": False}

        assert template.render(talk, **options) == theirs(source, talk, **options)


@pytest.mark.parametrize("name", ["chatml", "alternating", "macros, generation, break"])
@pytest.mark.parametrize("content", ["go", "go on ", "  "])
def test_a_last_message_stays_open_as_in_transformers(name: str, content: str) -> None:
    source = TEMPLATES[name]
    talk = [{"role": "user", "content": "x"}, {"role": "assistant", "content": content}]
    options = {"bos_token": "<s>", "eos_token": "</s>", "continue_final_message": True}

    try:
        expected = theirs(source, talk, **options)
    except ValueError:
        with pytest.raises(ValueError, match="last message"):
            ChatTemplate(source).render(talk, **options)
    else:
        assert ChatTemplate(source).render(talk, **options) == expected


BOMBS = {
    "a product": "{{ 'a' * 10000000000 }}",
    "a product of lists": "{{ ([0] * 10000000000) | length }}",
    "doubling by ~": "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(40) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "doubling by +": "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(40) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "doubling a list": "{% set ns = namespace(x=[1]) %}{% for i in range(40) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "a filter's width": "{{ 'a' | center(10000000000) }}",
    "a method's width": "{{ 'a'.ljust(10000000000) }}",
    "a width in a format": "{{ '%10000000000d' % 1 }}",
    "a width by an argument": "{{ '%*d' % (1000000000, 1) }}",
    "a width in braces": "{{ '{:>10000000000}'.format(1) }}",
    "a nested width": "{{ '{:>{}}'.format(1, 10000000000) }}",
    "replacements": "{% set x = 'a' * 100000 %}{{ x | replace('a', x) }}",
    "replacements by a method": "{% set x = 'a' * 100000 %}{{ x.replace('a', x) }}",
    "a join": "{% set x = 'a' * 100000 %}{{ range(99999) | join(x) }}",
    "a method's join": "{% set x = 'a' * 100000 %}{{ x.join(x) }}",
    "a list of one text": "{% set x = 'a' * 1000000 %}{{ [x] * 10000 }}",
    "a list as JSON": "{% set x = 'a' * 1000000 %}{{ ([x] * 10000) | tojson | length }}",
    "an indent": "{{ '\\n' * 100000 | int | indent(99999999) }}{{ ('\\n' * 100000) | indent(100000) }}",
    "rows that are filled": "{{ [1] | batch(10000000000, 0) | list | length }}",
    "the output": "{% set x = 'a' * 1000000 %}{% for i in range(99999) %}{{ x }}{% endfor %}",
    "a macro": "{% set x = 'a' * 1000000 %}{% macro m() %}{% for i in range(99999) %}{{ x }}{% endfor %}{% endmacro %}{{ m() | length }}",
    "texts in a list": (
        "{% set ns = namespace(l=[]) %}{% for i in range(99999) %}{% set ns.l = ns.l + ['a' * 10000000] %}{% endfor %}"
    ),
    "slices": "{% set x = 'a' * 10000000 %}{% set ns = namespace(l=[]) %}{% for i in range(9999) %}{% set ns.l = ns.l + [x[1:]] %}{% endfor %}",
    "copies by methods": "{% set x = 'a' * 10000000 %}{% set ns = namespace(l=[]) %}{% for i in range(9999) %}{% set ns.l = ns.l + [x.upper()] %}{% endfor %}",
    "a power": "{{ 10 ** 100000000 }}",
    "bytes of a number": "{{ (1).to_bytes(10000000000, 'big') }}",
    "tabs": "{{ '\\t'.expandtabs(10000000000) }}",
}


@pytest.mark.parametrize("source", BOMBS.values(), ids=BOMBS)
def test_a_template_that_builds_without_bound_is_refused(source: str) -> None:
    """Time was bounded, memory was not: ten gigabytes were one operation away."""
    tracemalloc.start()
    started = time.thread_time()
    try:
        with pytest.raises(PromptError, match="builds more than|has run for"), bounded_template():
            ChatTemplate(source).render([{"role": "user", "content": "x"}])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert peak < 4 * MOST_CHARACTERS
    assert time.thread_time() - started < 30


def test_a_long_conversation_is_within_the_bounds() -> None:
    talk = [{"role": ("user", "assistant")[i % 2], "content": "word " * 2000} for i in range(101)]

    assert len(ChatTemplate(TEMPLATES["chatml"]).render(talk)) > 1_000_000


def test_sizes_count_everything_inside_and_stop() -> None:
    text = "a" * 1000

    assert size_of([text, {"k": text}], 10**9) == 2001 + 8 * 3
    assert size_of([text] * 100_000, 5000) < 10_000_000


def test_templates_see_plain_values_only() -> None:
    class Odd:
        secret = "s"

    rendered = ChatTemplate("{{ x }} {{ x.secret }}").render([{"role": "user", "content": "y"}], x=Odd())

    assert rendered == "<Odd> "
