"""Schemas with instances, in the manner of MaskBench (guidance-ai/jsonschemabench, maskbench/data): what a schema allows
is taken token by token to its end, what it forbids is not; or the schema is refused when it is compiled.

The first hundreds of MaskBench's own files are tried too where MASKBENCH names a folder with its data.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hetero_attn.errors import SamplingError
from hetero_attn.serving.sampling_params import SamplingParams
from tests.support.server.replayed import each

pytest.importorskip("llguidance", reason="llguidance is not installed (extra grammar)")
MOST_FILES = 200


@dataclass(frozen=True)
class Schema:
    """right, wrong: instances. is_refused: whether the schema is one that nothing can follow."""

    name: str
    schema: Any
    right: tuple[Any, ...] = ()
    wrong: tuple[Any, ...] = ()
    is_refused: bool = False


def record(required: list[str] | None = None, **properties: Any) -> dict:
    return {"type": "object", "properties": properties, "required": list(properties) if required is None else required, "additionalProperties": False}  # fmt: skip


TEXT, NUMBER, WHOLE, TRUTH = ({"type": kind} for kind in ("string", "number", "integer", "boolean"))
TREE = {"$defs": {"node": record(value=WHOLE, next={"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]})}, "$ref": "#/$defs/node"}  # fmt: skip
CASES = [
    Schema("text", TEXT, ("", "a", "é🎉", 'q"\\\n'), (1, None, [])),
    Schema("number", NUMBER, (0, -1.5, 2e10), ("1", True)),
    Schema("integer", WHOLE, (0, -7, 123456), (1.5, "1")),
    Schema("boolean", TRUTH, (True, False), (None, 0)),
    Schema("null", {"type": "null"}, (None,), (0, "")),
    Schema("two types", {"type": ["string", "null"]}, ("a", None), (3,)),
    Schema("anything", True, (1, "a", [None], {"a": 1}), ()),
    Schema("enum", {"enum": ["a", 2, None, {"b": [1]}]}, ("a", 2, None, {"b": [1]}), ("b", 3)),
    Schema("const", {"const": {"a": [1, "x"]}}, ({"a": [1, "x"]},), ({"a": [1]},)),
    Schema("length of a text", {"type": "string", "minLength": 2, "maxLength": 3}, ("ab", "abc", "🎉é"), ("a", "abcd")),
    Schema("pattern", {"type": "string", "pattern": "^[a-z]{2}-[0-9]+$"}, ("ab-1", "zz-99"), ("a-1", "ab-", "xab-1")),
    Schema("bounds", {"type": "integer", "minimum": 3, "maximum": 12}, (3, 7, 12), (2, 13, -5)),
    Schema("open bounds", {"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 6}, (4, 5), (3, 6)),
    Schema("bounds of a number", {"type": "number", "minimum": 0, "maximum": 1}, (0, 0.5, 1), (-0.1, 1.5)),
    Schema("multiples", {"type": "integer", "multipleOf": 5}, (0, 5, 20), (3, 12)),
    Schema("a list", {"type": "array", "items": WHOLE}, ([], [1], [1, 2, 3]), (["a"], 1)),
    Schema("length of a list", {"type": "array", "items": WHOLE, "minItems": 1, "maxItems": 2}, ([1], [1, 2]), ([], [1, 2, 3])),
    Schema("a tuple", {"type": "array", "prefixItems": [WHOLE, TEXT], "items": False, "minItems": 2}, ([1, "a"],), (["a", 1], [1, "a", 2])),
    Schema("lists in lists", {"type": "array", "items": {"type": "array", "items": TRUTH}}, ([], [[]], [[True], [False, True]]), ([1], [[1]])),
    Schema("an object", record(a=TEXT, b=WHOLE), ({"a": "x", "b": 1},), ({"a": "x"}, {"a": "x", "b": 1, "c": 2}, {"a": 1, "b": 1})),
    Schema("what may be left out", record(["a"], a=TEXT, b=WHOLE), ({"a": "x"}, {"a": "x", "b": 1}), ({"b": 1}, {})),
    Schema("an object of others", {"type": "object", "additionalProperties": WHOLE}, ({}, {"x": 1, "y": 2}), ({"x": "a"},)),
    Schema("an object in an object", record(a=record(b=record(c=TRUTH))), ({"a": {"b": {"c": True}}},), ({"a": {"b": {}}},)),
    Schema("an empty object", record(), ({},), ({"a": 1},)),
    Schema("any of", {"anyOf": [TEXT, record(a=WHOLE)]}, ("x", {"a": 1}), (1, {"a": "x"})),
    Schema("one of", {"oneOf": [record(kind={"const": "a"}, x=WHOLE), record(kind={"const": "b"}, y=TEXT)]}, ({"kind": "a", "x": 1}, {"kind": "b", "y": "z"}), ({"kind": "a", "y": "z"},)),
    Schema("all of", {"allOf": [{"type": "integer", "minimum": 2}, {"maximum": 4}]}, (2, 4), (1, 5)),
    Schema("references", TREE, ({"value": 1, "next": None}, {"value": 1, "next": {"value": 2, "next": None}}), ({"value": 1}, {"value": 1, "next": 3})),
    Schema("a date", {"type": "string", "format": "date"}, ("2026-11-27",), ("27.11.2026", "2026-13-01")),
    Schema("a time", {"type": "string", "format": "date-time"}, ("2026-11-27T12:30:00Z",), ("yesterday",)),
    Schema("an address", {"type": "string", "format": "ipv4"}, ("127.0.0.1",), ("999", "1.2.3")),
    Schema("a uuid", {"type": "string", "format": "uuid"}, ("12345678-1234-1234-1234-123456789abc",), ("1234",)),
    Schema("a format that nobody knows", {"type": "string", "format": "colour"}, ("red",), (3,)),
    Schema("words around the types", {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "T", "description": "d", "default": 3, "examples": [1], "type": "integer"}, (1,), ("a",)),
    Schema("keys with other letters", record(**{"é 🎉": WHOLE, 'q"': TEXT}), ({"é 🎉": 1, 'q"': "a"},), ({"e": 1},)),
    Schema("nothing at all", False, is_refused=True),
    Schema("a type that there is not", {"type": "hiccup"}, is_refused=True),
    Schema("a reference to nothing", {"$ref": "#/$defs/none"}, is_refused=True),
    Schema("a pattern that is none", {"type": "string", "pattern": "("}, is_refused=True),
    Schema("bounds that leave nothing", {"type": "integer", "minimum": 5, "maximum": 3}, is_refused=True),
]  # fmt: skip


def takes(tokenizer, mask, instance: Any) -> bool:
    """Whether the mask lets the instance be written, to its end."""
    text = json.dumps(instance, ensure_ascii=False)
    ids = [*tokenizer.encode(text, add_special_tokens=False), *tokenizer.eos_token_ids[:1]]
    return all(mask.allowed(ids[:length])[token_id] for length, token_id in enumerate(ids))


@each(CASES)
def test_mask_bench(tokenizer, grammars, case):
    params = SamplingParams(json_schema=case.schema)
    if case.is_refused:
        with pytest.raises(SamplingError, match="cannot be followed"):
            grammars.mask(params)
        return
    mask = grammars.mask(params)
    assert [each for each in case.right if not takes(tokenizer, mask, each)] == []
    assert [each for each in case.wrong if takes(tokenizer, mask, each)] == []


@pytest.mark.skipif(
    "MASKBENCH" not in os.environ, reason="MASKBENCH names no folder with jsonschemabench's maskbench/data"
)
def test_files_of_mask_bench_itself(tokenizer, grammars):
    """Each schema is followed or refused; of those that are followed no instance is judged wrongly."""
    files = sorted(Path(os.environ["MASKBENCH"]).rglob("*.json"))
    files = files[:: max(1, len(files) // MOST_FILES)][:MOST_FILES]
    followed, wrong = 0, []
    for file in files:
        entry = json.loads(file.read_text())
        try:
            mask = grammars.mask(SamplingParams(json_schema=entry["schema"]))
            judged = [(t["valid"], takes(tokenizer, mask, t["data"])) for t in entry["tests"]]
        except SamplingError:
            continue
        followed += 1
        wrong += [file.name for is_right, is_taken in judged if is_right != is_taken]
    print(f"{followed} of {len(files)} schemas are followed; judged wrongly: {wrong}")
    assert len(files) >= 100 and followed >= 0.8 * len(files)
    assert len(set(wrong)) <= 0.05 * followed
