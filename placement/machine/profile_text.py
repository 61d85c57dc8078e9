"""A hardware profile as plain values: what JSON, YAML and the catalogue hold, checked field by field."""

import difflib
import json
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

from placement.machine.figures import Figures
from placement.machine.rates import AttentionRate, CopyRate, DtypeRates, RowRate, ThreadRate, number, parse
from placement.machine.yaml_document import YamlProblem, read_document

MOST_ENTRIES = 1000  # of a table
TABLES = {
    "cpu_rows": RowRate,
    "gpu_rows": RowRate,
    "cpu_attention": AttentionRate,
    "copies": CopyRate,
    "thread_sweep": ThreadRate,
}


def plain(value: Any) -> Any:
    """A field as JSON has it: rates keyed by the names of their formats."""
    if isinstance(value, DtypeRates):
        return value.by_format
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    if is_dataclass(value):
        return {entry.name: plain(getattr(value, entry.name)) for entry in fields(value)}
    return value


def parsed(values: dict[str, Any], where: str) -> dict[str, Any]:
    """The fields of `Figures` from plain values; ValueError names unknown, missing and non-numeric ones."""
    known = {f.name: f for f in fields(Figures)}
    _check_keys(values, known, where)
    found = dict(values)
    for name in known:
        if name in found and known[name].type is str and not _is_shown(found[name]):
            raise ValueError(f"{where}: {name} must be text without control characters, got {found[name]!r:.80}")
        if name in found and known[name].type is bool and not isinstance(found[name], bool):
            raise ValueError(f"{where}: {name} must be true or false, got {found[name]!r:.80}")
        if name in found and known[name].type is DtypeRates:
            found[name] = parse(DtypeRates, found[name], f"{where}: {name}")
        elif name in found and known[name].type in (int, float):
            found[name] = number(found[name], known[name].type, f"{where}: {name}")
    for name, kind in TABLES.items():
        rows = _expected(values, name, (), (list, tuple), where)
        found[name] = tuple(parse(kind, entry, f"{where}: {name}[{i}]") for i, entry in enumerate(rows))
    fingerprint = _expected(values, "fingerprint", {}, dict, where)
    found["fingerprint"] = tuple(sorted((str(key), str(value)) for key, value in fingerprint.items()))
    return found


def _is_shown(value: Any) -> bool:
    """Whether it is text that moves no terminal's cursor: a file may come from another machine."""
    return isinstance(value, str) and "".join(value.split()).isprintable()


def values_of_json(text: str, where: str) -> dict[str, Any]:
    """The object that a JSON text holds; ValueError for anything else."""
    try:
        values = json.loads(text)
    except RecursionError:
        raise ValueError(f"{where}: nested too deeply for a profile") from None
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected a JSON object, found {type(values).__name__}")
    return values


def values_of_file(path: Path) -> dict[str, Any]:
    """The mapping that a file in JSON or YAML holds; ValueError for one that is no text or no mapping, and for what a
    policy file may not hold either, such as anchors and keys that are there twice."""
    try:
        document = read_document(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: neither JSON nor YAML: {error}") from None
    except YamlProblem as problem:
        line, column = problem.mark
        raise ValueError(f"{path}:{line}:{column}: neither JSON nor YAML for a profile: {problem.message}") from None
    if not isinstance(document.value, dict):
        raise ValueError(f"{path}: expected a mapping of rates by name, found {type(document.value).__name__}")
    for (line, column), keys in document.duplicates:
        raise ValueError(f"{path}:{line}:{column}: {'.'.join(map(str, keys))}: the key is given twice")
    return document.value


def _expected(values: dict[str, Any], name: str, default: Any, kind: Any, where: str) -> Any:
    value = values.get(name, default)
    if not isinstance(value, kind) or len(value) > MOST_ENTRIES:
        raise ValueError(f"{where}: {name} has an impossible type or size, got {value!r:.80}")
    return value


def _check_keys(values: dict[str, Any], known: dict[str, Any], where: str) -> None:
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise ValueError(f"{where}: unknown field {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    required = [entry.name for entry in known.values() if entry.default is MISSING]
    missing = [key for key in required if key not in values]
    if missing:
        raise ValueError(f"{where}: missing {', '.join(missing)}")
