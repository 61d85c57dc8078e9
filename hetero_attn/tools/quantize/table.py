"""What a quantised file keeps of how it was made, and how that is shown."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hetero_attn.checkpoints.gguf.checkpoint import GgufCheckpoint
from hetero_attn.tools.quantize.choose import Loss

KEY = "hetero_attn.quantize.table"
MAX_TABLE_CHARACTERS = 1 << 22


def table_text(wanted: str, bits: float, chosen: Mapping[str, str], losses: Mapping[str, Loss]) -> str:
    """The table as a file keeps it: JSON."""
    tensors = {
        name: {"type": kind} | ({"kl": dict(losses[name].kl)} if name in losses else {})
        for name, kind in chosen.items()
        if kind != "F32"
    }
    return json.dumps({"wanted": wanted, "bits": round(bits, 4), "tensors": tensors})


def table_lines(table: Any) -> list[str]:
    """A table for people: how many of each part of a layer have which type; [] for what is no table."""
    tensors = table.get("tensors") if isinstance(table, dict) else None
    if not isinstance(tensors, dict) or not all(isinstance(entry, dict) for entry in tensors.values()):
        return []
    counts: dict[str, Counter[str]] = {}
    expected = 0.0
    for name, entry in tensors.items():
        kind, losses = str(entry.get("type"))[:16], entry.get("kl")
        counts.setdefault(str(name).removesuffix(".weight").rpartition(".")[2][:24], Counter())[kind] += 1
        if isinstance(losses, dict) and isinstance(losses.get(kind), float):
            expected += losses[kind]
    lines = [f"quantised to {str(table.get('wanted'))[:40]}: {str(table.get('bits'))[:8]} bits a weight"]
    if expected:
        lines[0] += f", KL {expected:.4f} expected on the calibration text"
    for part, kinds in list(counts.items())[:64]:
        lines.append(f"  {part:<14}" + ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()))
    return lines


def kept_table(path: Path) -> list[str]:
    """The lines of the table that a model's file keeps; [] where there is none."""
    if path.suffix != ".gguf":
        return []
    with GgufCheckpoint.open(path) as source:
        text = source.fields.values.get(KEY)
    if not isinstance(text, str) or len(text) > MAX_TABLE_CHARACTERS:
        return []
    try:
        return table_lines(json.loads(text))
    except (ValueError, RecursionError):
        return []
