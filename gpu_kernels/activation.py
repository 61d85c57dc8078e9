"""The input of a linear layer over q8 or q4 blocks, rounded to int8 per group of 64 as on the CPU lane.

x_k = a_k * s_x(group of 64)            a = round_half_even(x / s_x), s_x = absmax / 127
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpu_kernels.launching import Kernel, Shape
from gpu_kernels.reference import GROUP

GROUPS = 16  # of one row a program
ROUND_SHAPE = Shape(GROUPS=GROUPS, num_warps=4)
ROUNDING = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and subtracting it rounds a small float32 half to even


@triton.jit
def _steps_and_scale(values):
    """(whole numbers in -127..127 [groups, 64], scale [groups]) of float32 values [groups, 64]."""
    scale = tl.div_rn(tl.max(tl.abs(values), axis=1), 127.0)
    steps = tl.div_rn(values, tl.where(scale == 0.0, 1.0, scale)[:, None])
    return tl.minimum(tl.maximum((steps + ROUNDING) - ROUNDING, -127.0), 127.0), scale


@triton.jit
def store_rounded(values, groups, inside, q, scales, sums, row, q_stride, scale_stride, ORDER: tl.constexpr):
    """Round float32 values [groups, 64] of a row, zero where there is no input, and store groups that are `inside`: as
    bf16 to q [rows, q_stride] (ORDER "bf16"), else as `quantize_activation` stores them in that order."""
    steps, scale = _steps_and_scale(values)
    k = tl.arange(0, 64)
    if ORDER == "q4":
        stored = k // 8 % 4 * 16 + k // 4 % 2 * 8 + k // 32 * 4 + k % 4
    elif ORDER == "q8":
        stored = k // 4 % 4 * 16 + k // 32 * 8 + k // 16 % 2 * 4 + k % 4
    else:
        stored = k
    target = q + row * q_stride + groups[:, None] * 64 + stored[None, :]
    if ORDER == "bf16":
        tl.store(target, (steps * scale[:, None]).to(tl.bfloat16), mask=inside[:, None])
    else:
        tl.store(target, steps.to(tl.int8), mask=inside[:, None])
        tl.store(scales + groups * scale_stride + row, scale, mask=inside)
        tl.store(sums + groups * scale_stride + row, scale * tl.sum(steps, axis=1), mask=inside)


@Kernel
@triton.jit
def _quantize_kernel(
    x,
    q,
    scales,
    sums,
    in_features,
    num_groups,
    x_stride,
    q_stride,
    scale_stride,
    ORDER: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """grid: (rows, cdiv(num_groups, GROUPS)). x: [rows, in_features]; q: int8 [rows, num_groups * 64]; scales, sums:
    [num_groups, rows], sums = scale * sum of q. The inputs of a group are stored as `quantize_activation` says."""
    row = tl.program_id(0).to(tl.int64)
    groups = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    stored = tl.arange(0, 64)
    quarter, half, high, byte = stored // 16, stored // 8 % 2, stored // 4 % 2, stored % 4
    if ORDER == "q4":
        source = high * 32 + quarter * 8 + half * 4 + byte
    elif ORDER == "q8":
        source = half * 32 + high * 16 + quarter * 4 + byte
    else:
        source = stored
    columns = groups[:, None] * 64 + source[None, :]
    steps, scale = _steps_and_scale(tl.load(x + row * x_stride + columns, mask=columns < in_features, other=0.0))
    inside = groups < num_groups
    tl.store(q + row * q_stride + groups[:, None] * 64 + stored[None, :], steps.to(tl.int8), mask=inside[:, None])
    tl.store(scales + groups * scale_stride + row, scale, mask=inside)
    tl.store(sums + groups * scale_stride + row, scale * tl.sum(steps, axis=1), mask=inside)


@Kernel
@triton.jit
def _round_kernel(x, out, in_features, num_groups, x_stride, out_stride, GROUPS: tl.constexpr):
    """grid: (rows, cdiv(num_groups, GROUPS)). x: [rows, in_features]; out: bf16 [rows, num_groups * 64]."""
    row = tl.program_id(0).to(tl.int64)
    groups = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    columns = groups[:, None] * 64 + tl.arange(0, 64)[None, :]
    steps, scale = _steps_and_scale(tl.load(x + row * x_stride + columns, mask=columns < in_features, other=0.0))
    target = out + row * out_stride + columns
    tl.store(target, (steps * scale[:, None]).to(tl.bfloat16), mask=(groups < num_groups)[:, None])


def quantize_activation(x: Tensor, order: str) -> tuple[Tensor, Tensor, Tensor]:
    """(int8 [rows, groups * 64], scale f32 [groups, rows], scale * sum of the int8 f32 [groups, rows]) of x.

    order: of the inputs of a group. "q4" and "q8", for few rows over such weights, are [quarter, half, high, byte], so
    that a thread which holds lines `quarter` and `quarter` + 4 of a superblock's half (q8) or nibbles (q4) finds the
    inputs that belong to them side by side; "own", for many rows, is as they come.
    """
    rows, in_features = x.shape
    num_groups = -(-in_features // GROUP)
    (q, scales, sums), strides = quantized_buffers(rows, in_features, order, x.device)
    _quantize_kernel.launch(
        (rows, -(-num_groups // GROUPS), 1),
        (x, q, scales, sums),
        (),
        (in_features, num_groups, x.stride(0), *strides),
        _quantize_shape(order),
    )
    return q, scales, sums


def quantized_buffers(
    rows: int, in_features: int, order: str, device: torch.device
) -> tuple[tuple[Tensor, ...], tuple[int, int]]:
    """Uninitialised (q, scales, sums), of order "bf16" (rounded x,) alone, and the strides of rows and of scales."""
    num_groups = -(-in_features // GROUP)
    if order == "bf16":
        return (torch.empty(rows, num_groups * GROUP, dtype=torch.bfloat16, device=device),), (num_groups * GROUP, 1)
    q = torch.empty(rows, num_groups * GROUP, dtype=torch.int8, device=device)
    stride = 1 if rows == 1 else -(-rows // 16) * 16  # aligned, so that scales of two rows are one load
    scales, sums = torch.empty(2, num_groups, stride, dtype=torch.float32, device=device)[..., :rows]
    return (q, scales, sums), (num_groups * GROUP, stride)


def round_activation(x: Tensor) -> Tensor:
    """bf16 [rows, groups * 64] of x after its rounding to int8 per group; zero in the padding."""
    rows, in_features = x.shape
    num_groups = -(-in_features // GROUP)
    out = torch.empty(rows, num_groups * GROUP, dtype=torch.bfloat16, device=x.device)
    _round_kernel.launch(
        (rows, -(-num_groups // GROUPS), 1),
        (x, out),
        (),
        (in_features, num_groups, x.stride(0), num_groups * GROUP),
        ROUND_SHAPE,
    )
    return out


@functools.cache
def _quantize_shape(order: str) -> Shape:
    return Shape(ORDER=order, GROUPS=GROUPS, num_warps=4)
