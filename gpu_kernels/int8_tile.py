"""Linear layers of many rows over packed q8 and q4 blocks by int8 tensor cores, with the arithmetic of few rows.

    q4: y = sum over groups of s_x * (s_w * sum a_k n_k + m * sum a_k)        see quantized_linear.py
    q8: y = sum over halves of s_x * s_w * sum a_k w_k

A program computes a tile of rows times features, a group of 64 inputs (q8: half a group) at a time: exact int32 sums,
scaled and added in float32. Weights are unpacked in registers and never leave the multiprocessor, where the dense path
writes them to memory as bf16 and reads them back. What it costs is a conversion and three operations of the CUDA cores
for every sum, so it pays where bf16 products with float32 sums are slow beside int8 ones: a quarter on GeForce, half on
the large GPUs (MMQ of llama.cpp, pull requests 2160 and 7860, made the same choice).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from gpu_kernels.byte_products import high_nibbles, low_nibbles, signed
from gpu_kernels.launching import Kernel, Shape
from gpu_kernels.quantized_linear import Q4_BYTES, Q8_BYTES


@triton.jit
def _loaded(superblock, inside, half, IS_Q4: tl.constexpr, BLOCKS: tl.constexpr):
    """(uint8 [BLOCKS, 8 lines, 16 features, 4], float16 scales and minima [BLOCKS, 16]) of half a superblock of q8 or
    a whole one of q4 at `superblock` [BLOCKS]; q8 has no minima, and its scales stand for them."""
    line = tl.arange(0, 8)[None, :, None, None]
    feature, byte = tl.arange(0, 16)[None, None, :, None], tl.arange(0, 4)
    source = (superblock + 64 + half * 512)[:, None, None, None] + line * 64 + feature * 4 + byte
    packed = tl.load(source, mask=inside[:, None, None, None], other=0)
    header = superblock.to(tl.pointer_type(tl.float16))[:, None] + half * 16 + tl.arange(0, 16)[None, :]
    scale = tl.load(header, mask=inside[:, None], other=0.0)
    minimum = tl.load(header + 16, mask=inside[:, None], other=0.0) if IS_Q4 else scale
    return packed, scale, minimum


@triton.jit
def _features(packed, IS_Q4: tl.constexpr, BLOCKS: tl.constexpr):
    """int8 [BLOCKS * 16, 64, or 32 of q8], the inputs in their own order."""
    if IS_Q4:
        nibbles = tl.join(low_nibbles(packed), high_nibbles(packed))  # (block, line, feature, byte, nibble)
        return nibbles.permute(0, 2, 1, 4, 3).reshape(BLOCKS * 16, 64)
    else:
        return signed(packed).permute(0, 2, 1, 3).reshape(BLOCKS * 16, 32)


@Kernel
@triton.jit(do_not_specialize=["rows", "num_blocks"])
def _int8_tile_kernel(
    weight,
    q,
    scales,
    sums,
    bias,
    out,
    rows,
    num_blocks,
    num_groups,
    block_bytes,
    q_stride,
    scale_stride,
    out_row_stride,
    IS_Q4: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """grid: (cdiv(rows, ROWS), cdiv(num_blocks, BLOCKS)), so that programs side by side share weights. weight: uint8
    [num_blocks, block_bytes]; q: int8 [rows, num_groups * 64], inputs in their own order; scales, sums: [num_groups,
    rows]; out: [rows, num_blocks * 16]."""
    BYTES: tl.constexpr = Q4_BYTES if IS_Q4 else Q8_BYTES
    STEP: tl.constexpr = 64 if IS_Q4 else 32
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    live_row, live = row < rows, block < num_blocks
    blocks = weight + block.to(tl.int64) * block_bytes
    x = q + row.to(tl.int64)[:, None] * q_stride + tl.arange(0, STEP)[None, :]
    acc = tl.zeros([ROWS, BLOCKS * 16], tl.float32)
    packed, scale, minimum = _loaded(blocks, live, 0, IS_Q4, BLOCKS)
    steps = num_groups * (64 // STEP)
    for step in range(steps):
        a = tl.load(x + step * STEP, mask=live_row[:, None], other=0)
        group = step * STEP // 64
        row_scale = tl.load(scales + group * scale_stride + row, mask=live_row, other=0.0)
        b = _features(packed, IS_Q4, BLOCKS)
        column_scale = scale.to(tl.float32).reshape(BLOCKS * 16)
        if IS_Q4:
            row_sum = tl.load(sums + group * scale_stride + row, mask=live_row, other=0.0)
            acc += row_sum[:, None] * minimum.to(tl.float32).reshape(BLOCKS * 16)[None, :]
        following = step + 1  # its weights come while this one multiplies
        superblock = blocks + following * STEP // 64 * BYTES
        half = 0 if IS_Q4 else following % 2
        packed, scale, minimum = _loaded(superblock, live & (following < steps), half, IS_Q4, BLOCKS)
        dots = tl.dot(a, b.T, out_dtype=tl.int32)
        acc += dots.to(tl.float32) * (row_scale[:, None] * column_scale[None, :])
    column = tl.program_id(1) * (BLOCKS * 16) + tl.arange(0, BLOCKS * 16)
    inside = column < num_blocks * 16
    if HAS_BIAS:
        acc += tl.load(bias + column, mask=inside, other=0.0)[None, :]
    target = out + row.to(tl.int64)[:, None] * out_row_stride + column[None, :]
    mask = live_row[:, None] & inside[None, :]
    if ACCUMULATE:
        acc += tl.load(target, mask=mask, other=0.0)
    tl.store(target, acc, mask=mask)


class Int8Tile(NamedTuple):
    """Launch shape: rows and blocks of 16 features of a program, its warps, and groups of inputs under way."""

    rows: int
    blocks: int
    warps: int
    stages: int


TILE = Int8Tile(128, 8, 8, 3)
# With as few features as a key's, or rows as a short prompt's, tiles of a quarter fill the GPU.
SMALL_TILE = Int8Tile(64, 4, 4, 3)
FULL_GPU = 128  # multiprocessors of a large one


def tile_for(rows: int, num_blocks: int) -> Int8Tile:
    """The launch shape for a product of so many rows and blocks."""
    programs = -(-rows // TILE.rows) * -(-num_blocks // TILE.blocks)
    return TILE if programs >= FULL_GPU else SMALL_TILE


def multiply_many_rows(
    quantized: tuple[Tensor, Tensor, Tensor],
    weight: Tensor,
    weight_dtype: str,
    bias: Tensor | None,
    out: Tensor,
    accumulate: bool,
) -> None:
    """Write (or add) the product of an x that `quantize_activation` gave, in the inputs' own order, into `out`."""
    q, scales, sums = quantized
    rows, num_blocks = out.shape[0], weight.shape[0]
    tile = tile_for(rows, num_blocks)
    _int8_tile_kernel.launch(
        (-(-rows // tile.rows), -(-num_blocks // tile.blocks), 1),
        (weight, q, scales, sums, out if bias is None else bias, out),
        (rows, num_blocks),
        (scales.shape[0], weight.stride(0), q.stride(0), scales.stride(0), out.stride(0)),
        _launch_shape(tile, weight_dtype == "q4", bias is not None, accumulate),
    )


@functools.cache
def _launch_shape(tile: Int8Tile, is_q4: bool, has_bias: bool, accumulate: bool) -> Shape:
    return Shape(
        IS_Q4=is_q4,
        ROWS=tile.rows,
        BLOCKS=tile.blocks,
        HAS_BIAS=has_bias,
        ACCUMULATE=accumulate,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
