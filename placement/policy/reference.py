"""The page about policy files, made from the schema, so that it describes every key and no other."""

import json
from typing import Any

from placement.plan.workload import ROW_TIER_NAMES
from placement.policy.policy import policy_schema

HEAD = f"""# Policy files

<!-- Made by `hetero-attn policy reference`; the descriptions are in placement/policy/policy.py. -->

A policy says what a plan must keep to; everything that it leaves out is `auto`, chosen by the planner. It is YAML, checked by
`hetero-attn policy lint FILE`, which names line and column of every problem. `hetero-attn plan MODEL --yaml FILE` writes the plan
that was made as a policy, and `hetero-attn policy schema` a JSON Schema for editors.

```yaml
version: 1
objective: latency
gpu_memory: 8GiB
context: 8192
batch: 1
kv_dtype: q8
rules:
  - match: layers.0-3.*
    gpu: 1.0
    stream: 0.0
    cpu: 0.0
  - match: "*.down"
    dtype: q8
```

The first rule that matches a shard and sets shares decides where it goes, the first that sets `dtype` how its weights are kept.

Shards are named `head` and `layers.N.qkv`, `.o`, `.gate_up` (`.up` where the MLP has no gate), `.down`, `.experts` and `.kv`. Sizes are numbers of bytes or text such as `8GiB`.
Row tiers, the numbers of rows that a step may have, are {", ".join(f"`{name}`" for name in ROW_TIER_NAMES)}.
"""
TITLES = {"Rule": "A rule", "KvRule": "`kv` of a rule", "TierRule": "An entry of `tiers`"}


def policy_page() -> str:
    """The page as Markdown."""
    schema = policy_schema()
    parts = [HEAD, "## Keys\n", _table(schema)]
    for name, title in TITLES.items():
        parts += [f"## {title}\n", _table(schema["$defs"][name])]
    return "\n".join(parts)


def _table(schema: dict[str, Any]) -> str:
    rows = ["| key | values | default | what it says |", "|---|---|---|---|"]
    for key, field in schema["properties"].items():
        default = f"`{json.dumps(field['default']).strip(chr(34))}`" if field.get("default") is not None else "auto"
        default = "required" if key in schema.get("required", ()) else default
        rows.append(f"| `{key}` | {_values(field)} | {default} | {field['description']} |")
    return "\n".join(rows) + "\n"


def _values(field: dict[str, Any]) -> str:
    """What a key may hold, in words."""
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(_values(option) for option in field["anyOf"] if option.get("type") != "null"))
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    if "$ref" in field:
        return TITLES[field["$ref"].rpartition("/")[2]]
    kind = {"integer": "integer", "number": "number", "string": "text", "boolean": "`true` or `false`"}
    return {"array": "list", "object": "mapping"}.get(field.get("type"), kind.get(field.get("type"), "any"))
