"""Small ops whose result a linear multiplies next, and the rounding of that result, in one launch each.

    rounded_norm     rounded(rms_norm(x))
    rounded_gated    rounded(activation(gate) * up)

Both give, bit for bit, what the two ops give one after the other, and write the unrounded result too.
"""

from __future__ import annotations

import functools

import triton
import triton.language as tl
from torch import Tensor

from gpu_kernels.activation import quantized_buffers, store_rounded
from gpu_kernels.elementwise import SILU_BLOCK, gated_values, gelu_mul, norm_warps, normed_values, rms_norm, silu_mul
from gpu_kernels.launching import Kernel, Shape
from gpu_kernels.linear_layer import INT8_ROWS, RoundedInput, rounded, rounding_order
from gpu_kernels.reference import GROUP

MOST_FEATURES = 16384  # of a row that one program normalises and rounds


@Kernel
@triton.jit
def _rounded_norm_kernel(
    x,
    weight,
    out,
    q,
    scales,
    sums,
    eps,
    x_stride,
    out_stride,
    q_stride,
    scale_stride,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    ORDER: tl.constexpr,
):
    """grid: (rows,). x, out: [rows, hidden]; weight: [hidden]; q, scales, sums: see activation.store_rounded."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < HIDDEN
    scaled = normed_values(x + row * x_stride, weight, columns, inside, eps, HIDDEN)
    tl.store(out + row * out_stride + columns, scaled, mask=inside)
    groups = tl.arange(0, BLOCK // 64)
    store_rounded(
        scaled.reshape(BLOCK // 64, 64),
        groups,
        groups * 64 < HIDDEN,
        q,
        scales,
        sums,
        row,
        q_stride,
        scale_stride,
        ORDER,
    )


@Kernel
@triton.jit(do_not_specialize=["units"])
def _rounded_gated_kernel(
    gate_up,
    out,
    q,
    scales,
    sums,
    units,
    in_stride,
    out_stride,
    q_stride,
    scale_stride,
    BLOCK: tl.constexpr,
    GELU: tl.constexpr,
    ORDER: tl.constexpr,
):
    """grid: (rows, cdiv(units * 16, BLOCK)). gate_up: [rows, units * 32], units of 16 gate | 16 up; out: [rows, units *
    16]; q, scales, sums: see activation.store_rounded."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns // 16 < units
    values = gated_values(gate_up + row * in_stride, columns, inside, GELU)
    tl.store(out + row * out_stride + columns, values, mask=inside)
    groups = tl.program_id(1) * (BLOCK // 64) + tl.arange(0, BLOCK // 64)
    padded = tl.where(inside, values, 0.0)
    store_rounded(
        padded.reshape(BLOCK // 64, 64), groups, groups * 4 < units, q, scales, sums, row, q_stride, scale_stride, ORDER
    )


def rounded_norm(
    x: Tensor, weight: Tensor, eps: float, out: Tensor, weight_dtype: str, int8_rows: int = INT8_ROWS
) -> RoundedInput:
    """`rms_norm` of x into `out`, and what `rounded` makes of that for weights of this dtype."""
    rows, hidden = x.shape
    order = rounding_order(rows, weight_dtype, int8_rows)
    if order is None or out.numel() == 0 or not GROUP <= hidden <= MOST_FEATURES:
        rms_norm(x, weight, eps, out)
        return rounded(out, weight_dtype, int8_rows)
    assert weight.shape == (hidden,) and out.shape == x.shape, (x.shape, weight.shape, out.shape)
    values, strides = quantized_buffers(rows, hidden, order, x.device)
    _rounded_norm_kernel.launch(
        (rows, 1, 1),
        (x, weight, out, *_all_three(values)),
        (eps,),
        (x.stride(0), out.stride(0), *strides),
        _norm_shape(hidden, order),
    )
    return RoundedInput((rows, hidden), values)


def rounded_gated(
    gate_up: Tensor, out: Tensor, activation: str, weight_dtype: str, int8_rows: int = INT8_ROWS
) -> RoundedInput:
    """`silu_mul` or `gelu_mul` (activation) into `out`, and what `rounded` makes of that for weights of this dtype."""
    rows, features = out.shape
    order = rounding_order(rows, weight_dtype, int8_rows)
    if order is None or out.numel() == 0:
        {"silu_mul": silu_mul, "gelu_mul": gelu_mul}[activation](gate_up, out)
        return rounded(out, weight_dtype, int8_rows)
    assert gate_up.shape == (rows, 2 * features) and features % 16 == 0, (gate_up.shape, out.shape)
    values, strides = quantized_buffers(rows, features, order, out.device)
    _rounded_gated_kernel.launch(
        (rows, -(-features // SILU_BLOCK), 1),
        (gate_up, out, *_all_three(values)),
        (features // 16,),
        (gate_up.stride(0), out.stride(0), *strides),
        _gated_shape(activation == "gelu_mul", order),
    )
    return RoundedInput((rows, features), values)


def _all_three(values: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """The tensors of a kernel's rounded result; bf16 has no scales and sums, and what stands for them is not
    touched."""
    return values if len(values) == 3 else (values[0], values[0], values[0])


@functools.cache
def _norm_shape(hidden: int, order: str) -> Shape:
    block = triton.next_power_of_2(hidden)
    return Shape(HIDDEN=hidden, BLOCK=block, ORDER=order, num_warps=norm_warps(block))


@functools.cache
def _gated_shape(gelu: bool, order: str) -> Shape:
    return Shape(BLOCK=SILU_BLOCK, GELU=gelu, ORDER=order, num_warps=4, enable_fp_fusion=False)
