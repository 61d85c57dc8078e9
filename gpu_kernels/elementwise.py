"""The small ops between the products: RMS norm, silu(gate) * up or gelu(gate) * up, rotary embedding with append to the
cache.

rms_norm    y = x / sqrt(mean(x^2) + eps) * weight, or y += that
silu_mul    y = gate / (1 + exp(-gate)) * up
gelu_mul    y = gelu(gate) * up, gelu by tanh: g / (1 + exp(-2 sqrt(2 / pi) (g + 0.044715 g^3)))
rope        (a, b) -> (a cos - b sin, b cos + a sin) for the pairs (i, i + rotary_dim / 2);
            then, for pages of codes, q and k times the Walsh-Hadamard matrix of kv_pages.spread
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from cpu_kernels.contract import Pages, Rotation
from gpu_kernels.kv_pages import hadamard_block
from gpu_kernels.kv_rows import check_pages, store_row
from gpu_kernels.launching import Kernel, Shape

SILU_BLOCK = 1024
SILU_SHAPE = Shape(BLOCK=SILU_BLOCK, GELU=False, num_warps=4, enable_fp_fusion=False)  # bits as on every other lane
GELU_SHAPE = Shape(BLOCK=SILU_BLOCK, GELU=True, num_warps=4)
ROUNDING = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and subtracting it rounds a small float32 half to even
GELU_FACTOR = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)


@triton.jit
def normed_values(row, weight, columns, inside, eps, HIDDEN: tl.constexpr):
    """The normalised row that begins at `row`; zero past its end."""
    values = tl.load(row + columns, mask=inside, other=0.0)
    inverse = tl.rsqrt(tl.sum(values * values, axis=0) / HIDDEN + eps)
    return values * inverse * tl.load(weight + columns, mask=inside, other=0.0)


@triton.jit
def ordered_exp(x):
    """e^x, operation by operation that of experts/ordered.py, in a kernel that fuses nothing else."""
    clamped = tl.where(x <= -87.33654, -87.33654, tl.where(x >= 88.72283, 88.72283, x))
    k = (clamped * 1.4426950408889634 + ROUNDING) - ROUNDING
    r = tl.fma(k, -0.693145751953125, clamped)
    r = tl.fma(k, -1.4286068203094173e-06, r)
    p = tl.fma(r, 1.9875691500e-4, 1.3981999507e-3)
    p = tl.fma(p, r, 8.3334519073e-3)
    p = tl.fma(p, r, 4.1665795894e-2)
    p = tl.fma(p, r, 1.6666665459e-1)
    p = tl.fma(p, r, 5.0000001201e-1)
    p = tl.fma(p, r * r, r) + 1.0
    power = tl.where(k == k, k, 0.0).to(tl.int32)
    half = power >> 1
    p = p * ((half + 127) << 23).to(tl.float32, bitcast=True)
    p = p * ((power - half + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where(x < -87.33654, 0.0, p)


@triton.jit
def gated_values(row, columns, inside, GELU: tl.constexpr):
    """activation(gate) * up of a row of units of 16 gate | 16 up that begins at `row`."""
    source = row + columns // 16 * 32 + columns % 16
    gate = tl.load(source, mask=inside, other=0.0)
    up = tl.load(source + 16, mask=inside, other=0.0)
    if GELU:
        power = gate * GELU_FACTOR * (1.0 + 0.044715 * gate * gate)
        return gate / (1.0 + tl.exp(-power)) * up
    else:
        return tl.div_rn(gate, 1.0 + ordered_exp(-gate)) * up


@Kernel
@triton.jit
def _rms_norm_kernel(
    x, weight, out, eps, x_stride, out_stride, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr
):
    """grid: (rows,). x, out: [rows, hidden]; weight: [hidden]."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < HIDDEN
    scaled = normed_values(x + row * x_stride, weight, columns, inside, eps, HIDDEN)
    target = out + row * out_stride + columns
    if ADD:
        scaled += tl.load(target, mask=inside, other=0.0)
    tl.store(target, scaled, mask=inside)


