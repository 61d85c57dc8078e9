"""Linears of few rows over formats whose codes stand for float32 numbers (FP8, NF4), and over rows of float16.

    y = sum over groups of 64 inputs of s_x * sum over lines of 8 inputs of s_w * sum a_k n_k

Lines lie over threads as in few_rows.py, and the inputs are the same int8; products are float32, for numbers of a table
have no whole ones. float16 rows meet unrounded inputs: what a thread reads of a row it multiplies, and adds at the end.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpu_kernels.forms.dequantize import scale_and_minimum
from gpu_kernels.forms.few_rows import group_at, inputs_of, launch_rows, store_block
from gpu_kernels.forms.unpack import FORMS, GROUP, superblock_bytes
from gpu_kernels.launching import Kernel, Shape
from gpu_kernels.quantized_shapes import gemv_shape

UNROLL = 2  # superblocks of FP8 or NF4 a warp has in flight
# Pairs of inputs of 16 rows of float16 at once, and such steps in flight. No more inputs than a program has threads are
# loaded where they are used; more Triton would load once and exchange through shared memory.
HALF_PAIRS, HALF_UNROLL = 64, 4


@triton.jit
def _signed_byte(words, index: tl.constexpr):
    """float32 of byte `index` of each int32."""
    return ((words << (24 - 8 * index)) >> 24).to(tl.float32)


@triton.jit
def _entry(code, VALUES: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """VALUES[FIRST + code modulo COUNT]: halves of the table are chosen by a bit each."""
    if COUNT == 1:
        return tl.full(code.shape, VALUES[FIRST], tl.float32)
    else:
        HALF: tl.constexpr = COUNT // 2
        upper = _entry(code, VALUES, FIRST + HALF, HALF)
        return tl.where((code & HALF) != 0, upper, _entry(code, VALUES, FIRST, HALF))


@triton.jit
def _number(words, shift: tl.constexpr, IS_E4M3: tl.constexpr, VALUES: tl.constexpr):
    """float32 of the code `shift` bits up in each int32; of E4M3 a 256th of it."""
    if IS_E4M3:
        code = words >> shift
        return ((code & 128) << 8 | (code & 127) << 7).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return _entry(words >> shift, VALUES, 0, 16)


@Kernel
@triton.jit(do_not_specialize=["scale_stride"])
def _number_gemv_kernel(
    weight,
    q,
    scales,
    bias,
    out,
    scale_stride,
    num_groups,
    block_bytes,
    q_stride,
    out_stride,
    HEADER: tl.constexpr,
    IS_E4M3: tl.constexpr,
    VALUES: tl.constexpr,
    TOGETHER: tl.constexpr,
    HEADER_BYTES: tl.constexpr,
    SUPERBLOCK_BYTES: tl.constexpr,
    WARPS: tl.constexpr,
    UNROLL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """grid: (rows, num_blocks); arguments as those of few_rows.py's kernel."""
    row = tl.program_id(0).to(tl.int64)
    block = weight + tl.program_id(1).to(tl.int64) * block_bytes
    inputs = (q + row * q_stride).to(tl.pointer_type(tl.int32))
    line, feature = tl.arange(0, 8)[None, :, None], tl.arange(0, 16)[None, None, :]
    products = tl.zeros([WARPS, 8, 16], tl.float32)  # summed over warps and lines once, after the loop
    for first in range(0, num_groups, WARPS * UNROLL):
        for step in tl.static_range(UNROLL):
            group = (first + step * WARPS + tl.arange(0, WARPS))[:, None, None]
            inside = group < num_groups
            mask = inside & (line >= 0) & (feature >= 0)
            superblock, words = group_at(block, group, feature, TOGETHER, HEADER_BYTES, SUPERBLOCK_BYTES)
            x_low, x_high = inputs_of(inputs, group, line, inside)
            low = tl.load(words + line * (32 if IS_E4M3 else 16), mask=mask, other=0)
            high = tl.load(words + line * 32 + 16, mask=mask, other=0) if IS_E4M3 else low >> 4
            total = tl.zeros([WARPS, 8, 16], tl.float32)
            for index in tl.static_range(4):
                total += _number(low, 8 * index, IS_E4M3, VALUES) * _signed_byte(x_low, index)
                total += _number(high, 8 * index, IS_E4M3, VALUES) * _signed_byte(x_high, index)
            scale, _ = scale_and_minimum(superblock, group % TOGETHER, line, feature, mask, HEADER, False)
            products += total * (scale * tl.load(scales + group * scale_stride + row, mask=inside, other=0.0))
    result = tl.sum(tl.sum(products, axis=1), axis=0) * (256.0 if IS_E4M3 else 1.0)
    store_block(result, bias, out + row * out_stride, HAS_BIAS, ACCUMULATE)


