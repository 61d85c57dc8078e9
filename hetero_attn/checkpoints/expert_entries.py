"""Experts of a safetensors checkpoint by one set of names, however a file has them.

    mlp.experts.N.{gate,up,down}_proj.weight                  as we call them: Qwen and OLMoE
    block_sparse_moe.gate, .experts.N.{w1,w3,w2}.weight       Mixtral: gate, up, down
    mlp.experts.gate_up_proj [E, 2I, H], .down_proj [E, H, I] all experts in one tensor: gate rows, then up rows of each

A fused tensor is cut by its offsets alone: each expert's rows are contiguous in the file.
"""

import re
from dataclasses import replace

from hetero_attn.checkpoints.safetensors import TensorEntry

_MIXTRAL = re.compile(r"(.+)\.block_sparse_moe\.(?:gate|experts\.(\d+)\.(w[123]))\.weight")
_MIXTRAL_PARTS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_FUSED = re.compile(r"(.+)\.(?:mlp|block_sparse_moe)\.experts\.(gate_up_proj|down_proj)(?:\.weight)?")


def by_our_names(entries: dict[str, TensorEntry]) -> dict[str, TensorEntry]:
    """Entries with those of experts renamed, and fused ones cut; others as they are, in their order."""
    found: dict[str, TensorEntry] = {}
    for name, entry in entries.items():
        fused, mixtral = _FUSED.fullmatch(name), _MIXTRAL.fullmatch(name)
        if (
            fused
            and len(entry.shape) == 3
            and 0 not in entry.shape
            and (fused[2] == "down_proj" or not entry.shape[1] % 2)
        ):
            found |= _cut(fused[1], fused[2], entry)
        elif mixtral:
            layer, expert, part = mixtral.groups()
            ours = f"experts.{expert}.{_MIXTRAL_PARTS[part]}" if expert else "gate"
            found[f"{layer}.mlp.{ours}.weight"] = entry
        else:
            found[name] = entry
    return found


def _cut(layer: str, kind: str, entry: TensorEntry) -> dict[str, TensorEntry]:
    """The entries of every expert of a fused tensor."""
    parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
    experts, rows, width = entry.shape
    shape, size = (rows // len(parts), width), entry.nbytes // (experts * len(parts))
    return {
        f"{layer}.mlp.experts.{index // len(parts)}.{parts[index % len(parts)]}.weight": replace(
            entry, shape=shape, offset=entry.offset + index * size, nbytes=size
        )
        for index in range(experts * len(parts))
    }