@Kernel
@triton.jit(do_not_specialize=["units"])
def _gated_kernel(gate_up, out, units, in_stride, out_stride, BLOCK: tl.constexpr, GELU: tl.constexpr):
    """grid: (rows, cdiv(units * 16, BLOCK)). gate_up: [rows, units * 32], units of 16 gate | 16 up; out: [rows,
    units * 16]."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns // 16 < units  # constant over 16 columns, so the loads stay wide
    values = gated_values(gate_up + row * in_stride, columns, inside, GELU)
    tl.store(out + row * out_stride + columns, values, mask=inside)


@triton.jit
def _normed(values, weight, index, inverse, inside):
    return values * inverse * tl.load(weight + index, mask=inside, other=0.0)


@triton.jit
def _normed_and_rotated(
    head,
    norm,
    cos,
    sin,
    eps,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    HALF: tl.constexpr,
    HAS_NORM: tl.constexpr,
):
    """One head [head_dim] after its norm and rotation; cos, sin: rows of this position."""
    dims = tl.arange(0, HEAD_PAD)
    inside = dims < HEAD_DIM
    rotary = dims < 2 * HALF
    partner = tl.where(dims < HALF, dims + HALF, dims - HALF)
    values = tl.load(head + dims, mask=inside, other=0.0)
    others = tl.load(head + partner, mask=rotary, other=0.0)
    if HAS_NORM:
        inverse = tl.rsqrt(tl.sum(values * values, axis=0) / HEAD_DIM + eps)
        values = _normed(values, norm, dims, inverse, inside)
        others = _normed(others, norm, partner, inverse, rotary)
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
        turned = _normed_and_rotated(head, q_norm, cos + angle, sin + angle, eps, HEAD_DIM, HEAD_PAD, HALF, HAS_Q_NORM)
        turned = _spread(turned, HEAD_PAD, STAGES)
        target = q + row * q_row_stride + (kv_head * QUERIES_PER_KV + member) * q_head_stride
        tl.store(target + dims, turned, mask=inside)
    else:
        slot = tl.load(slots + row * slots_stride + kv_head)
        if member == QUERIES_PER_KV:
            turned = _normed_and_rotated(
                head, k_norm, cos + angle, sin + angle, eps, HEAD_DIM, HEAD_PAD, HALF, HAS_K_NORM
            )
            turned = _spread(turned, HEAD_PAD, STAGES)
            store_row(k_pages, slot, turned, dims, page_stride, row_stride, HEAD_DIM, HEAD_PAD, PAGE_SIZE, FORMAT)
        else:
            value = tl.load(head + dims, mask=inside, other=0.0)
            store_row(v_pages, slot, value, dims, page_stride, row_stride, HEAD_DIM, HEAD_PAD, PAGE_SIZE, FORMAT)


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor, accumulate: bool = False) -> None:
    rows, hidden = x.shape
    assert weight.shape == (hidden,) and out.shape == x.shape, (x.shape, weight.shape, out.shape)
    if rows:
        _rms_norm_kernel.launch(
            (rows, 1, 1), (x, weight, out), (eps,), (x.stride(0), out.stride(0)), _norm_shape(hidden, accumulate)
        )


def silu_mul(gate_up: Tensor, out: Tensor) -> None:
    _gated(gate_up, out, SILU_SHAPE)


def gelu_mul(gate_up: Tensor, out: Tensor) -> None:
    _gated(gate_up, out, GELU_SHAPE)


def _gated(gate_up: Tensor, out: Tensor, shape: Shape) -> None:
    rows, features = out.shape
    assert gate_up.shape == (rows, 2 * features) and features % 16 == 0, (gate_up.shape, out.shape)
    if rows and features:
        _gated_kernel.launch(
            (rows, -(-features // SILU_BLOCK), 1),
            (gate_up, out),
            (features // 16,),
            (gate_up.stride(0), out.stride(0)),
            shape,
        )


def rope_append(qkv: Tensor, positions: Tensor, rotation: Rotation, q: Tensor, pages: Pages, slots: Tensor) -> None:
    """Strides of keys and values are equal."""
    cos, sin, q_norm, k_norm, eps = rotation
    rows, num_heads, head_dim = q.shape
    num_kv_heads = qkv.shape[1]
    queries_per_kv = num_heads // num_kv_heads
    assert qkv.shape[0] == rows and qkv.shape[2] >= (queries_per_kv + 2) * head_dim, (qkv.shape, q.shape)
    form = check_pages(pages, head_dim)
    assert cos.stride() == sin.stride(), (cos.stride(), sin.stride())
    assert slots.shape == (rows, num_kv_heads) and 2 * cos.shape[1] <= head_dim, (slots.shape, cos.shape)
    if rows and num_kv_heads:
        shape = _rope_shape(
            queries_per_kv,
            head_dim,
            cos.shape[1],
            pages.k.shape[1],
            pages.k.dtype,
            form,
            q_norm is not None,
            k_norm is not None,
        )
        norms = (qkv if q_norm is None else q_norm, qkv if k_norm is None else k_norm)  # one that is None is not read
        _rope_append_kernel.launch(
            (rows, num_kv_heads, queries_per_kv + 2),
            (qkv, positions, cos, sin, *norms, q, *pages, slots),
            (eps,),
            (*qkv.stride()[:2], cos.stride(0), *q.stride()[:2], *pages.k.stride()[:2], slots.stride(0)),
            shape,
        )


def norm_warps(block: int) -> int:
    """Warps that normalise a row; who sums the same row with as many gets the same sum."""
    return 8 if block > 2048 else 4


@functools.cache
def _norm_shape(hidden: int, accumulate: bool) -> Shape:
    block = triton.next_power_of_2(hidden)
    return Shape(HIDDEN=hidden, BLOCK=block, ADD=accumulate, num_warps=norm_warps(block))


@functools.cache
def _rope_shape(
    queries_per_kv: int,
    head_dim: int,
    half: int,
    page_size: int,
    dtype: torch.dtype,
    form: str,
    has_q_norm: bool,
    has_k_norm: bool,
) -> Shape:
    return Shape(
        QUERIES_PER_KV=queries_per_kv,
        HEAD_DIM=head_dim,
        HEAD_PAD=_row_pad(head_dim, form),
        HALF=half,
        PAGE_SIZE=page_size,
        HAS_Q_NORM=has_q_norm,
        HAS_K_NORM=has_k_norm,
        STAGES=hadamard_block(dtype, head_dim).bit_length() - 1,
        FORMAT=form,
        num_warps=1,
        enable_fp_fusion=form == "plain",
    )  # codes are to be the reference's, which rounds every product


def _row_pad(head_dim: int, form: str) -> int:
    """Lanes of a row: a power of two that holds whole groups of codes."""
    return max(triton.next_power_of_2(head_dim), {"plain": 1, "q8": 64, "q4": 32}[form])
