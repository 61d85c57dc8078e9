"""layer_norm    y = (x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps) * weight (+ bias), a program a row."""

from __future__ import annotations

import functools

import triton
import triton.language as tl
from torch import Tensor

from gpu_kernels.elementwise import norm_warps
from gpu_kernels.launching import Kernel, Shape


@Kernel
@triton.jit
def _layer_norm_kernel(
    x, weight, bias, out, eps, x_stride, out_stride, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr
):
    """grid: (rows,). x, out: [rows, hidden]; weight, bias: [hidden], bias read where HAS_BIAS."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < HIDDEN
    values = tl.load(x + row * x_stride + columns, mask=inside, other=0.0)
    apart = tl.where(inside, values - tl.sum(values, axis=0) / HIDDEN, 0.0)
    inverse = tl.rsqrt(tl.sum(apart * apart, axis=0) / HIDDEN + eps)
    normed = apart * inverse * tl.load(weight + columns, mask=inside, other=0.0)
    if HAS_BIAS:
        normed += tl.load(bias + columns, mask=inside, other=0.0)
    tl.store(out + row * out_stride + columns, normed, mask=inside)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, out: Tensor) -> None:
    rows, hidden = x.shape
    assert weight.shape == (hidden,) and out.shape == x.shape, (x.shape, weight.shape, out.shape)
    assert bias is None or bias.shape == (hidden,), bias.shape
    if rows:
        tensors = (x, weight, weight if bias is None else bias, out)  # a bias that is None is not read
        shape = _layer_norm_shape(hidden, bias is not None)
        _layer_norm_kernel.launch((rows, 1, 1), tensors, (eps,), (x.stride(0), out.stride(0)), shape)


@functools.cache
def _layer_norm_shape(hidden: int, has_bias: bool) -> Shape:
    block = triton.next_power_of_2(hidden)
    return Shape(HIDDEN=hidden, BLOCK=block, HAS_BIAS=has_bias, num_warps=norm_warps(block))
