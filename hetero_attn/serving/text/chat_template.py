"""A model's chat template, rendered by jinja2 alone: importing transformers for it takes a second of a first answer.

Text comes out as `apply_chat_template` of transformers makes it: the same filters, globals, block tags and names, the
same spellings of a message's reasoning, and messages without the keys whose value is None. Templates see plain JSON
values only and run in a sandbox with bounds.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any

from jinja2 import Template, meta, nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.utils import Namespace

from hetero_attn.serving.text.template_sandbox import BoundedSandbox

REASONING = ("reasoning_content", "thinking", "reasoning")  # by which a message's reasoning goes, the first is read
# Digits, which no filter changes; the space tells whether a template trims what a message ends with.
MARK = "7193508264071935 "


class ChatTemplate:
    """A template by its source; compiled when it is first rendered. Errors are those of jinja2, ValueError for
    messages that cannot be continued, and PromptError for a template without bounds."""

    def __init__(self, source: str) -> None:
        self.source = source

    @cached_property
    def _template(self) -> Template:
        return _environment().from_string(self.source)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """The text of a conversation. variables: what the template knows beside it, the names of tokens included."""
        talk = [_with_reasoning(_plain({k: v for k, v in message.items() if v is not None})) for message in messages]
        last = self._marked(talk) if continue_final_message else ""
        known = {"tools": None, "documents": None} | _plain(variables)
        template = self._template
        template.environment.begin()  # type: ignore[attr-defined]
        text = template.render(messages=talk, add_generation_prompt=add_generation_prompt, **known)
        return _up_to_mark(text, last) if continue_final_message else text

    def _marked(self, talk: list[dict[str, Any]]) -> str:
        """The last message's text, which is marked where it ends."""
        last = talk[-1].get("content")
        if not isinstance(last, str):
            raise ValueError("the last message has no text to go on with")
        talk[-1]["content"] = last + MARK
        return last


def variables_of(source: str) -> set[str]:
    """What a template reads and its caller may give, such as enable_thinking, messages included; raises jinja2's
    errors."""
    environment = _environment()
    return meta.find_undeclared_variables(environment.parse(source)) - environment.globals.keys()


def _up_to_mark(text: str, last: str) -> str:
    if last.strip() not in text or MARK.strip() not in text:
        raise ValueError("the template leaves out a part of the last message, so nothing can go on with it")
    end = text.rindex(MARK.strip())
    return text[:end] if text[end:].startswith(MARK) else text[:end].rstrip()


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its reasoning by the name that templates read, and by that of gpt-oss."""
    found = next((message[name] for name in REASONING if message.get(name) is not None), None)
    return message if found is None else {"thinking": found, **message, "reasoning_content": found}


def _plain(value: Any) -> Any:
    """JSON values of exactly Python's own types; anything else, which may have methods that do more, by its type's
    name."""
    if value is None or type(value) in (bool, str, int, float):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return (tuple if isinstance(value, tuple) else list)(map(_plain, value))
    return f"<{type(value).__name__}>"


class _Generation(Extension):
    """{% generation %}: what a model answered, for training; rendered as it is."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_as_it_is"), [], [], body).set_lineno(line)

    def _as_it_is(self, caller: Any) -> str:
        return caller()


class _NamespaceOfTemplates(Namespace):
    """A namespace without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        given = dict(*args[1:], **kwargs)
        for name in given:
            _check_name(name)
        Namespace.__init__(args[0], given)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        Namespace.__setitem__(self, name, value)


def _check_name(name: Any) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"a namespace has no name that begins with an underscore, found {name!r:.40}")


class _Dict:
    """`dict` without what else the type has."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _environment() -> BoundedSandbox:
    environment = BoundedSandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.add_filter("tojson", _to_json)
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": lambda text: datetime.now().strftime(text),
        "dict": _Dict(),
        "namespace": _NamespaceOfTemplates,
    }
    return environment


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Unlike jinja2's own it escapes no HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)
