"""Pages of codes read byte by byte, and what rope_append must leave in them: one check for every lane.

Nothing here calls the code under test: the format and the Hadamard matrix are written out again, in float64.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import NamedTuple

import scipy.linalg
import torch
from torch import Tensor

from cpu_kernels.contract import Pages, Rotation
from tests.support.kernels.kernel_data import nmse, normal

DTYPES = {"q8": torch.int8, "q4": torch.uint8}
GROUP_DIMS = {"q8": 64, "q4": 32}
HEAD_DIMS = (64, 128, 256, 96, 40, 80)  # Hadamard blocks of 64, 128, 256, 32, 8 and 16 dims
NMSE = {torch.float32: 1e-12, torch.float64: 1e-24}
EPS = 1e-3


def bf16_at(content: bytes, at: int) -> float:
    """The bfloat16 at byte `at`."""
    return struct.unpack("<f", b"\0\0" + content[at : at + 2])[0]


def read_row(page: Tensor, offset: int, head_dim: int) -> Tensor:
    """One token of a page, number by number from the description in cpu_kernels/formats/pages.py, float64
    [head_dim]."""
    kv_dtype = "q8" if page.dtype == torch.int8 else "q4"
    content, page_size, group = page.numpy().tobytes(), page.shape[0], GROUP_DIMS[kv_dtype]
    groups = -(-head_dim // group)
    row_bytes = groups * group // (1 if kv_dtype == "q8" else 2)
    numbers = page_size * row_bytes
    values = []
    for dim in range(head_dim):
        scale = bf16_at(content, numbers + 2 * (dim // group * page_size + offset))
        if kv_dtype == "q8":
            code = struct.unpack_from("b", content, offset * row_bytes + dim)[0]
            values.append(code * scale)
        else:
            byte = content[offset * row_bytes + dim // 2]
            minimum = bf16_at(content, numbers + 2 * ((groups + dim // group) * page_size + offset))
            values.append((byte >> 4 if dim % 2 else byte & 15) * scale + minimum)
    return torch.tensor(values, dtype=torch.float64)


def worst_step(stored: Tensor, row: Tensor, kv_dtype: str) -> float:
    """Largest distance of a stored number from the one it stands for, in steps of its group's codes."""
    worst = 0.0
    for group, kept in zip(row.split(GROUP_DIMS[kv_dtype]), stored.split(GROUP_DIMS[kv_dtype]), strict=True):
        step = group.abs().max() / 127 if kv_dtype == "q8" else (group.max() - group.min()) / 15
        worst = max(worst, ((kept - group).abs().max() / step).item())
    return worst


def hadamard(head_dim: int) -> Tensor:
    """The matrix that keys and queries of a quantised cache are multiplied by, float64 [head_dim, head_dim]."""
    block = math.gcd(head_dim, 1 << 20)
    matrix = torch.from_numpy(scipy.linalg.hadamard(block)).double() / math.sqrt(block)
    return torch.block_diag(*[matrix] * (head_dim // block))


class Appended(NamedTuple):
    """Heads that met rope_append, [rows, num_kv_heads, heads, head_dim], and what it left: q alike, pages, slots."""

    query: Tensor
    key: Tensor
    value: Tensor
    q: Tensor
    k_pages: Tensor
    v_pages: Tensor
    slots: Tensor


def append(op: Callable[..., None], device: str, kv_dtype: str, head_dim: int, dtype: torch.dtype) -> Appended:
    """Run rope_append on random heads, with norms and a rotation of 3/4 of the dims; heads as they are before H."""
    rows, groups, heads, page_size, half = 3, 2, 2, 4, 3 * head_dim // 8
    qkv = normal(rows, groups, (heads + 2) * head_dim + 3, seed=head_dim).to(dtype)
    angles = torch.outer(torch.arange(9.0), 0.7 ** torch.arange(half)).to(dtype)
    positions, slots = torch.tensor([8, 0, 3]), torch.tensor([[5, 11], [2, 7], [0, 8]])
    norms = [normal(head_dim, seed=seed).to(dtype) for seed in (1, 2)]
    row_items = -(-head_dim // GROUP_DIMS[kv_dtype]) * {"q8": 66, "q4": 20}[kv_dtype]
    k_pages, v_pages = (torch.full((3, page_size, row_items), 255, dtype=torch.uint8) for _ in range(2))
    k_pages, v_pages = (pages.view(DTYPES[kv_dtype]).to(device) for pages in (k_pages, v_pages))
    q = torch.full((rows, groups * heads, head_dim), torch.nan, dtype=dtype, device=device)
    rotation = Rotation(*(tensor.to(device) for tensor in (angles.cos(), angles.sin(), *norms)), EPS)

    op(qkv.to(device), positions.to(device), rotation, q, Pages(k_pages, v_pages), slots.to(device))

    parts = qkv[..., : (heads + 2) * head_dim].double().unflatten(-1, (heads + 2, head_dim))
    query = _turned(parts[:, :, :heads], norms[0].double(), angles[positions].double())
    key = _turned(parts[:, :, heads : heads + 1], norms[1].double(), angles[positions].double())
    return Appended(query, key, parts[:, :, -1:], q.cpu().view(query.shape), k_pages.cpu(), v_pages.cpu(), slots)


def check_rope_append(
    op: Callable[..., None], device: str, kv_dtype: str, head_dim: int, dtype: torch.dtype = torch.float32
) -> None:
    """q and the stored keys are the rotated ones times the explicit matrix, and the stored values are the values."""
    run, matrix = append(op, device, kv_dtype, head_dim, dtype), hadamard(head_dim)

    assert nmse(run.q, run.query @ matrix) <= NMSE[dtype]
    for row, group in torch.cartesian_prod(torch.arange(3), torch.arange(2)).tolist():
        page, offset = divmod(int(run.slots[row, group]), run.k_pages.shape[1])
        for pages, heads in ((run.k_pages, run.key @ matrix), (run.v_pages, run.value)):
            assert worst_step(read_row(pages[page], offset, head_dim), heads[row, group, 0], kv_dtype) <= 0.52


def _turned(heads: Tensor, norm: Tensor, angles: Tensor) -> Tensor:
    """float64 norm and rotation of [rows, num_kv_heads, heads, head_dim] as complex numbers."""
    heads = heads / (heads.square().mean(-1, keepdim=True) + EPS).sqrt() * norm
    half = angles.shape[1]
    pairs = torch.complex(heads[..., :half], heads[..., half : 2 * half])
    pairs = pairs * torch.polar(torch.ones((), dtype=torch.float64), angles)[:, None, None]
    return torch.cat((pairs.real, pairs.imag, heads[..., 2 * half :]), -1)
