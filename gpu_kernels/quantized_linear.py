"""Linear layers over the packed q8 and q4 blocks, with the arithmetic of the CPU lane: int8 x int8 dots, exact.

    x_k = a_k * s_x(group of 64)            a = round_half_even(x / s_x), s_x = absmax / 127
    q4: W_k = n_k * s_w + m                 y = sum over groups of s_x * (s_w * sum a_k n_k + m * sum a_k)
    q8: W_k = w_k * s_w                     y = sum over halves of s_x * s_w * sum a_k w_k

The bytes are those the CPU lane reads (layout: cpu_kernels/layout.py): per block of 16 output features, superblocks of
64 inputs. A *span* is 8 lines of 64 bytes, the unit both formats share: 64 inputs of q4, 32 inputs of q8. A line holds
4 bytes of each of the 16 features, so four neighbouring features are one 16-byte load.

Three regimes of rows (FlashDecoding++, arXiv 2311.01282, section 5): one row multiplies with dp4a on the CUDA cores; a
flat tile of up to 64 rows and a full tile beyond use int8 tensor cores. Where the tiles of the output are too few to
fill the GPU, the spans are split over programs too, and the partial sums are added in a fixed order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpu_kernels.reference import GROUP, SUPERBLOCK_BYTES

QUANTIZE_GROUPS = 16
ROUNDING = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and subtracting it rounds a small float32 half to even


@triton.jit
def _quantize_kernel(x, q, scales, sums, in_features, num_groups, x_stride, q_stride, IS_Q4: tl.constexpr,
                     GROUPS: tl.constexpr):
    """grid: (rows, cdiv(num_groups, GROUPS)). x: [rows, in_features]; q: int8 [rows, num_groups * 64]; scales, sums:
    [rows, num_groups], sums = scale * sum of q. For q4 the inputs of a group are stored low nibbles first."""
    row = tl.program_id(0).to(tl.int64)
    groups = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    stored = tl.arange(0, 64)
    source = stored
    if IS_Q4:
        source = stored % 32 // 4 * 8 + stored // 32 * 4 + stored % 4
    columns = groups[:, None] * 64 + source[None, :]
    values = tl.load(x + row * x_stride + columns, mask=columns < in_features, other=0.0)
    scale = tl.div_rn(tl.max(tl.abs(values), axis=1), 127.0)
    steps = tl.div_rn(values, tl.where(scale == 0.0, 1.0, scale)[:, None])
    rounded = tl.minimum(tl.maximum((steps + ROUNDING) - ROUNDING, -127.0), 127.0)
    inside = groups < num_groups
    tl.store(q + row * q_stride + groups[:, None] * 64 + stored[None, :], rounded.to(tl.int8), mask=inside[:, None])
    tl.store(scales + row * num_groups + groups, scale, mask=inside)
    tl.store(sums + row * num_groups + groups, scale * tl.sum(rounded, axis=1), mask=inside)


@triton.jit
def _dot4(a, b, total):
    """total + the dot product of four signed bytes in each int32 of `a` and `b`."""
    return tl.inline_asm_elementwise("dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, total], dtype=tl.int32,
                                     is_pure=True, pack=1)


@triton.jit
def _span_start(span, IS_Q4: tl.constexpr):
    """(byte of the first line, byte of the scales) of a span, from the start of its block."""
    if IS_Q4:
        return span * 576 + 64, span * 576
    return span // 2 * 1088 + 64 + span % 2 * 512, span // 2 * 1088 + span % 2 * 32


@triton.jit
def _gemv_kernel(weight, q, scales, sums, bias, out, num_spans, spans_per_split, block_bytes, out_split_stride,
                 IS_Q4: tl.constexpr, SPANS: tl.constexpr, HAS_BIAS: tl.constexpr, ACCUMULATE: tl.constexpr):
    """grid: (num_blocks, splits). weight: uint8 [num_blocks, block_bytes]; q: int8 [num_groups * 64]; scales, sums:
    [num_groups]; out: [splits, num_blocks * 16]."""
    block = weight + tl.program_id(0).to(tl.int64) * block_bytes
    words = block.to(tl.pointer_type(tl.int32))
    halves = block.to(tl.pointer_type(tl.float16))
    q_words = q.to(tl.pointer_type(tl.int32))
    features = tl.arange(0, 16)
    lines = tl.arange(0, 8)
    low = tl.program_id(1) * spans_per_split
    high = tl.minimum(low + spans_per_split, num_spans)
    products = tl.zeros([SPANS, 8, 16], tl.float32)  # summed over spans and lines once, after the loop
    offsets = tl.zeros([SPANS, 16], tl.float32)
    for first in range(low, high, SPANS):
        spans = first + tl.arange(0, SPANS)
        inside = spans < high
        line_byte, scale_byte = _span_start(spans, IS_Q4)
        word = (line_byte // 4)[:, None, None] + (lines * 16)[None, :, None] + features[None, None, :]
        packed = tl.load(words + word, mask=inside[:, None, None], other=0)
        half = (scale_byte // 2)[:, None] + features[None, :]
        weight_scale = tl.load(halves + half, mask=inside[:, None], other=0.0).to(tl.float32)
        group = spans if IS_Q4 else spans // 2
        row_scale = tl.load(scales + group, mask=inside, other=0.0)
        activation = (spans * (16 if IS_Q4 else 8))[:, None] + lines[None, :]
        first_four = tl.load(q_words + activation, mask=inside[:, None], other=0)[:, :, None]
        zero = tl.zeros([SPANS, 8, 16], tl.int32)
        if IS_Q4:
            last_four = tl.load(q_words + activation + 8, mask=inside[:, None], other=0)[:, :, None]
            dots = _dot4(packed & 0x0F0F0F0F, first_four, zero)
            dots = _dot4((packed >> 4) & 0x0F0F0F0F, last_four, dots)
            minimum = tl.load(halves + half + 16, mask=inside[:, None], other=0.0).to(tl.float32)
            offsets += minimum * tl.load(sums + group, mask=inside, other=0.0)[:, None]
        else:
            dots = _dot4(packed ^ -2139062144, first_four, zero)  # 0x80808080: stored q + 128 becomes signed q
        products += dots.to(tl.float32) * (weight_scale * row_scale[:, None])[:, None, :]
    columns = tl.program_id(0) * 16 + features
    result = tl.sum(tl.sum(products, axis=1) + offsets, axis=0)
    if HAS_BIAS:
        result += tl.load(bias + columns)
    target = out + tl.program_id(1).to(tl.int64) * out_split_stride + columns
    if ACCUMULATE:
        result += tl.load(target)
    tl.store(target, result)


@triton.jit(do_not_specialize=["rows", "num_blocks", "num_spans", "spans_per_split"])
def _gemm_kernel(weight, q, scales, sums, bias, out, rows, num_blocks, num_spans, spans_per_split, block_bytes,
                 num_groups, q_stride, out_split_stride, out_row_stride, IS_Q4: tl.constexpr, SPANS: tl.constexpr,
                 BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_BIAS: tl.constexpr, ACCUMULATE: tl.constexpr):
    """grid: (cdiv(rows, BLOCK_M), cdiv(num_blocks * 16, BLOCK_N), splits). weight: uint8 [num_blocks, block_bytes];
    q: int8 [rows, num_groups * 64]; scales, sums: [rows, num_groups]; out: [splits, rows, num_blocks * 16]."""
    tile_rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    live_rows = tile_rows < rows
    live_columns = columns < num_blocks * 16
    wide_rows = tile_rows.to(tl.int64)
    blocks = weight + (columns // 16).to(tl.int64) * block_bytes
    within = tl.arange(0, 32)  # 8 lines of 4 bytes of one feature
    line_offset = within // 4 * 64 + within % 4
    low = tl.program_id(2) * spans_per_split
    high = tl.minimum(low + spans_per_split, num_spans)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(low, high, SPANS):
        for step in tl.static_range(SPANS):
            span = first + step
            in_rows = live_rows & (span < high)
            in_columns = live_columns & (span < high)
            line_byte, scale_byte = _span_start(span, IS_Q4)
            packed = tl.load(blocks[None, :] + (line_byte + line_offset[:, None] + columns[None, :] % 16 * 4),
                             mask=in_columns[None, :], other=0)
            halves = (blocks + scale_byte).to(tl.pointer_type(tl.float16)) + columns % 16
            weight_scale = tl.load(halves, mask=in_columns, other=0.0).to(tl.float32)
            group = span if IS_Q4 else span // 2
            row_scale = tl.load(scales + wide_rows * num_groups + group, mask=in_rows, other=0.0)
            activation = q + wide_rows[:, None] * q_stride + span * (64 if IS_Q4 else 32) + within[None, :]
            first_half = tl.load(activation, mask=in_rows[:, None], other=0)
            if IS_Q4:
                last_half = tl.load(activation + 32, mask=in_rows[:, None], other=0)
                dots = tl.dot(first_half, (packed & 15).to(tl.int8), out_dtype=tl.int32)
                dots = tl.dot(last_half, (packed >> 4).to(tl.int8), dots, out_dtype=tl.int32)
                minimum = tl.load(halves + 16, mask=in_columns, other=0.0).to(tl.float32)
                row_sum = tl.load(sums + wide_rows * num_groups + group, mask=in_rows, other=0.0)
                acc += row_sum[:, None] * minimum[None, :]
            else:
                dots = tl.dot(first_half, (packed ^ 128).to(tl.int8, bitcast=True), out_dtype=tl.int32)
            acc += dots.to(tl.float32) * (row_scale[:, None] * weight_scale[None, :])
    if HAS_BIAS:
        acc += tl.load(bias + columns, mask=live_columns, other=0.0)[None, :]
    target = out + tl.program_id(2).to(tl.int64) * out_split_stride
    target += wide_rows[:, None] * out_row_stride + columns[None, :]
    live = live_rows[:, None] & live_columns[None, :]
    if ACCUMULATE:
        acc += tl.load(target, mask=live, other=0.0)
    tl.store(target, acc, mask=live)


@triton.jit(do_not_specialize=["num_blocks"])
def _add_splits_kernel(partials, bias, out, num_blocks, split_stride, row_stride, out_row_stride, SPLITS: tl.constexpr,
                       BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr, ACCUMULATE: tl.constexpr):
    """grid: (rows, cdiv(num_blocks * 16, BLOCK)). partials: [SPLITS, rows, num_blocks * 16]; out: [rows, the same]."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns // 16 < num_blocks  # constant over 16 columns, so the loads stay wide
    total = tl.zeros([BLOCK], tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(partials + split * split_stride + row * row_stride + columns, mask=inside, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + columns, mask=inside, other=0.0)
    target = out + row * out_row_stride + columns
    if ACCUMULATE:
        total += tl.load(target, mask=inside, other=0.0)
    tl.store(target, total, mask=inside)


class Tile(NamedTuple):
    """Launch shape of a product: the most rows it serves, rows and features a program, spans a step, warps, stages."""

    max_rows: float
    block_m: int
    block_n: int
    spans: int
    num_warps: int
    num_stages: int


GEMV_SPANS = 16
GEMV_WARPS = 4
# A flat tile is bound by memory, so it is narrow (many programs) and takes four spans a step (loads in flight). A full
# tile is bound by arithmetic, so it reuses each weight for 128 rows. None may spill (tests/gpu/test_aot.py).
TILES = (Tile(16, 16, 32, 4, 4, 3), Tile(32, 32, 32, 4, 4, 3), Tile(64, 64, 64, 2, 4, 3),
         Tile(float("inf"), 128, 64, 1, 8, 3))
TARGET_PROGRAMS = 256  # about two for each of the 132 multiprocessors of the largest target
MAX_SPLITS = 8
MIN_SPANS_PER_SPLIT = 16
ADD_BLOCK = 512


def quantized_linear(x: Tensor, weight: Tensor, weight_dtype: str, bias: Tensor | None, out: Tensor,
                     accumulate: bool) -> None:
    """Write (or add) the product of `x` with packed q8 or q4 blocks into `out`; arguments as `linear`.

    Allocates the int8 copy of x and, where the inputs are split, the partial sums.
    """
    q, scales, sums = quantize_activation(x, weight_dtype)
    num_spans = scales.shape[1] * (1 if weight_dtype == "q4" else 2)
    num_blocks, rows = weight.shape[0], x.shape[0]
    tile = next(tile for tile in TILES if rows <= tile.max_rows)
    grid = (num_blocks,) if rows == 1 else (triton.cdiv(rows, tile.block_m), triton.cdiv(num_blocks * 16, tile.block_n))
    splits, spans_per_split = _split(num_spans, GEMV_SPANS if rows == 1 else tile.spans, grid)
    target = out[None]
    if splits > 1:
        target = torch.empty(splits, rows, out.shape[1], dtype=torch.float32, device=x.device)
    flags = {"HAS_BIAS": bias is not None, "ACCUMULATE": accumulate}
    product_flags = flags if splits == 1 else {"HAS_BIAS": False, "ACCUMULATE": False}
    if rows == 1:
        _gemv_kernel[(*grid, splits)](
            weight, q, scales, sums, bias, target, num_spans, spans_per_split, weight.stride(0), target.stride(0),
            IS_Q4=weight_dtype == "q4", SPANS=GEMV_SPANS, num_warps=GEMV_WARPS, **product_flags)
    else:
        _gemm_kernel[(*grid, splits)](
            weight, q, scales, sums, bias, target, rows, num_blocks, num_spans, spans_per_split, weight.stride(0),
            scales.shape[1], q.stride(0), *target.stride()[:2], IS_Q4=weight_dtype == "q4", SPANS=tile.spans,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, num_warps=tile.num_warps, num_stages=tile.num_stages,
            **product_flags)
    if splits > 1:
        _add_splits_kernel[(rows, triton.cdiv(out.shape[1], ADD_BLOCK))](
            target, bias, out, num_blocks, *target.stride()[:2], out.stride(0), SPLITS=splits, BLOCK=ADD_BLOCK,
            num_warps=4, **flags)


def quantize_activation(x: Tensor, weight_dtype: str) -> tuple[Tensor, Tensor, Tensor]:
    """(int8 [rows, groups * 64], scale f32 [rows, groups], scale * sum of the int8 f32 [rows, groups]) of x.

    For q4 the inputs of a group are in the order in which the packed lines hold them: 32 of low nibbles, 32 of high.
    """
    rows, in_features = x.shape
    num_groups = triton.cdiv(in_features, GROUP)
    q = torch.empty(rows, num_groups * GROUP, dtype=torch.int8, device=x.device)
    scales, sums = torch.empty(2, rows, num_groups, dtype=torch.float32, device=x.device)
    _quantize_kernel[(rows, triton.cdiv(num_groups, QUANTIZE_GROUPS))](
        x, q, scales, sums, in_features, num_groups, x.stride(0), q.stride(0), IS_Q4=weight_dtype == "q4",
        GROUPS=QUANTIZE_GROUPS, num_warps=4)
    return q, scales, sums


def check_blocks(weight: Tensor, weight_dtype: str, in_features: int) -> None:
    """Assert that the blocks have the bytes that q8 or q4 blocks of `in_features` have."""
    block_bytes = triton.cdiv(in_features, GROUP) * SUPERBLOCK_BYTES[weight_dtype]
    assert weight.shape[1] == block_bytes, (weight_dtype, in_features, weight.shape, block_bytes)


def _split(num_spans: int, step: int, grid: tuple[int, ...]) -> tuple[int, int]:
    """(splits, spans of each) so that about TARGET_PROGRAMS run; every split is whole steps and none is empty."""
    programs = grid[0] * (grid[1] if len(grid) > 1 else 1)
    wanted = min(MAX_SPLITS, triton.cdiv(TARGET_PROGRAMS, programs), max(1, num_spans // MIN_SPANS_PER_SPLIT))
    spans = triton.cdiv(triton.cdiv(num_spans, wanted), step) * step
    return triton.cdiv(num_spans, spans), spans