@Kernel
@triton.jit
def _half_gemv_kernel(
    weight,
    x,
    bias,
    out,
    in_features,
    x_stride,
    out_stride,
    PAIRS: tl.constexpr,
    UNROLL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """grid: (rows, num_blocks). weight: float16 [num_blocks * 16, in_features], as int32; x: float32 [rows,
    in_features]. in_features must be even."""
    row = tl.program_id(0).to(tl.int64)
    columns, pair = tl.program_id(1) * 16 + tl.arange(0, 16), tl.arange(0, PAIRS)
    rows = weight + columns.to(tl.int64)[:, None] * (in_features // 2)
    products = tl.zeros([16, PAIRS], tl.float32)
    for start in range(0, in_features // 2, PAIRS * UNROLL):
        for step in tl.static_range(UNROLL):
            at = (start + step * PAIRS + pair)[None, :]
            inside = at < in_features // 2
            words = tl.load(rows + at, mask=inside, other=0)
            inputs = x + row * x_stride + at * 2
            first, second = tl.load(inputs, mask=inside, other=0.0), tl.load(inputs + 1, mask=inside, other=0.0)
            products += words.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * first
            products += (words >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * second
    store_block(tl.sum(products, axis=1), bias, out + row * out_stride, HAS_BIAS, ACCUMULATE)


def multiply_few_number_rows(
    quantized: tuple[Tensor, ...], weight: Tensor, weight_dtype: str, bias: Tensor | None, out: Tensor, accumulate: bool
) -> None:
    """Write (or add) the product of rows with packed blocks of FP8 or NF4 into `out`; as `multiply_few_rows`."""
    warps = gemv_shape(weight.shape[0] * out.shape[0]).warps
    shape = _shape(weight_dtype, warps, bias is not None, accumulate)
    launch_rows(_number_gemv_kernel, quantized, weight, bias, out, shape)


def multiply_few_half_rows(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, accumulate: bool) -> None:
    """The same of float32 x [rows, in_features] with blocks of float16 rows, which nothing is rounded for."""
    _half_gemv_kernel.launch(
        (out.shape[0], weight.shape[0], 1),
        (weight.view(torch.int32), x, out if bias is None else bias, out),
        (),
        (x.shape[1], x.stride(0), out.stride(0)),
        _half_shape(bias is not None, accumulate),
    )


@functools.cache
def _shape(weight_dtype: str, warps: int, has_bias: bool, accumulate: bool) -> Shape:
    form = FORMS[weight_dtype]
    return Shape(
        HEADER=form.header,
        IS_E4M3=form.e4m3,
        VALUES=form.values,
        TOGETHER=form.inputs // GROUP,
        HEADER_BYTES=64 * form.header_lines,
        SUPERBLOCK_BYTES=superblock_bytes(form),
        WARPS=warps,
        UNROLL=UNROLL,
        HAS_BIAS=has_bias,
        ACCUMULATE=accumulate,
        num_warps=warps,
    )


@functools.cache
def _half_shape(has_bias: bool, accumulate: bool) -> Shape:
    return Shape(PAIRS=HALF_PAIRS, UNROLL=HALF_UNROLL, HAS_BIAS=has_bias, ACCUMULATE=accumulate, num_warps=4)
