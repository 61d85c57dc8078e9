"""Experts of a safetensors checkpoint by one set of names, however a file has them.

    mlp.experts.N.{gate,up,down}_proj.weight                  as we call them: Qwen and OLMoE
    block_sparse_moe.gate, .experts.N.{w1,w3,w2}.weight       Mixtral, MiniMax: gate, up, down
    mlp.experts.gate_up_proj [E, 2I, H], .down_proj [E, H, I] all experts in one tensor: gate rows, then up rows of each
    mlp.experts.gate_up_proj [E, H, 2I], .down_proj [E, I, H] gpt-oss: columns are gate, up, gate, up ..; and biases,
                                                              .gate_up_proj_bias [E, 2I], .down_proj_bias [E, H]
    experts.gate_up_proj, experts.N...                        Gemma 4: as those, right under the layer
    .gate_up_proj_blocks [E, 2I, H/32, 16], .._scales [E, ..] its MXFP4: experts.N.gate_up_proj.blocks and .scales

A fused tensor is cut by its offsets alone, where each expert's rows are contiguous in the file.
"""

import re
from dataclasses import replace

from hetero_attn.checkpoints.safetensors import ColumnsEntry, TensorEntry
from hetero_attn.spec.tensor_names import CORRECTION, LAYER_PREFIX

_MIXTRAL = re.compile(r"(.+)\.block_sparse_moe\.(?:gate|experts\.(\d+)\.(w[123]))\.(\w+)")
_CORRECTION = re.compile(rf"(.+)\.(?:block_sparse_moe|mlp)\.{CORRECTION}")
_MIXTRAL_PARTS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_FUSED = re.compile(r"(.+)\.(?:mlp|block_sparse_moe)\.experts\.(gate_up_proj|down_proj)(?:\.weight)?")

_BARE = re.compile(rf"^({re.escape(LAYER_PREFIX)}\d+)\.experts\.")
_TURNED = re.compile(r"(.+)\.mlp\.experts\.(gate_up_proj|down_proj)(_bias)?")
_STACKED = re.compile(r"(.+\.mlp\.experts)\.(gate_up_proj|down_proj)_(blocks|scales)")
_STACKED_DIMENSIONS = {"blocks": 4, "scales": 3}


def by_our_names(entries: dict[str, TensorEntry], is_turned: bool = False) -> dict[str, TensorEntry]:
    """Entries with those of experts renamed, and fused ones cut; others as they are, in their order. is_turned: fused
    ones have outputs as columns."""
    found: dict[str, TensorEntry] = {}
    for name, entry in entries.items():
        name = _BARE.sub(r"\1.mlp.experts.", name)
        fused, mixtral, stacked = _FUSED.fullmatch(name), _MIXTRAL.fullmatch(name), _STACKED.fullmatch(name)
        if is_turned and (turned := _TURNED.fullmatch(name)) and _are_columns(turned[2], bool(turned[3]), entry):
            found |= _columns(turned[1], turned[2], bool(turned[3]), entry)
        elif (
            fused
            and len(entry.shape) == 3
            and 0 not in entry.shape
            and (fused[2] == "down_proj" or not entry.shape[1] % 2)
        ):
            found |= _cut(fused[1], fused[2], entry)
        elif stacked and len(entry.shape) == _STACKED_DIMENSIONS[stacked[3]] and 0 not in entry.shape:
            found |= _stacked(stacked[1], f"{stacked[2]}.{stacked[3]}", entry)
        elif mixtral:
            layer, expert, part, kind = mixtral.groups()
            ours = f"experts.{expert}.{_MIXTRAL_PARTS[part]}" if expert else "gate"
            found[f"{layer}.mlp.{ours}.{kind}"] = entry
        elif correction := _CORRECTION.fullmatch(name):
            found[f"{correction[1]}.mlp.gate.{CORRECTION}"] = entry
        elif name.endswith(".conv1d.weight") and entry.shape[1:2] == (1,) and len(entry.shape) == 3:
            found[name] = replace(entry, shape=(entry.shape[0], entry.shape[2]))  # one kernel a feature
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


def _stacked(experts: str, name: str, entry: TensorEntry) -> dict[str, TensorEntry]:
    """The entries of every expert of a tensor whose first dimension they are."""
    size = entry.nbytes // entry.shape[0]
    return {
        f"{experts}.{index}.{name}": replace(
            entry, shape=entry.shape[1:], offset=entry.offset + index * size, nbytes=size
        )
        for index in range(entry.shape[0])
    }


def _are_columns(kind: str, is_bias: bool, entry: TensorEntry) -> bool:
    """Whether a fused tensor has the dimensions of one, so that it can be cut."""
    is_even = kind == "down_proj" or not entry.shape[-1:] or entry.shape[-1] % 2 == 0
    return len(entry.shape) == (2 if is_bias else 3) and 0 not in entry.shape and is_even


def _columns(layer: str, kind: str, is_bias: bool, entry: TensorEntry) -> dict[str, TensorEntry]:
    """The entries of every expert of a fused tensor whose last dimension is the experts' outputs."""
    parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
    experts, *inputs, columns = entry.shape
    nbytes, shape = entry.nbytes // experts, (columns // len(parts), *inputs)
    return {
        f"{layer}.mlp.experts.{index}.{part}.{'bias' if is_bias else 'weight'}": ColumnsEntry(
            entry.file, entry.dtype, shape, entry.offset + index * nbytes, nbytes, columns, first, len(parts)
        )
        for index in range(experts)
        for first, part in enumerate(parts)
    }
