"""What the user wants of a placement: budgets, an objective, and rules that pin shards by name. Never a Python class.

Everything may be left out or `auto`. What is set is a hard constraint: the planner never bends it, it refuses with the
file, line, column, value, rule and nearest valid name. Rules are read in order and the first whose pattern matches a
shard decides it.
"""

import json
import os
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PrivateAttr, ValidationError

from placement.machine.yaml_document import MAX_BYTES, Document, Mark, YamlProblem, read_document
from placement.machine.yaml_document import Path as YamlPath
from placement.plan.units import format_bytes
from placement.policy.fields import (
    InsertsField,
    KvDtypeField,
    PositiveField,
    SizeField,
    SpeculateField,
    StagingSlotsField,
    ThreadsField,
)
from placement.policy.problems import PolicyError, explained, nearest, position, shown
from placement.policy.rules import KvRule, Rule, Strict, TierRule

# What a policy says about the workload itself; the others are about where it goes.
SIZES = ("context", "batch", "kv_tokens", "prefill_chunk", "kv_dtype")
SHIPPED = Path(__file__).parent / "shipped"
VERSION = 1


class Policy(Strict):
    """What the user asks of the planner; every field may be None, which means `auto`. Sizes are in bytes."""

    version: Literal[1] = Field(VERSION, description="The format of this file. Always 1.")
    objective: Literal["latency", "throughput", "prefill"] = Field(
        "latency",
        description="Make fast one sequence's tokens (latency), many sequences' (throughput), or prompts (prefill).",
    )
    gpu_memory: SizeField = Field(
        None, description="Budget of GPU memory, such as 8GiB; all that is free where it is not given."
    )
    pinned_memory: SizeField = Field(
        None, description="Most page-locked host memory, such as 16GiB: streamed weights, older keys and values."
    )
    host_memory: SizeField = Field(None, description="Most host memory in all.")
    context: PositiveField = Field(None, description="Most tokens of one sequence, prompt and answer together.")
    batch: PositiveField = Field(None, description="Sequences that are decoded together.")
    kv_tokens: PositiveField = Field(
        None, description="Tokens that the cache holds for all sequences; context times batch if not given."
    )
    threads: ThreadsField = Field(None, description="Threads of the CPU lane.")
    prefill_chunk: PositiveField = Field(None, description="Rows of a prompt that one step computes.")
    staging_slots: StagingSlotsField = Field(
        None, description="Slots of the ring through which weights stream to the GPU; 0 lets nothing stream."
    )
    inserts: InsertsField = Field(
        None,
        description="Most experts of a layer that are copied into expert slots behind a step; 0 keeps what is there.",
    )
    kv_dtype: KvDtypeField = Field(
        None, description="How keys and values are kept: fp32, bf16, q8 (8.25 bits a number) or q4 (5 bits)."
    )
    elastic: bool = Field(
        False, description="Keep a copy in DRAM of what is in GPU memory, so that a loaded model can be resized."
    )
    rebalance: bool = Field(
        False, description="Let measured times move the boundary between streamed and CPU-computed columns."
    )
    speculate: SpeculateField = Field(
        "off",
        description="Who drafts tokens: ngram (what came before; auto is the same), or a small "
        "model of the same vocabulary or an EAGLE-3 head; a relative path is looked up from the working folder.",
    )
    shape: Literal["auto", "column", "paired"] = Field(
        "auto", description="How o and down are cut: column, or paired beside qkv and gate_up; auto: the faster."
    )
    rules: tuple[Rule, ...] = Field(
        default=(), strict=False, description="Shares for single shards; the first rule that matches a shard decides."
    )

    _source: str = PrivateAttr(default="policy")
    _marks: dict[YamlPath, Mark] = PrivateAttr(default_factory=dict)

    @property
    def sizes(self) -> dict[str, int | str]:
        """The sizes that it asks for, by key; they are the workload's once that has been made."""
        return {name: getattr(self, name) for name in SIZES if getattr(self, name) is not None}

    def without_sizes(self) -> "Policy":
        """The wishes that remain open once a workload has been made in the sizes that were asked for."""
        return self.model_copy(update=dict.fromkeys(SIZES))

    @classmethod
    def parse(cls, text: str, source: str = "policy") -> "Policy":
        """Read policy text. Raises PolicyError with every problem found; `source` names the text in them."""
        try:
            document = read_document(text)
        except YamlProblem as problem:
            line, column = problem.mark
            raise PolicyError([f"{source}:{line}:{column}: {problem.message}"]) from None
        if document.value is None:
            document.value = {}
        if not isinstance(document.value, dict):
            raise PolicyError([f"{source}:1:1: a policy is a mapping of keys, found {type(document.value).__name__}"])
        return cls._from_document(document, source)

    @classmethod
    def _from_document(cls, document: Document, source: str) -> "Policy":
        problems = [(mark, path, "the key is given twice") for mark, path in document.duplicates]
        policy = None
        try:
            policy = cls.model_validate(document.value)
        except ValidationError as error:
            problems += [explained(item, document, _keys_at, VERSION) for item in error.errors(include_url=False)]
        if problems or policy is None:
            raise PolicyError(
                [
                    f"{source}:{line}:{column}: {shown(path)}: {message}"
                    for (line, column), path, message in sorted(problems, key=lambda p: p[0])
                ]
            )
        policy._source, policy._marks = source, document.marks
        return policy

    @classmethod
    def load(cls, path_or_name: str | Path) -> "Policy":
        """Read a policy file, or a shipped policy by name. Raises PolicyError."""
        path = Path(os.path.expanduser(path_or_name))
        if _is_file(path):
            if path.stat().st_size > MAX_BYTES:
                raise PolicyError([f"{path}: the file is larger than {MAX_BYTES // 1024} KiB"])
            try:
                return cls.parse(path.read_text(encoding="utf-8"), str(path))
            except OSError as error:
                raise PolicyError([f"{path}: cannot be read: {error.strerror}"]) from None
            except UnicodeDecodeError as error:
                raise PolicyError([f"{path}: not UTF-8 text (byte {error.start})"]) from None
        if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
            raise PolicyError([f"{path}: no such policy file"])
        return cls.named(str(path_or_name))

    @classmethod
    def named(cls, name: str) -> "Policy":
        """A shipped policy; PolicyError names the nearest."""
        names = shipped_policies()
        if name not in names:
            raise PolicyError(
                [f"unknown policy {name!r}; shipped policies are {', '.join(names)}{nearest(name, names)}"]
            )
        return cls.parse((SHIPPED / f"{name}.yaml").read_text(encoding="utf-8"), f"{name}.yaml")

    def to_yaml(self) -> str:
        """The policy as YAML that parses to an equal one; `auto` values are left out."""
        values = self.model_dump(exclude_none=True)
        rules = values.pop("rules")
        lines = [f"{key}: {_flow(value)}" for key, value in values.items()]
        if rules:
            lines.append("rules:")
        for rule in rules:
            items = [f"{key}: {_flow(value)}" for key, value in rule.items() if value != {}]
            lines += [f"  - {items[0]}", *(f"    {item}" for item in items[1:])]
        return "\n".join(lines) + "\n"

    def where(self, path: YamlPath) -> str:
        """`file:line:col: path` of a value, the nearest enclosing position when the value itself has none."""
        line, column = position(path, self._marks)
        return f"{self._source}:{line}:{column}: {shown(path)}" if self._marks else f"{self._source}: {shown(path)}"

    def diff(self, other: "Policy") -> list[str]:
        """Differences to another policy, one line each: `path: left -> right`."""
        left, right = _flat(self.model_dump()), _flat(other.model_dump())
        return [
            f"{key}: {left.get(key, 'unset')} -> {right.get(key, 'unset')}"
            for key in sorted(left | right)
            if left.get(key) != right.get(key)
        ]


def shipped_policies() -> tuple[str, ...]:
    """Names of the policies that come with the package."""
    return tuple(sorted(path.stem for path in SHIPPED.glob("*.yaml")))


def policy_schema() -> dict[str, Any]:
    """JSON Schema of policy files, for editors."""
    return Policy.model_json_schema()


def _keys_at(path: YamlPath) -> list[str]:
    names = [part for part in path[:-1] if isinstance(part, str)]
    model = Policy if not names else {"kv": KvRule, "rules": Rule}.get(names[-1], TierRule)
    return list(model.model_fields)


def _is_file(path: Path) -> bool:
    """Whether there is such a file; a name that no file can have names none."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _flow(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)}: {_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, str) and not value.replace(".", "").replace(" ", "").replace("-", "").isalnum():
        return json.dumps(value)
    return str(value)


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else None
    if items is None:
        shown = format_bytes(value) if prefix.endswith("_memory") and value is not None else value
        return {} if value is None else {prefix: str(shown)}
    flat: dict[str, str] = {}
    for key, item in items:
        flat |= _flat(item, f"{prefix}[{key}]" if isinstance(key, int) else f"{prefix}.{key}" if prefix else str(key))
    return flat
