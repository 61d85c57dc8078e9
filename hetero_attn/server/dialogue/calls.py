"""What a model wrote as a call of a function, in any of the forms that models are trained to write; never raises.

{"name": "f", "arguments": {...}}             Hermes, Qwen; "parameters" in Llama 3; a list of them in Mistral
<function=f><parameter=x>1</parameter>...     Qwen3-Coder
f<arg_key>x</arg_key><arg_value>1</arg_value> GLM 4.5
f[ARGS]{...}                                  Mistral since 2025
function<sep>f ```json {...} ```, f<sep>{...} DeepSeek V3 and V3.1
"""

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

SEPARATOR = "<｜tool▁sep｜>"
Schemas = Mapping[str, Mapping[str, Any]]
_FUNCTION = re.compile(r"<function=([^>\n]+)>(.*?)</function>", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
_PAIR = re.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)
_NAMED = re.compile(r"\s*([\w.:-]+)\s*(?:\[CALL_ID\]\s*(\w+)\s*)?\[ARGS\](.*)", re.DOTALL)
_DECODER = json.JSONDecoder()


class Written(NamedTuple):
    """A call: its function's name, its arguments as text of a JSON object, the id that the model gave it, if any."""

    name: str
    arguments: str
    id: str | None = None


def read_calls(body: str, schemas: Schemas) -> list[Written] | None:
    """The calls that some text is; None where it is anything else, even in part.

    schemas: of the functions that are offered; they say what is text in forms without types.
    """
    text = body.strip()
    try:
        if text.startswith("{"):
            found = _objects(text)
        elif text.startswith("["):
            found = [_object(each) for each in json.loads(text, parse_constant=_refuse)]
        elif text.startswith("<function="):
            found = _tagged(text, schemas)
        elif SEPARATOR in text:
            found = [_separated(text)]
        elif named := _NAMED.fullmatch(text):
            found = [Written(named[1], _arguments(json.loads(named[3], parse_constant=_refuse)), named[2])]
        else:
            found = [_pairs(text, schemas)]
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
        return None
    return found or None


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def _objects(text: str) -> list[Written]:
    """Objects one after another, with nothing, a comma or a semicolon between."""
    found, position = [], 0
    while position < len(text):
        value, position = _DECODER.raw_decode(text, position)
        found.append(_object(value))
        position = len(text) - len(text[position:].lstrip(" \t\r\n,;"))
    return found


def _object(value: Any) -> Written:
    inner = value.get("function")
    if isinstance(inner, dict):
        value = {**value, **inner}
    name = value["name"] if "name" in value else inner
    if not isinstance(name, str) or not name:
        raise ValueError("a call without a name")
    arguments = value.get("arguments", value.get("parameters", {}))
    given = value.get("id")
    return Written(name, _arguments(arguments), given if isinstance(given, str) else None)


def _arguments(value: Any) -> str:
    if isinstance(value, str):
        value = json.loads(value or "{}", parse_constant=_refuse)
    if value is not None and not isinstance(value, dict):
        raise ValueError("arguments that are no object")
    return json.dumps(value or {}, ensure_ascii=False, allow_nan=False)


def _tagged(text: str, schemas: Schemas) -> list[Written]:
    if _FUNCTION.sub("", text).strip():
        raise ValueError("text beside the functions")
    found = []
    for name, inside in _FUNCTION.findall(text):
        if _PARAMETER.sub("", inside).strip():
            raise ValueError("text beside the parameters")
        values = {key: _typed(value, key, schemas.get(name, {})) for key, value in _PARAMETER.findall(inside)}
        found.append(Written(name, _arguments(values)))
    return found


def _pairs(text: str, schemas: Schemas) -> Written:
    name, pairs = text.partition("<arg_key>")[0].strip(), _PAIR.findall(text)
    if _PAIR.sub("", text).strip() != name or (name not in schemas and not pairs) or re.search(r"\s", name):
        raise ValueError("neither a function's name nor pairs of key and value")
    return Written(name, _arguments({key.strip(): _typed(value, key, schemas.get(name, {})) for key, value in pairs}))


def _separated(text: str) -> Written:
    head, _, tail = text.partition(SEPARATOR)
    if fenced := re.fullmatch(r"\s*(\S+)\s*```(?:json)?\s*(.*?)\s*```\s*", tail, re.DOTALL):
        return Written(fenced[1], _arguments(json.loads(fenced[2], parse_constant=_refuse)))
    name = head.strip()
    if not name or re.search(r"\s", name):
        raise ValueError("no function's name")
    return Written(name, _arguments(json.loads(tail, parse_constant=_refuse)))


def _typed(text: str, key: str, schema: Mapping[str, Any]) -> Any:
    """A value that was written without its type: text where the schema says so, or does not say what it is."""
    declared = (schema.get("properties") or {}).get(key) or {}
    kind = declared.get("type") if isinstance(declared, Mapping) else None
    if kind == "string" or (kind is None and "anyOf" not in declared):
        return text
    try:
        return json.loads(text, parse_constant=_refuse)
    except ValueError:
        return text
