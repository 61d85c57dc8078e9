"""Rotation, attention over pages, and the merge of partials."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cpu_kernels.contract import ChunkKeys, Pages, Partial, Rotation, RowKeys
from gpu_kernels import kv_pages
from gpu_kernels.reference.elementwise import rms_normalized
from gpu_kernels.reference.linear_layer import compute_dtype


def rope_append(qkv: Tensor, positions: Tensor, rotation: Rotation, q: Tensor, pages: Pages, slots: Tensor) -> None:
    head_dim, num_kv_heads = q.shape[2], qkv.shape[1]
    queries_per_kv = q.shape[1] // num_kv_heads
    heads = qkv[..., : (queries_per_kv + 2) * head_dim].unflatten(-1, (queries_per_kv + 2, head_dim))
    query, key, value = heads[:, :, :queries_per_kv], heads[:, :, queries_per_kv], heads[:, :, queries_per_kv + 1]
    if rotation.q_norm is not None:
        query = rms_normalized(query, rotation.q_norm, rotation.eps)
    if rotation.k_norm is not None:
        key = rms_normalized(key, rotation.k_norm, rotation.eps)
    cos, sin = rotation.cos[positions], rotation.sin[positions]
    query, key = (kv_pages.spread(_rotated(part, cos, sin), pages.k.dtype) for part in (query.flatten(1, 2), key))
    q.copy_(query)
    page, offset = slots // pages.k.shape[1], slots % pages.k.shape[1]
    kv_pages.write_rows(pages.k, page, offset, key)
    kv_pages.write_rows(pages.v, page, offset, value)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate [rows, heads, head_dim]; dimensions beyond the rotary ones pass through."""
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)


def decode_attention(q: Tensor, pages: Pages, keys: RowKeys, scale: float, into: Partial, cap: float = 0.0) -> None:
    needed = _needed_pages(keys.start, keys.stop, pages.k.shape[1])
    positions = _positions(needed, pages)
    visible = (positions >= keys.start[:, None]) & (positions < keys.stop[:, None])  # (batch, kv_len)
    k, v = _gather(pages, keys.table, needed, visible[:, None], q)
    query = _by_kv_head(q, pages, keys.table.shape[1])[:, :, :, None]  # (batch, kv_heads, queries_per_kv, 1, dim)
    rounded = pages.k.dtype == torch.bfloat16
    out, lse = _attend(query, k[:, :, None], v[:, :, None], visible[:, None, None, None], (scale, cap), rounded)
    into.out.copy_(out.reshape(into.out.shape))
    into.lse.copy_(lse.reshape(into.lse.shape))


def prefill_attention(q: Tensor, pages: Pages, keys: ChunkKeys, scale: float, into: Partial, cap: float = 0.0) -> None:
    start, stop = (torch.tensor([limit], device="cpu") for limit in (keys.start, keys.stop))
    needed = _needed_pages(start, stop, pages.k.shape[1])
    positions = _positions(needed, pages)
    rows = keys.q_start + torch.arange(q.shape[0], device=q.device)[:, None]
    stored = (positions >= keys.start) & (positions < keys.stop)
    visible = stored & (positions <= rows)  # (q_len, kv_len)
    if keys.window:
        visible = visible & (positions > rows - keys.window)
    k, v = _gather(pages, keys.table, needed, stored, q)
    query = _by_kv_head(q, pages, keys.table.shape[0]).permute(1, 2, 0, 3)  # (kv_heads, queries_per_kv, q_len, dim)
    out, lse = _attend(query, k[:, None], v[:, None], visible, (scale, cap), pages.k.dtype == torch.bfloat16)
    into.out.copy_(out.permute(2, 0, 1, 3).reshape(into.out.shape))
    into.lse.copy_(lse.permute(2, 0, 1).reshape(into.lse.shape))


def merge(partials: list[Partial], into: Partial) -> None:
    outs, weights = (torch.stack(tensors) for tensors in zip(*partials))
    maximum = weights.amax(0)
    safe_maximum = torch.where(maximum == -torch.inf, 0.0, maximum)  # -inf - -inf would be NaN
    weights = torch.exp(weights - safe_maximum)
    total = weights.sum(0)
    mean = (weights[..., None] * outs).sum(0) / torch.where(total == 0, 1.0, total)[..., None]
    into.out.copy_(mean)
    into.lse.copy_(safe_maximum + torch.log(total))


def _attend(
    query: Tensor, keys: Tensor, values: Tensor, visible: Tensor, factors: tuple[float, float], rounded: bool
) -> tuple[Tensor, Tensor]:
    scale, cap = factors
    scores = (query @ keys.transpose(-1, -2)) * scale
    scores = (cap * torch.tanh(scores / cap) if cap else scores).masked_fill(~visible, -torch.inf)
    powers = scores * math.log2(math.e)
    maximum = powers.amax(-1, keepdim=True).ceil() if powers.shape[-1] else powers.new_zeros(powers.shape[:-1] + (1,))
    weights = torch.exp2(powers - torch.where(maximum == -torch.inf, 0.0, maximum))
    total = weights.sum(-1, keepdim=True)
    if rounded:
        weights = weights.to(torch.bfloat16).to(values.dtype)
    return weights @ values / torch.where(total == 0, 1.0, total), torch.logsumexp(scores, dim=-1)


def _needed_pages(kv_start: Tensor, kv_stop: Tensor, page_size: int) -> slice:
    """The logical pages that hold any position of any non-empty range."""
    filled = kv_stop > kv_start
    if not bool(filled.any()):
        return slice(0, 0)
    return slice(int(kv_start[filled].min()) // page_size, -(-int(kv_stop[filled].max()) // page_size))


def _positions(needed: slice, pages: Pages) -> Tensor:
    page_size = pages.k.shape[1]
    return torch.arange(needed.start * page_size, needed.stop * page_size, device=pages.k.device)


def _gather(pages: Pages, page_table: Tensor, needed: slice, stored: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [..., num_kv_heads, kv_len, head_dim] of a slice of logical pages; zero where not `stored`."""
    table = page_table[..., needed].long()
    wanted = stored.unflatten(-1, (table.shape[-1], pages.k.shape[1]))  # (..., pages, page_size)
    table = torch.where(wanted.any(-1), table, 0)  # entries of pages outside the range may hold anything
    rows = (kv_pages.read_rows(cache[table], q.shape[-1], compute_dtype(q)) for cache in pages)
    return tuple(torch.where(wanted[..., None], row, 0).flatten(-3, -2) for row in rows)


def _by_kv_head(q: Tensor, pages: Pages, num_kv_heads: int) -> Tensor:
    """q rounded to the KV dtype, [rows, num_kv_heads, queries_per_kv, head_dim]."""
    rounded = q.to(kv_pages.query_dtype(pages.k.dtype)).to(compute_dtype(q))
    return rounded.unflatten(1, (num_kv_heads, q.shape[1] // num_kv_heads))


def add_sinks(sinks: Tensor, into: Partial) -> None:
    into.out.mul_((1.0 / (1.0 + torch.exp(sinks - into.lse)))[..., None])
