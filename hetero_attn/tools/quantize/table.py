"""What a quantised file keeps of how it was made, and how that is shown."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpu_kernels.formats import GGUF_BY_NAME
from hetero_attn.checkpoints.gguf.checkpoint import GgufCheckpoint
from hetero_attn.checkpoints.gguf.headers import KnownHeaders
from hetero_attn.checkpoints.sources import is_gguf
from hetero_attn.tools.quantize.stacks import stacks

if TYPE_CHECKING:
    from hetero_attn.tools.quantize.choose import Loss

KEY = "hetero_attn.quantize.table"
MAX_TABLE_CHARACTERS = 1 << 22
MOST_PARTS, MOST_KINDS, MOST_COSTS = 64, 5, 3  # of a table for people


def table_text(wanted: str, bits: float, chosen: Mapping[str, str], losses: Mapping[str, "Loss"]) -> str:
    """The table as a file keeps it: JSON, a stack of experts as one."""
    tensors = {
        stack: {"type": chosen[names[0]]} | ({"kl": dict(losses[stack].kl)} if stack in losses else {})
        for stack, names in stacks(chosen).items()
        if chosen[names[0]] != "F32"
    }
    return json.dumps({"wanted": wanted, "bits": round(bits, 4), "tensors": tensors})


def table_lines(table: Any) -> list[str]:
    """A table for people, at most 80 columns wide: how many of each part of a layer have which type, and what the part
    would cost if all of it had one type; [] for what is no table."""
    tensors = table.get("tensors") if isinstance(table, dict) else None
    if not isinstance(tensors, dict) or not all(isinstance(entry, dict) for entry in tensors.values()):
        return []
    parts: dict[str, list[dict[str, Any]]] = {}
    expected = 0.0
    for name, entry in tensors.items():
        parts.setdefault(str(name).removesuffix(".weight").rpartition(".")[2][:24], []).append(entry)
        expected += _losses(entry).get(_kind(entry), 0.0)
    lines = [f"quantised to {str(table.get('wanted'))[:40]}: {str(table.get('bits'))[:8]} bits a weight"]
    if expected:
        lines.append(f"  KL {expected:.4f} expected on the calibration text")
    for part, entries in list(parts.items())[:MOST_PARTS]:
        kinds = Counter(map(_kind, entries)).most_common(MOST_KINDS)
        lines.append(f"  {part:<14}" + ", ".join(f"{count} {kind}" for kind, count in kinds))
        if costs := _costs(entries):
            lines.append(" " * 18 + "KL if all: " + ", ".join(costs))
    return lines


def _kind(entry: dict[str, Any]) -> str:
    return str(entry.get("type"))[:16]


def _losses(entry: dict[str, Any]) -> dict[str, float]:
    found = entry.get("kl")
    return {str(kind): kl for kind, kl in found.items() if isinstance(kl, float)} if isinstance(found, dict) else {}


def _costs(entries: list[dict[str, Any]]) -> list[str]:
    """The loss of a part in the cheapest types that all of it may have."""
    losses = [_losses(entry) for entry in entries]
    common = [kind for kind in losses[0] if kind in GGUF_BY_NAME and all(kind in each for each in losses)]
    common.sort(key=lambda kind: GGUF_BY_NAME[kind].block_bytes / GGUF_BY_NAME[kind].items)
    return [f"{kind} {sum(each[kind] for each in losses):.1e}" for kind in common[:MOST_COSTS]]


def kept_table(path: Path, known: KnownHeaders | None = None) -> list[str]:
    """The lines of the table that a model's file keeps; [] where there is none. known: headers that were read."""
    if not is_gguf(path):
        return []
    with GgufCheckpoint.open(path, known) as source:
        text = source.fields.values.get(KEY)
    if not isinstance(text, str) or len(text) > MAX_TABLE_CHARACTERS:
        return []
    try:
        return table_lines(json.loads(text))
    except (ValueError, RecursionError):
        return []
