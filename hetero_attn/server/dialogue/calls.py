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
FENCE = "```"
_BLANKS = re.compile(r"\s*")
_BETWEEN = re.compile(r"[ \t\r\n,;]*")
_NAMED = re.compile(r"\s*([\w.:-]+)\s*(?:\[CALL_ID\]\s*(\w+)\s*)?\[ARGS\](.*)", re.DOTALL)
_DECODER = json.JSONDecoder()


class Written(NamedTuple):
    """A call: its function's name, its arguments as text of a JSON object, the id that the model gave it, if any."""

    name: str
    arguments: str
    id: str | None = None


def read_calls(body: str, schemas: Schemas) -> list[Written] | None:
    """The calls that some text is; None where it is anything else, even in part.

    schemas: of the functions that are offered; they say what is text in forms without types. Takes time in proportion
    to the text: a model may write anything.
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
        position = _BETWEEN.match(text, position).end()
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


def _enclosed(text: str, position: int, opening: str, closing: str) -> tuple[str, int]:
    """What stands between two tags at a position, and where something follows behind them. Raises ValueError."""
    if not text.startswith(opening, position):
        raise ValueError(f"no {opening}")
    begin = position + len(opening)
    end = text.index(closing, begin)
    return text[begin:end], _BLANKS.match(text, end + len(closing)).end()


def _tagged(text: str, schemas: Schemas) -> list[Written]:
    found, position = [], 0
    while position < len(text):
        body, position = _enclosed(text, position, "<function=", "</function>")
        name, inside = _headed(body)
        schema, values, at = schemas.get(name, {}), {}, _BLANKS.match(inside).end()
        while at < len(inside):
            parameter, at = _enclosed(inside, at, "<parameter=", "</parameter>")
            key, value = _headed(parameter)
            values[key] = _typed(value.removeprefix("\n").removesuffix("\n"), key, schema)
        found.append(Written(name, _arguments(values)))
    return found


def _headed(text: str) -> tuple[str, str]:
    """The name that the first tag ends with, and what follows it."""
    name, end, inside = text.partition(">")
    if not end or not name or "\n" in name:
        raise ValueError("a tag without a name")
    return name, inside


def _pairs(text: str, schemas: Schemas) -> Written:
    head = text.partition("<arg_key>")[0]
    name, position, values = head.strip(), len(head), {}
    schema = schemas.get(name, {})
    while position < len(text):
        key, position = _enclosed(text, position, "<arg_key>", "</arg_key>")
        value, position = _enclosed(text, position, "<arg_value>", "</arg_value>")
        values[key.strip()] = _typed(value, key, schema)
    if (name not in schemas and not values) or re.search(r"\s", name):
        raise ValueError("neither a function's name nor pairs of key and value")
    return Written(name, _arguments(values))


def _separated(text: str) -> Written:
    head, _, tail = text.partition(SEPARATOR)
    tail = tail.strip()
    if FENCE in tail and tail.endswith(FENCE):
        head, _, tail = tail.partition(FENCE)
        tail = tail.removesuffix(FENCE).removeprefix("json")
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
