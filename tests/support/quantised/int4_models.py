"""Whole models as GPTQ, AWQ and compressed-tensors files, written code by code from the published layouts.

Slow on purpose and without anything of the reader: a word is a sum of codes times powers of sixteen.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.support.models.toy import make_checkpoint
from tests.support.quantised.int4_data import Groups, random_groups

SHAPE = {"hidden": 128, "intermediate": 256, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32, "layers": 2}
AWQ_PLACES = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of a word is the output 8c + AWQ_PLACES[i]
Tensors = dict[str, torch.Tensor]


def words(codes: torch.Tensor, places: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """int32 [rows, n] of codes [rows, 8n]: nibble i of word c is the code 8c + places[i]."""
    rows = []
    for row in codes.tolist():
        packed = [sum(row[at + place] << (4 * i) for i, place in enumerate(places)) for at in range(0, len(row), 8)]
        rows.append([word - (1 << 32) if word >= 1 << 31 else word for word in packed])
    return torch.tensor(rows, dtype=torch.int32)


def gptq(groups: Groups, each: int, taken: int = 1) -> Tensors:
    """taken: 1 of the first version of the format, whose zero points are stored one less, 0 of the second."""
    return {
        "qweight": words(groups.codes).t().contiguous(),
        "scales": groups.scales.t().contiguous(),
        "qzeros": words((groups.zeros - taken).t()),
        "g_idx": (torch.arange(groups.codes.shape[1]) // each).int(),
    }


def gptq_of_8_bits(groups: Groups, each: int, taken: int = 1) -> Tensors:
    """As `gptq`, four codes in a word."""

    def packed(codes: torch.Tensor) -> torch.Tensor:
        rows = [
            [sum(row[at + i] << (8 * i) for i in range(4)) for at in range(0, len(row), 4)] for row in codes.tolist()
        ]
        return torch.tensor([[word - (1 << 32) if word >= 1 << 31 else word for word in row] for row in rows]).int()

    return {
        "qweight": packed(groups.codes).t().contiguous(),
        "scales": groups.scales.t().contiguous(),
        "qzeros": packed((groups.zeros - taken).t()),
        "g_idx": (torch.arange(groups.codes.shape[1]) // each).int(),
    }


def awq(groups: Groups, each: int) -> Tensors:
    """The version called gemm."""
    return {
        "qweight": words(groups.codes.t(), AWQ_PLACES),
        "scales": groups.scales.t().contiguous(),
        "qzeros": words(groups.zeros.t(), AWQ_PLACES),
    }


def compressed(groups: Groups, each: int) -> Tensors:
    """pack-quantized, asymmetric; symmetric files leave the zero points out."""
    return {
        "weight_packed": words(groups.codes),
        "weight_scale": groups.scales.bfloat16(),
        "weight_shape": torch.tensor(groups.codes.shape),
        "weight_zero_point": words(groups.zeros.t()).t().contiguous(),
    }


def gptq_config(each: int, sym: bool = False, **more) -> dict:
    return {"quant_method": "gptq", "bits": 4, "group_size": each, "desc_act": False, "sym": sym} | more


def awq_config(each: int, **more) -> dict:
    return {"quant_method": "awq", "bits": 4, "group_size": each, "version": "gemm", "zero_point": True} | more


def compressed_config(each: int, symmetric: bool = False) -> dict:
    weights = {"num_bits": 4, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": each}
    if each == -1:
        weights |= {"strategy": "channel", "group_size": None}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}


def make_int4(
    folder: Path,
    write,
    config: dict,
    each: int,
    *,
    symmetric=False,
    family="llama",
    most_zero=15,
    plain: Path | None = None,
    remade=None,
) -> Path:
    """Write `folder`/int4 and `folder`/plain, the same values in float32; returns `folder`.

    plain: a checkpoint that is there already, in the place of `folder`/plain. remade: (groups, generator) -> groups to
    write instead.

    write: one of the writers above. each: inputs of a group, -1 for a row. Embedding, head and norms stay plain.
    """
    plain = plain or make_checkpoint(folder / "plain", family, **SHAPE)
    tensors, stored = load_file(plain / "model.safetensors"), {}
    for seed, (name, values) in enumerate(sorted(tensors.items())):
        if "_proj" not in name or not name.endswith(".weight") or values.shape[0] % 8:
            stored[name] = values.half() if values.dim() > 1 else values
            tensors[name] = stored[name].float()
            continue
        group = values.shape[1] if each == -1 else each
        groups = random_groups(*values.shape, group, most_zero - 1, seed)
        scales = (groups.scales.bfloat16() if config["quant_method"] == "compressed-tensors" else groups.scales).half()
        zeros = torch.full_like(groups.zeros, 8) if symmetric else groups.zeros + 1
        groups = groups._replace(scales=scales, zeros=zeros)
        if remade is not None:
            groups = remade(groups, torch.Generator().manual_seed(seed))
        tensors[name] = groups.values
        stored |= {f"{name.removesuffix('weight')}{part}": item for part, item in write(groups, group).items()}
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    target = folder / "int4"
    target.mkdir()
    for file in plain.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    save_file(stored, target / "model.safetensors", metadata={"format": "pt"})
    edit_config(target, quantization_config=config)
    return folder


def edit_config(path: Path, **changes) -> None:
    """Change keys of a model's config.json."""
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(path: Path, change) -> None:
    """Let `change` edit the tensors of a model in place."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file({name: item.contiguous() for name, item in tensors.items()}, path / "model.safetensors")
