"""Answers that a client forces: a call of a tool, or text that follows a schema, as parameters of the sampler."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from hetero_attn.server.bodies import parse_object
from hetero_attn.server.dialogue.calls import SEPARATOR
from hetero_attn.server.dialogue.formats import AnswerFormat
from hetero_attn.server.dialogue.shapes import as_list
from hetero_attn.server.dialogue.tools import Tools
from hetero_attn.server.failures import ApiError
from hetero_attn.serving.sampling_params import GRAMMARS, JSON_OPTIONS, MAX_SCHEMA_DEPTH

MOST_CALLS = 16  # in one answer, so that a model that goes on calling ends
# What vLLM's `structured_outputs` calls the forms of an answer; `choice` becomes a grammar.
STRUCTURED = {"json": "json_schema", "regex": "regex", "grammar": "grammar", "choice": "grammar"}
Mark = Callable[[str], str]
# Of a JSON schema: where it holds schemas by names that are anybody's, and where values that are no schemas.
_BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_VALUES = ("const", "enum", "default", "examples")


def format_wishes(kind: str, schema: Any, field: str) -> dict[str, Any]:
    """Sampling parameters for an answer of a kind: text, json_object or json_schema. Raises ApiError."""
    if kind == "text":
        return {}
    if kind == "json_object":
        return {"json_schema": {"type": "object"}}
    if kind == "json_schema" and isinstance(schema, (Mapping, bool)):
        return {"json_schema": schema}
    found = f"of type {kind!r:.40}" if kind != "json_schema" else "of type json_schema without a schema"
    raise ApiError(400, f"{field} is {found}; it must be text, json_object, or json_schema with a schema", param=field)


def structured_wishes(wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Sampling parameters for `structured_outputs` in vLLM's form: json, regex, choice or grammar. Raises ApiError."""
    # A schema may be false; of what is no schema that means that it is not wanted.
    given = {name: each for name, each in wanted.items() if each is not None and (each is not False or name == "json")}
    names = [f"structured_outputs.{name!s:.40}" for name in given]
    if "choice" in given:
        words = as_list(given.pop("choice"), field := "structured_outputs.choice")
        if not words or not all(isinstance(each, str) for each in words):
            raise ApiError(400, f"{field} is {words!r:.40}; it must be a list of texts, at least one", param=field)
        given["grammar"] = "start: " + " | ".join(json.dumps(each, ensure_ascii=False) for each in words)
    if given.pop("json_object", None):
        given["json"] = {"type": "object"}
    for name in given:
        if name not in STRUCTURED:
            raise ApiError(400, f"structured_outputs.{name!s:.40} is not known; give json, regex, choice or grammar")
    if len(names) > 1:
        raise ApiError(400, f"{' and '.join(names)} are given together; an answer follows one of them", param=names[1])
    return {STRUCTURED[name]: value for name, value in given.items()}


def form_wishes(
    form: AnswerFormat, tools: Tools, wishes: Mapping[str, Any], mark: Mark, prompt_end: str
) -> dict[str, Any]:
    """What an answer to a conversation needs beside what the client asks for. mark: as `call_grammar` takes it."""
    found: dict[str, Any] = {}
    if form.keeps_specials:
        found["skip_special_tokens"] = False  # the parser leaves them out
    forms = [name for name in GRAMMARS if wishes.get(name) is not None]
    is_either = len(forms) == 1 and tools.callable and not form.is_harmony  # there, calls have a channel
    if len(forms) < 2 and (tools.must_call or is_either):
        words = None if tools.must_call else words_of(wishes)
        found |= dict.fromkeys(GRAMMARS)
        found["grammar"] = call_grammar(form, tools, mark, words)
    if (forms or tools.must_call) and not (tools.must_call and form.is_harmony):
        found["grammar_after"] = holds_after(form, prompt_end)
    return found


def holds_after(form: AnswerFormat, prompt_end: str) -> str | None:
    """What an answer writes before that begins to hold: its reasoning is free."""
    if form.is_harmony:
        return "<|channel|>final<|message|>"
    if form.marks is not None and form.marks.thought and form.opens_thought(prompt_end):
        return form.marks.thought[1]
    return None


