"""YAML in, plain values and positions out, safe on hostile input.

Built on parse events with an explicit stack, so that nothing recurses: size, depth and node count are bounded, tags,
anchors and aliases are refused, duplicate keys are found, and every path keeps its line and column. Plain scalars
follow YAML 1.2 (`1e6` is a number, `no` and `12:30` are text), because the 1.1 rules surprise people.
"""

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

MAX_BYTES = 256 * 1024
MAX_DEPTH = 32
MAX_NODES = 20_000
_INT = re.compile(r"[-+]?\d+")
_FLOAT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
_WORDS = {
    "true": True,
    "false": False,
    "null": None,
    "~": None,
    "": None,
    ".nan": float("nan"),
    ".inf": float("inf"),
    "-.inf": float("-inf"),
    "+.inf": float("inf"),
}
QUOTE_HINT = 'text that begins with * or [ must be quoted, as in match: "*.qkv"'

Path = tuple[str | int, ...]
Mark = tuple[int, int]


class YamlProblem(ValueError):
    """Text that is not acceptable YAML. mark: (line, column), both from 1; message: what and how to mend it."""

    def __init__(self, mark: Mark, message: str) -> None:
        super().__init__(message)
        self.mark = mark
        self.message = message


@dataclass(slots=True)
class Document:
    """Values of a document; marks: position of every key or item by path; duplicates: (mark, path) of repeated keys."""

    value: Any = None
    marks: dict[Path, Mark] = field(default_factory=dict)
    duplicates: list[tuple[Mark, Path]] = field(default_factory=list)


@dataclass(slots=True)
class _Frame:
    container: dict[str, Any] | list[Any]
    path: Path
    key: str | None = None


def read_document(text: str) -> Document:
    """Parse one YAML document. Raises YamlProblem with a position for anything refused."""
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise YamlProblem((1, 1), f"the text is larger than {MAX_BYTES // 1024} KiB")
    document, stack = Document(), []
    try:
        for count, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
            if count > MAX_NODES:
                raise YamlProblem(_mark(event.start_mark), f"more than {MAX_NODES} nodes")
            _consume(event, document, stack)
    except yaml.YAMLError as error:
        raise _syntax_problem(error, text) from None
    return document


def _consume(event: Any, document: Document, stack: list[_Frame]) -> None:
    mark = _mark(event.start_mark)
    if isinstance(event, yaml.AliasEvent):
        raise YamlProblem(mark, f"aliases are not allowed (*{event.anchor}); {QUOTE_HINT}")
    if getattr(event, "anchor", None):
        raise YamlProblem(mark, f"anchors are not allowed (&{event.anchor}); write the value out")
    if getattr(event, "tag", None):
        raise YamlProblem(mark, f"tags are not allowed ({event.tag}); write a plain value")
    if isinstance(event, yaml.DocumentStartEvent) and document.marks:
        raise YamlProblem(mark, "a second document; one file holds one")
    if isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
        if len(stack) >= MAX_DEPTH:
            raise YamlProblem(mark, f"nested deeper than {MAX_DEPTH} levels")
        container: dict[str, Any] | list[Any] = {} if isinstance(event, yaml.MappingStartEvent) else []
        stack.append(_Frame(container, _place(container, mark, document, stack)))
    elif isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
        stack.pop()
    elif isinstance(event, yaml.ScalarEvent):
        if stack and isinstance(stack[-1].container, dict) and stack[-1].key is None:
            _start_key(event.value, mark, document, stack[-1])
        else:
            _place(_scalar(event), mark, document, stack)


def _start_key(key: str, mark: Mark, document: Document, frame: _Frame) -> None:
    path = (*frame.path, key)
    if path in document.marks:
        document.duplicates.append((mark, path))
    document.marks.setdefault(path, mark)
    frame.key = key


def _place(value: Any, mark: Mark, document: Document, stack: list[_Frame]) -> Path:
    if not stack:
        document.value = value
        document.marks.setdefault((), mark)
        return ()
    frame = stack[-1]
    if isinstance(frame.container, list):
        path = (*frame.path, len(frame.container))
        document.marks[path] = mark
        frame.container.append(value)
        return path
    if frame.key is None:
        raise YamlProblem(mark, "a key must be plain text")
    path = (*frame.path, frame.key)
    frame.container.setdefault(frame.key, value)
    frame.key = None
    return path


def _scalar(event: yaml.ScalarEvent) -> Any:
    text = event.value
    if event.style is not None:
        return text
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if _INT.fullmatch(text) and len(text) < 20:
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) else text


def _mark(mark: Any) -> Mark:
    return mark.line + 1, mark.column + 1


def _syntax_problem(error: yaml.YAMLError, text: str) -> YamlProblem:
    position = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    mark = _mark(position) if position else (1, 1)
    message = getattr(error, "problem", None) or str(error).splitlines()[0]
    lines = text.splitlines()
    line = lines[mark[0] - 1] if mark[0] <= len(lines) else ""
    looks_like_glob = "alias" in str(error) or re.search(r":\s*\[[^\]]*\]\S", line)
    return YamlProblem(mark, f"not valid YAML: {message}" + (f"; {QUOTE_HINT}" if looks_like_glob else ""))
