"""Rows of every GGUF type: random bytes with finite scales, and what gguf's own dequantiser makes of them."""

import numpy as np
import torch
from gguf import GGMLQuantizationType, quants

from cpu_kernels.formats import GGUF_TYPES, GgufType, format_of

CODED = [item for item in GGUF_TYPES.values() if item.format and item.items > 1]
HALVES = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "MXFP4": ()}


def random_rows(kind: GgufType, rows: int, in_features: int, seed: int = 0) -> torch.Tensor:
    """uint8 [rows, row_bytes]: any bytes are a valid block as long as its scales are finite."""
    generator = np.random.default_rng(seed)
    blocks = in_features // kind.items
    data = generator.integers(0, 256, (rows, blocks, kind.block_bytes), dtype=np.uint8)
    for at in HALVES.get(kind.name, (0,)):
        halves = generator.standard_normal((rows, blocks)).astype(np.float16)
        data[:, :, at : at + 2] = halves.view(np.uint8).reshape(rows, blocks, 2)
    if kind.name == "MXFP4":
        data[:, :, 0] = generator.integers(110, 140, (rows, blocks))
    return torch.from_numpy(data.reshape(rows, -1))


def dequantised(kind: GgufType, rows: torch.Tensor) -> torch.Tensor:
    """float32 values of raw rows, by gguf's own code."""
    return torch.from_numpy(quants.dequantize(rows.numpy(), GGMLQuantizationType[kind.name]).astype(np.float32))


def repacked(ops, kind: GgufType, rows: torch.Tensor) -> torch.Tensor:
    """The packed weight of raw rows, padded with zero rows to whole blocks."""
    padding = torch.zeros(-rows.shape[0] % 16, rows.shape[1], dtype=torch.uint8)
    rows = torch.cat((rows, padding))
    in_features = rows.shape[1] // kind.block_bytes * kind.items
    out = torch.full((rows.shape[0] // 16, format_of(kind.format).block_bytes(in_features)), 171, dtype=torch.uint8)
    ops.repack(rows, kind.name, out)
    return out
