"""Rotary embedding of queries and keys, with append of keys and values to the pages of the cache.

(a, b) -> (a cos - b sin, b cos + a sin) for the pairs (i, i + rotary_dim / 2), after an optional RMS norm of the head;
then, for pages of codes, q and k times the Walsh-Hadamard matrix of kv_pages.spread.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cpu_kernels.contract import Pages, Rotation
from gpu_kernels.kv_pages import hadamard_block
from gpu_kernels.kv_rows import FORMATS, PageRows, check_pages, store_row
from gpu_kernels.launching import Kernel, Shape


class Norm(NamedTuple):
    """RMS norm of a head, where HAS_NORM."""

    weight: Any
    eps: Any
    HAS_NORM: Any


@triton.jit
def _normed(values, weight, index, inverse, inside):
    return values * inverse * tl.load(weight + index, mask=inside, other=0.0)


@triton.jit
def _normed_and_rotated(head, norm, cos, sin, HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr, HALF: tl.constexpr):
    """One head [head_dim] after its norm and rotation; cos, sin: rows of this position."""
    dims = tl.arange(0, HEAD_PAD)
    inside = dims < HEAD_DIM
    rotary = dims < 2 * HALF
    partner = tl.where(dims < HALF, dims + HALF, dims - HALF)
    values = tl.load(head + dims, mask=inside, other=0.0)
    others = tl.load(head + partner, mask=rotary, other=0.0)
    if norm.HAS_NORM:
        inverse = tl.rsqrt(tl.sum(values * values, axis=0) / HEAD_DIM + norm.eps)
        values = _normed(values, norm.weight, dims, inverse, inside)
        others = _normed(others, norm.weight, partner, inverse, rotary)
    angle = tl.where(dims < HALF, dims, dims - HALF)
    cosine = tl.load(cos + angle, mask=rotary, other=1.0)  # beyond the rotary dimensions: times one, plus zero
    sine = tl.load(sin + angle, mask=rotary, other=0.0)
    return values * cosine + tl.where(dims < HALF, -sine, sine) * others


@triton.jit
def _spread(row, HEAD_PAD: tl.constexpr, STAGES: tl.constexpr):
    """A row times the Walsh-Hadamard matrix of kv_pages.spread, its blocks of 2^STAGES dims."""
    for stage in tl.static_range(STAGES):
        pairs = tl.reshape(row, [HEAD_PAD >> (stage + 1), 2, 1 << stage])
        a, b = tl.split(tl.permute(pairs, (0, 2, 1)))
        row = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), [HEAD_PAD])
    return row * 2.0 ** (-0.5 * STAGES)


@Kernel
@triton.jit
def _rope_append_kernel(
    qkv,
    positions,
    cos,
    sin,
    q_norm,
    k_norm,
    q,
    k_pages,
    v_pages,
    slots,
    eps,
    qkv_row_stride,
    qkv_head_stride,
    angle_stride,
    q_row_stride,
    q_head_stride,
    page_stride,
    row_stride,
    slots_stride,
    QUERIES_PER_KV: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    HALF: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HAS_Q_NORM: tl.constexpr,
    HAS_K_NORM: tl.constexpr,
    STAGES: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """grid: (rows, num_kv_heads, QUERIES_PER_KV + 2), the last axis being the heads of a unit: its q, k and v."""
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    member = tl.program_id(2)
    dims = tl.arange(0, HEAD_PAD)
    inside = dims < HEAD_DIM
    head = qkv + row * qkv_row_stride + kv_head * qkv_head_stride + member * HEAD_DIM
    angle = tl.load(positions + row) * angle_stride
    if member < QUERIES_PER_KV:
        turned = _normed_and_rotated(
            head, Norm(q_norm, eps, HAS_Q_NORM), cos + angle, sin + angle, HEAD_DIM, HEAD_PAD, HALF
        )
        turned = _spread(turned, HEAD_PAD, STAGES)
        target = q + row * q_row_stride + (kv_head * QUERIES_PER_KV + member) * q_head_stride
        tl.store(target + dims, turned, mask=inside)
    else:
        slot = tl.load(slots + row * slots_stride + kv_head)
        if member == QUERIES_PER_KV:
            turned = _normed_and_rotated(
                head, Norm(k_norm, eps, HAS_K_NORM), cos + angle, sin + angle, HEAD_DIM, HEAD_PAD, HALF
            )
            store_row(
                k_pages,
                PageRows(page_stride, row_stride, HEAD_DIM, HEAD_PAD, PAGE_SIZE, FORMAT),
                slot,
                _spread(turned, HEAD_PAD, STAGES),
            )
        else:
            store_row(
                v_pages,
                PageRows(page_stride, row_stride, HEAD_DIM, HEAD_PAD, PAGE_SIZE, FORMAT),
                slot,
                tl.load(head + dims, mask=inside, other=0.0),
            )


def rope_append(qkv: Tensor, positions: Tensor, rotation: Rotation, q: Tensor, pages: Pages, slots: Tensor) -> None:
    """Strides of keys and values are equal."""
    cos, sin, q_norm, k_norm, eps = rotation
    rows, num_heads, head_dim = q.shape
    num_kv_heads = qkv.shape[1]
    queries_per_kv = num_heads // num_kv_heads
    assert qkv.shape[0] == rows and qkv.shape[2] >= (queries_per_kv + 2) * head_dim, (qkv.shape, q.shape)
    check_pages(pages, head_dim)
    assert cos.stride() == sin.stride(), (cos.stride(), sin.stride())
    assert slots.shape == (rows, num_kv_heads) and 2 * cos.shape[1] <= head_dim, (slots.shape, cos.shape)
    if rows and num_kv_heads:
        has_norms = (q_norm is not None, k_norm is not None)
        shape = _rope_shape(queries_per_kv, head_dim, cos.shape[1], pages.k.shape[1], pages.k.dtype, has_norms)
        norms = (qkv if q_norm is None else q_norm, qkv if k_norm is None else k_norm)  # one that is None is not read
        _rope_append_kernel.launch(
            (rows, num_kv_heads, queries_per_kv + 2),
            (qkv, positions, cos, sin, *norms, q, *pages, slots),
            (eps,),
            (*qkv.stride()[:2], cos.stride(0), *q.stride()[:2], *pages.k.stride()[:2], slots.stride(0)),
            shape,
        )


@functools.cache
def _rope_shape(
    queries_per_kv: int,
    head_dim: int,
    half: int,
    page_size: int,
    dtype: torch.dtype,
    has_norms: tuple[bool, bool],
) -> Shape:
    form = FORMATS[dtype]
    return Shape(
        QUERIES_PER_KV=queries_per_kv,
        HEAD_DIM=head_dim,
        HEAD_PAD=_row_pad(head_dim, form),
        HALF=half,
        PAGE_SIZE=page_size,
        HAS_Q_NORM=has_norms[0],
        HAS_K_NORM=has_norms[1],
        STAGES=hadamard_block(dtype, head_dim).bit_length() - 1,
        FORMAT=form,
        num_warps=1,
        enable_fp_fusion=form == "plain",
    )  # codes are to be the reference's, which rounds every product


def _row_pad(head_dim: int, form: str) -> int:
    """Lanes of a row: a power of two that holds whole groups of codes."""
    return max(triton.next_power_of_2(head_dim), {"plain": 1, "q8": 64, "q4": 32}[form])
