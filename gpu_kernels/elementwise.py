"""The small ops between the products: RMS norm, silu(gate) * up or gelu(gate) * up.

rms_norm    y = x / sqrt(mean(x^2) + eps) * weight, or y += that
silu_mul    y = gate / (1 + exp(-gate)) * up
gelu_mul    y = gelu(gate) * up, gelu by tanh: g / (1 + exp(-2 sqrt(2 / pi) (g + 0.044715 g^3)))
"""

from __future__ import annotations

import functools

import triton
import triton.language as tl
from torch import Tensor

from gpu_kernels.launching import Kernel, Shape

SILU_BLOCK = 1024
SILU_SHAPE = Shape(BLOCK=SILU_BLOCK, GELU=False, num_warps=4, enable_fp_fusion=False)  # bits as on every other lane
GELU_SHAPE = Shape(BLOCK=SILU_BLOCK, GELU=True, num_warps=4, enable_fp_fusion=False)
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
        power = gate * -GELU_FACTOR * (1.0 + gate * gate * 0.044715)
        return tl.div_rn(gate, 1.0 + ordered_exp(power)) * up
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


def norm_warps(block: int) -> int:
    """Warps that normalise a row; who sums the same row with as many gets the same sum."""
    return 8 if block > 2048 else 4


@functools.cache
def _norm_shape(hidden: int, accumulate: bool) -> Shape:
    block = triton.next_power_of_2(hidden)
    return Shape(HIDDEN=hidden, BLOCK=block, ADD=accumulate, num_warps=norm_warps(block))
