"""What is wrong with a policy: where it stands in the file, the value found, the rule and the nearest valid name."""

import difflib
from collections.abc import Callable
from typing import Any

from placement.machine.yaml_document import Document, Mark
from placement.machine.yaml_document import Path as YamlPath

# What pydantic says of its own types, in the words of a policy file.
WORDS = {
    "bool_type": "must be true or false",
    "tuple_type": "must be a list",
    "dict_type": "must be a mapping of keys",
    "model_type": "must be a mapping of keys",
    "string_type": "must be text",
    "string_too_short": "must be text of at least one character",
}


class PolicyError(ValueError):
    """A policy that cannot be read or obeyed. problems: one line each, `file:line:col: path: message`."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


def nearest(value: object, names: tuple[str, ...] | list[str]) -> str:
    """The end of a message: the valid name that is most like the value, case aside, nothing where none is."""
    spelt = {name.lower(): name for name in names}
    near = difflib.get_close_matches(str(value).lower(), spelt, n=1, cutoff=0.5)
    return f"; did you mean {spelt[near[0]]!r}?" if near else ""


def position(path: YamlPath, marks: dict[YamlPath, Mark]) -> Mark:
    """Line and column of a value, those of what encloses it where it has none."""
    while path and path not in marks:
        path = path[:-1]
    return marks.get(path, (1, 1))


def shown(path: YamlPath) -> str:
    """The path of a value as messages write it: `rules[0].kv.gpu_heads`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text or "policy"


def explained(
    item: Any, document: Document, keys_at: Callable[[YamlPath], list[str]], version: int
) -> tuple[Mark, YamlPath, str]:
    """Position, path and message of one of pydantic's errors about a document.

    keys_at: the keys that are valid where a path leads. version: the format that is read.
    """
    path: YamlPath = tuple(item["loc"])
    value = _value_at(document.value, path)
    message = WORDS.get(item["type"], item["msg"].removeprefix("Value error, "))
    if item["type"] == "extra_forbidden":
        message = f"unknown key{nearest(path[-1], keys_at(path))}; known keys are {', '.join(keys_at(path))}"
    elif item["type"] == "literal_error":
        allowed = [text.strip("'") for text in item["ctx"]["expected"].replace(" or ", ", ").split(", ")]
        message = f"{_brief(value)} is not one of {', '.join(allowed)}{nearest(value, allowed)}"
        if path == ("version",):
            message = f"version {_brief(value)} is not supported; this program reads version {version}"
    elif item["type"] == "missing":
        message = "the key is missing"
    elif not isinstance(value, dict):
        message = f"{_brief(value)}: {message}"
    return position(path, document.marks), path, message


def _value_at(value: Any, path: YamlPath) -> Any:
    for part in path:
        if isinstance(value, dict):
            value = value.get(part)
        else:
            is_there = isinstance(value, list) and isinstance(part, int) and part < len(value)
            value = value[part] if is_there else None
    return value


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
