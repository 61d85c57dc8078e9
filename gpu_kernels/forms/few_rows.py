"""Linears of few rows over coded formats whose codes are whole numbers, read as they lie: exact int8 dot products.

    y = sum over groups of 64 inputs of s_x * sum over lines of 8 inputs of (s_w * sum a_k n_k + m * sum a_k)

A line of code words holds 8 inputs of 16 features, and no scale of any format ends inside of it. So a thread that holds
a line of four features needs nothing of its neighbours: every warp takes its own groups, and sums are added in a fixed
order when all are done. Each row is a program of its own; those of one block follow each other and find its bytes in
the L2 cache.
"""

from __future__ import annotations

import functools

import triton
import triton.language as tl
from torch import Tensor

from gpu_kernels.byte_products import dot4
from gpu_kernels.experts.groups import code_words, table_words
from gpu_kernels.forms.dequantize import scale_and_minimum
from gpu_kernels.forms.unpack import FORMS, GROUP, superblock_bytes
from gpu_kernels.launching import Kernel, Shape
from gpu_kernels.quantized_shapes import gemv_shape


@triton.jit
def group_at(block, group, feature, TOGETHER: tl.constexpr, HEADER_BYTES: tl.constexpr, SUPERBLOCK_BYTES: tl.constexpr):
    """Pointers to the superblock of each group of 64 inputs, and to the int32 of its first line of codes."""
    superblock = block + group // TOGETHER * SUPERBLOCK_BYTES
    codes = superblock + HEADER_BYTES + group % TOGETHER * ((SUPERBLOCK_BYTES - HEADER_BYTES) // TOGETHER)
    return superblock, codes.to(tl.pointer_type(tl.int32)) + feature


@triton.jit
def inputs_of(inputs, group, line, inside):
    """The eight inputs of each line, four in an int32: (low, high)."""
    pair = inputs + group * 16 + line * 2
    return tl.load(pair, mask=inside, other=0), tl.load(pair + 1, mask=inside, other=0)


@triton.jit
def store_block(result, bias, out, HAS_BIAS: tl.constexpr, ACCUMULATE: tl.constexpr):
    """Store or add a row's float32 [16] of the program's block, and the bias. out: of the row."""
    columns = tl.program_id(1) * 16 + tl.arange(0, 16)
    if HAS_BIAS:
        result += tl.load(bias + columns)
    if ACCUMULATE:
        result += tl.load(out + columns)
    tl.store(out + columns, result)


@Kernel
@triton.jit(do_not_specialize=["scale_stride"])
def _form_gemv_kernel(
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
    HAS_MINIMA: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    BITS: tl.constexpr,
    OFFSET: tl.constexpr,
    T0: tl.constexpr,
    T1: tl.constexpr,
    T2: tl.constexpr,
    T3: tl.constexpr,
    TOGETHER: tl.constexpr,
    HEADER_BYTES: tl.constexpr,
    SUPERBLOCK_BYTES: tl.constexpr,
    WARPS: tl.constexpr,
    UNROLL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """grid: (rows, num_blocks). weight: uint8 [num_blocks, block_bytes]; q: int8 [rows, num_groups * 64] in their own
    order; scales: [num_groups, rows]; out: [rows, num_blocks * 16]. WARPS must be num_warps."""
    row = tl.program_id(0).to(tl.int64)
    block = weight + tl.program_id(1).to(tl.int64) * block_bytes
    inputs = (q + row * q_stride).to(tl.pointer_type(tl.int32))
    line, feature = tl.arange(0, 8)[None, :, None], tl.arange(0, 16)[None, None, :]
    products = tl.zeros([WARPS, 8, 16], tl.float32)  # summed over warps and lines once, after the loop
    zero, ones = tl.zeros([WARPS, 8, 16], tl.int32), tl.full([WARPS, 8, 1], 0x01010101, tl.int32)
    for first in range(0, num_groups, WARPS * UNROLL):
        for step in tl.static_range(UNROLL):
            group = (first + step * WARPS + tl.arange(0, WARPS))[:, None, None]
            inside = group < num_groups
            mask = inside & (line >= 0) & (feature >= 0)
            superblock, words = group_at(block, group, feature, TOGETHER, HEADER_BYTES, SUPERBLOCK_BYTES)
            x_low, x_high = inputs_of(inputs, group, line, inside)
            if BITS == 8:
                low = tl.load(words + line * 32, mask=mask, other=0) ^ -2139062144  # 0x80808080: stored code + 128
                high = tl.load(words + line * 32 + 16, mask=mask, other=0) ^ -2139062144
            else:
                low, high = code_words(words, line, mask, BITS, OFFSET, T0, T1, T2, T3)
            wide_low, wide_high = tl.broadcast_to(x_low, [WARPS, 8, 16]), tl.broadcast_to(x_high, [WARPS, 8, 16])
            dots = dot4(high, wide_high, dot4(low, wide_low, zero))
            scale, minimum = scale_and_minimum(superblock, group % TOGETHER, line, feature, mask, HEADER, HAS_ZEROS)
            total = dots.to(tl.float32) * scale
            if HAS_MINIMA:
                x_sum = dot4(ones, x_high, dot4(ones, x_low, tl.zeros([WARPS, 8, 1], tl.int32)))
                total += minimum * x_sum.to(tl.float32)
            products += total * tl.load(scales + group * scale_stride + row, mask=inside, other=0.0)
    store_block(tl.sum(tl.sum(products, axis=1), axis=0), bias, out + row * out_stride, HAS_BIAS, ACCUMULATE)


def multiply_few_rows(
    quantized: tuple[Tensor, ...], weight: Tensor, weight_dtype: str, bias: Tensor | None, out: Tensor, accumulate: bool
) -> None:
    """Write (or add) the product of rows with packed blocks of a format of whole numbers into `out`.

    quantized: what `quantize_activation` makes of the rows in their own order; other arguments as `linear`.
    """
    shape = _shape(weight_dtype, *gemv_shape(weight.shape[0] * out.shape[0]), bias is not None, accumulate)
    launch_rows(_form_gemv_kernel, quantized, weight, bias, out, shape)


def launch_rows(
    kernel: Kernel, quantized: tuple[Tensor, ...], weight: Tensor, bias: Tensor | None, out: Tensor, shape: Shape
) -> None:
    """A program for every row and block."""
    q, scales, _ = quantized
    kernel.launch(
        (out.shape[0], weight.shape[0], 1),
        (weight, q, scales, out if bias is None else bias, out),
        (scales.stride(0),),
        (scales.shape[0], weight.stride(0), q.stride(0), out.stride(0)),
        shape,
    )


@functools.cache
def _shape(weight_dtype: str, warps: int, unroll: int, has_bias: bool, accumulate: bool) -> Shape:
    form = FORMS[weight_dtype]
    words = dict(zip(("T0", "T1", "T2", "T3"), table_words(form.table), strict=True))
    return Shape(
        HEADER=form.header,
        HAS_MINIMA=form.header in ("SM32", "K2M32") or form.has_zero_points,
        HAS_ZEROS=form.has_zero_points,
        BITS=form.bits,
        OFFSET=form.offset,
        **words,
        TOGETHER=form.inputs // GROUP,
        HEADER_BYTES=64 * form.header_lines,
        SUPERBLOCK_BYTES=superblock_bytes(form),
        WARPS=warps,
        UNROLL=unroll,
        HAS_BIAS=has_bias,
        ACCUMULATE=accumulate,
        num_warps=warps,
    )