def call_grammar(form: AnswerFormat, tools: Tools, mark: Mark, words: str | None = None) -> str:
    """A Lark grammar of one call, written as the family writes it. mark: a marker as such a grammar names it.

    words: what the answer may be in place of calls, as `words_of` gives it; then several calls may follow each other
    where the family writes them so.
    """
    calls = "\n | ".join(_call(form, function["name"], function["parameters"], mark) for function in tools.callable)
    start = "BLANK? call"
    if words is not None:
        start += f" (BLANK? call){{0,{MOST_CALLS - 1}}}" if tools.parallel and form.repeats_calls else ""
        start += f"\n | words\nwords: {words}"
    return f"start: {start}\nBLANK: /[ \\n]{{1,4}}/\ncall: {calls}"


def words_of(wishes: Mapping[str, Any]) -> str:
    """The form that an answer is asked for in, as a part of a Lark grammar. Raises ApiError."""
    if (pattern := wishes.get("regex")) is not None:
        return (
            "/"
            + re.sub(r"\\.|/", lambda found: found[0] if len(found[0]) > 1 else r"\/", pattern, flags=re.DOTALL)
            + "/"
        )
    schema = wishes.get("json_schema")
    if schema is None:
        raise ApiError(
            400, "give tools or a grammar of the answer; beside tools it may be a schema or a regex", param="tools"
        )
    if isinstance(schema, str):
        schema = parse_object(schema.encode("utf-8", "replace"), MAX_SCHEMA_DEPTH)
    if isinstance(schema, bool):
        schema = {} if schema else {"not": {}}
    return f"%json {_schema(schema)}"


def _call(form: AnswerFormat, name: str, schema: Mapping[str, Any], mark: Mark) -> str:
    if "properties" in schema:
        schema = {"additionalProperties": False, **schema}  # what is invented is never right
    arguments = f"%json {_schema(schema)}"
    if form.is_harmony:
        to = [mark("<|channel|>"), _text(f"commentary to=functions.{name} "), mark("<|constrain|>"), _text("json")]
        return " ".join([*to, mark("<|message|>"), arguments])
    opening, end = form.marks.call
    if form.name == "llama3":
        return f"%json {_named(name, 'parameters', schema)}"
    if form.name == "deepseek":
        head = _text("function") + " " + mark(SEPARATOR) + " " + _text(f"{name}\n```json\n")
        body = f"{_text(name)} {mark(SEPARATOR)} {arguments}" if not form.is_fenced else f'{head} {arguments} "\\n```"'
        around = form.marks.unseen
        return " ".join([mark(around[0]), mark(opening), body, mark(end), mark(around[1])])
    if form.name == "mistral":
        if form.is_named:
            return f"{mark(opening)} {_text(name)} {mark('[ARGS]')} {arguments}"
        return f'{mark(opening)} "[" %json {_named(name, "arguments", schema)} "]"'
    return f'{mark(opening)} "\\n" %json {_named(name, "arguments", schema)} "\\n" {mark(end)}'


def _named(name: str, field: str, schema: Mapping[str, Any]) -> str:
    properties = {"name": {"const": name}, field: _moved(schema, f"#/properties/{field}")}
    return _schema(
        {"type": "object", "properties": properties, "required": ["name", field], "additionalProperties": False}
    )


def _moved(schema: Any, place: str) -> Any:
    """A schema that stands at a place of another one, where it refers to parts of itself from that one's root."""
    if isinstance(schema, list):
        return [_moved(each, place) for each in schema]
    if not isinstance(schema, Mapping):
        return schema
    found: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _BY_NAME and isinstance(value, Mapping):
            found[key] = {name: _moved(each, place) for name, each in value.items()}
        elif key == "$ref" and isinstance(value, str) and (value == "#" or value.startswith("#/")):
            found[key] = place + value[1:]
        else:
            found[key] = value if key in _VALUES else _moved(value, place)
    return found


def _schema(schema: Mapping[str, Any]) -> str:
    return json.dumps({**schema, "x-guidance": JSON_OPTIONS}, ensure_ascii=False)


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
