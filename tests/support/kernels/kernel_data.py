"""Inputs and independent float64 formulas shared by the tests of kernels and of the reference ops.

Nothing here calls the code under test: pages are written and read by loops, packed weights are read byte by byte.
"""

from __future__ import annotations

import functools
import math
import struct
from typing import NamedTuple

import torch
from torch import Tensor


class PagedCache(NamedTuple):
    """Contiguous keys and values [batch, num_kv_heads, length, head_dim] and the same numbers in shuffled pages."""

    keys: Tensor
    values: Tensor
    k_pages: Tensor
    v_pages: Tensor
    page_table: Tensor


def generator(seed: int) -> torch.Generator:
    """A seeded generator, so that a failure repeats."""
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(*shape, generator=generator(seed)).to(dtype)


def paged_cache(keys: Tensor, values: Tensor, page_size: int, stored: list[range]) -> PagedCache:
    """Lay the positions of `stored` (one range per sequence) into shuffled pages; everything else is NaN.

    Table entries of pages without a stored position name a page of nothing but NaN.
    """
    batch, num_kv_heads, length, head_dim = keys.shape
    max_pages = -(-length // page_size)
    ids = torch.randperm(batch * num_kv_heads * max_pages, generator=generator(7)).tolist()
    poison = len(ids)
    k_pages = torch.full((poison + 1, page_size, head_dim), torch.nan, dtype=keys.dtype)
    v_pages = torch.full_like(k_pages, torch.nan)
    table = torch.full((batch, num_kv_heads, max_pages), poison, dtype=torch.int32)
    for sequence in range(batch):
        for head in range(num_kv_heads):
            for position in stored[sequence]:
                page, offset = divmod(position, page_size)
                if table[sequence, head, page] == poison:
                    table[sequence, head, page] = ids.pop()
                k_pages[table[sequence, head, page], offset] = keys[sequence, head, position]
                v_pages[table[sequence, head, page], offset] = values[sequence, head, position]
    return PagedCache(keys, values, k_pages, v_pages, table)


def boundary_adversarial(
    batch: int,
    num_kv_heads: int,
    queries_per_kv: int,
    length: int,
    head_dim: int,
    boundaries: list[int],
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(q [batch, num_heads, head_dim], keys, values): positions around `boundaries` carry high scores and large values.

    Losing or repeating any one of these tokens moves the output visibly; with plain random data it would not.
    """
    shared = normal(batch, num_kv_heads, 1, head_dim, seed=seed)
    q = shared + 0.2 * normal(batch, num_kv_heads, queries_per_kv, head_dim, seed=seed + 1)
    keys = normal(batch, num_kv_heads, length, head_dim, seed=seed + 2)
    values = normal(batch, num_kv_heads, length, head_dim, seed=seed + 3)
    marked = sorted({near for at in boundaries for near in (at - 1, at) if 0 <= near < length} | {0, length - 1})
    for index, position in enumerate(marked):
        keys[:, :, position] = 0.7 * shared[:, :, 0]
        values[:, :, position] = 8.0 * (-1) ** index * (1 + index) / len(marked) + values[:, :, position]
    return q.flatten(1, 2), keys.to(dtype), values.to(dtype)


def oracle_attention(
    q: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scale: float, cap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """float64 (out, lse) of q [heads, q_len, head_dim] over keys, values [num_kv_heads, length, head_dim].

    visible: bool [q_len, length]. Plainly: exponentials of the scores, each over their sum; beside bf16 values they are
    rounded to bf16 first, their sum is not.
    """
    repeat, is_bf16 = q.shape[0] // keys.shape[0], keys.dtype == torch.bfloat16
    query = q.to(keys.dtype).double()
    keys = torch.nan_to_num(keys.double()).repeat_interleave(repeat, 0)
    values = torch.nan_to_num(values.double()).repeat_interleave(repeat, 0)
    scores = torch.einsum("hqd,hkd->hqk", query, keys) * scale
    scores = cap * torch.tanh(scores / cap) if cap else scores
    weights = torch.where(visible, torch.exp2(scores / math.log(2)), 0.0)  # a power of two, so it rounds as on any lane
    sums = weights.sum(-1)
    rounded = weights.to(torch.bfloat16).double() if is_bf16 else weights
    out = torch.einsum("hqk,hkd->hqd", rounded, values) / sums.clamp_min(1e-300)[..., None]
    return out, torch.where(sums > 0, torch.log(sums), -torch.inf)


def oracle_decode(
    q: Tensor, cache: PagedCache, start: list[int], stop: list[int], scale: float, cap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """float64 (out [batch, num_heads, head_dim], lse [batch, num_heads]) of decode attention."""
    positions = torch.arange(cache.keys.shape[2])
    rows = []
    for sequence, (low, high) in enumerate(zip(start, stop)):
        visible = ((positions >= low) & (positions < high))[None]
        query, keys, values = q[sequence][:, None], cache.keys[sequence], cache.values[sequence]
        rows.append(oracle_attention(query, keys, values, visible, scale, cap))
    return torch.stack([out[:, 0] for out, _ in rows]), torch.stack([lse[:, 0] for _, lse in rows])


def oracle_prefill(
    q: Tensor, cache: PagedCache, start: int, stop: int, q_start: int, window: int, scale: float, cap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """float64 (out [q_len, num_heads, head_dim], lse [q_len, num_heads]) of prefill attention of the one sequence."""
    visible = torch.zeros(q.shape[0], cache.keys.shape[2], dtype=torch.bool)
    for row in range(q.shape[0]):
        position = q_start + row
        first = max(start, position - window + 1 if window else 0)
        visible[row, first : max(first, min(stop, position + 1))] = True
    out, lse = oracle_attention(q.transpose(0, 1), cache.keys[0], cache.values[0], visible, scale, cap)
    return out.transpose(0, 1), lse.T


def packed_weight(weight_dtype: str, num_blocks: int, in_features: int, seed: int) -> Tensor:
    """Random packed blocks: any byte is a valid quant, float16 scales and minima are of ordinary size."""
    if weight_dtype in ("fp32", "bf16"):
        dtype = torch.float32 if weight_dtype == "fp32" else torch.bfloat16
        return normal(num_blocks, 16 * in_features, seed=seed, dtype=dtype).view(torch.uint8)
    superblocks = -(-in_features // 64)
    lines = 17 if weight_dtype == "q8" else 9
    low = 1 if weight_dtype == "q8" else 0  # q8 stores q + 128 with q >= -127
    packed = torch.randint(low, 256, (num_blocks, superblocks, lines, 64), generator=generator(seed), dtype=torch.uint8)
    header = normal(num_blocks, superblocks, 32, seed=seed + 1) * 0.02
    packed[:, :, 0] = header.to(torch.float16).view(torch.uint8)
    return packed.view(num_blocks, -1)


def read_packed(weight: Tensor, weight_dtype: str, in_features: int) -> Tensor:
    """The published layout read one number at a time, float64 [num_blocks*16, in_features]."""
    return _read_blocks(tuple(bytes(block.tolist()) for block in weight), weight_dtype, in_features).clone()


@functools.lru_cache(maxsize=64)  # planted faults are looked for in the same weights
def _read_blocks(blocks: tuple[bytes, ...], weight_dtype: str, in_features: int) -> Tensor:
    rows = [
        [_weight_at(block, weight_dtype, in_features, feature, column) for column in range(in_features)]
        for block in blocks
        for feature in range(16)
    ]
    return torch.tensor(rows, dtype=torch.float64)


def _weight_at(block: bytes, weight_dtype: str, in_features: int, feature: int, column: int) -> float:
    if weight_dtype == "fp32":
        return struct.unpack_from("<f", block, 4 * (feature * in_features + column))[0]
    if weight_dtype == "bf16":
        bits = block[2 * (feature * in_features + column) :][:2]
        return struct.unpack("<f", b"\0\0" + bits)[0]
    superblock, inside = divmod(column, 64)
    start = superblock * (576 if weight_dtype == "q4" else 1088)
    if weight_dtype == "q4":
        scale, minimum = (struct.unpack_from("<e", block, start + 2 * (feature + add))[0] for add in (0, 16))
        line, within = divmod(inside, 8)
        byte = block[start + 64 * (1 + line) + 4 * feature + within % 4]
        return (byte >> 4 if within >= 4 else byte & 15) * scale + minimum
    scale = struct.unpack_from("<e", block, start + 2 * (feature + 16 * (inside // 32)))[0]
    line, within = divmod(inside, 4)
    return (block[start + 64 * (1 + line) + 4 * feature + within] - 128) * scale


def oracle_linear(x: Tensor, weight: Tensor, weight_dtype: str) -> Tensor:
    """float64 x W^T with the contract's rounding of x, groups of 64 quantised one after another."""
    dense = read_packed(weight, weight_dtype, x.shape[1])
    if weight_dtype == "fp32":
        return x.double() @ dense.T
    if weight_dtype == "bf16":
        return x.bfloat16().double() @ dense.T
    rounded = x.clone().double()
    for first in range(0, x.shape[1], 64):
        group = x[:, first : first + 64]
        scale = group.abs().amax(1, keepdim=True) / 127
        steps = torch.where(scale > 0, group / scale, 0.0).round()
        rounded[:, first : first + 64] = steps.double() * scale.double()
    return rounded @ dense.T


def nmse(actual: Tensor, expected: Tensor, dims: tuple[int, ...] = (-1,)) -> float:
    """Squared error over squared size, both summed over `dims`; the worst one of the other dimensions."""
    actual, expected = actual.detach().cpu().double(), expected.cpu().double()
    assert not actual.isnan().any(), "the result holds NaN"
    error, size = (actual - expected).square().sum(dims), expected.square().sum(dims)
    return (error / size.clamp_min(1e-12)).max().item() if error.numel() else 0.0


def lse_error(actual: Tensor, expected: Tensor) -> float:
    """Largest |difference| / max(1, |lse|); the -inf entries must be the same ones."""
    actual, expected = actual.detach().cpu().double(), expected.cpu().double()
    assert not actual.isnan().any(), "lse holds NaN"
    assert torch.equal(actual.isinf(), expected.isinf()), "lse is -inf in other places"
    finite = expected.isfinite()
    error = (actual - expected)[finite].abs() / expected[finite].abs().clamp_min(1.0)
    return error.max().item() if error.numel() else 0.0
