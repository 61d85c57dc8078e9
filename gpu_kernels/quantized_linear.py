"""Linear layers of few rows over packed q8 and q4 blocks, with the arithmetic of the CPU lane: exact int8 x int8 dots.

    x_k = a_k * s_x(group of 64)            see activation.py
    q4: W_k = n_k * s_w + m                 y = sum over groups of s_x * (s_w * sum a_k n_k + m * sum a_k)
    q8: W_k = w_k * s_w                     y = sum over halves of s_x * s_w * sum a_k w_k

The bytes are those the CPU lane reads (layout: cpu_kernels/formats/weights.py): per block of 16 output features,
superblocks of 64 inputs. A line of 64 bytes holds 4 bytes of each of the 16 features, so four neighbouring features are
one 16-byte load. One row multiplies with dp4a on the CUDA cores, more rows with int8 tensor cores.

Every warp takes its own superblocks and keeps its own sums, added in a fixed order when all are done. Dimensions are
ordered so that what a thread loads is what it multiplies: no step of the loops exchanges data between threads, so no
warp waits for another while loads are in flight (tests/gpu_kernels/compiled/test_aot.py).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gpu_kernels.activation import quantize_activation
from gpu_kernels.byte_products import dot4, high_nibbles, low_nibbles, signed
from gpu_kernels.launching import Kernel
from gpu_kernels.quantized_shapes import flat_launch, gemv_launch, gemv_shape, tile_for
from gpu_kernels.reference import SUPERBLOCK_BYTES

Q4_BYTES = tl.constexpr(SUPERBLOCK_BYTES["q4"])
Q8_BYTES = tl.constexpr(SUPERBLOCK_BYTES["q8"])


@Kernel
@triton.jit
def _gemv_kernel(
    weight,
    q,
    scales,
    sums,
    bias,
    out,
    num_groups,
    block_bytes,
    IS_Q4: tl.constexpr,
    WARPS: tl.constexpr,
    UNROLL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """grid: (num_blocks,). weight: uint8 [num_blocks, block_bytes]; q: int8 [num_groups * 64]; scales, sums:
    [num_groups]; out: [num_blocks * 16]. WARPS must be num_warps."""
    BYTES: tl.constexpr = Q4_BYTES if IS_Q4 else Q8_BYTES
    block = weight + tl.program_id(0).to(tl.int64) * block_bytes
    features, lines = tl.arange(0, 16), tl.arange(0, 8)
    word_of_line = lines[:, None] * 16 + features[None, :]
    products = tl.zeros([WARPS, 8, 16], tl.float32)  # summed over warps and lines once, after the loop
    offsets = tl.zeros([WARPS, 16], tl.float32)
    zero = tl.zeros([WARPS, 8, 16], tl.int32)
    for first in range(0, num_groups, WARPS * UNROLL):
        for step in tl.static_range(UNROLL):
            group = first + step * WARPS + tl.arange(0, WARPS)
            inside = group < num_groups
            words = block.to(tl.pointer_type(tl.int32)) + (group * (BYTES // 4) + 16)[:, None, None] + word_of_line
            halves = block.to(tl.pointer_type(tl.float16)) + (group * (BYTES // 2))[:, None] + features[None, :]
            row_scale = tl.load(scales + group, mask=inside, other=0.0)
            inputs = q.to(tl.pointer_type(tl.int32)) + group[:, None] * 16 + (lines % 4 * 4 + lines // 4)[None, :]
            first_half = tl.load(inputs, mask=inside[:, None], other=0)[:, :, None]
            last_half = tl.load(inputs + 2, mask=inside[:, None], other=0)[:, :, None]
            packed = tl.load(words, mask=inside[:, None, None], other=0, eviction_policy="evict_first")
            scale = tl.load(halves, mask=inside[:, None], other=0.0).to(tl.float32)
            other = tl.load(halves + 16, mask=inside[:, None], other=0.0).to(tl.float32)
            if IS_Q4:
                dots = dot4(packed & 0x0F0F0F0F, first_half, zero)
                dots = dot4((packed >> 4) & 0x0F0F0F0F, last_half, dots)
                offsets += other * tl.load(sums + group, mask=inside, other=0.0)[:, None]
            else:
                dots = dot4(packed ^ -2139062144, first_half, zero)  # 0x80808080: stored q + 128 becomes signed q
                packed = tl.load(words + 128, mask=inside[:, None, None], other=0, eviction_policy="evict_first")
                last_dots = dot4(packed ^ -2139062144, last_half, zero)
                products += last_dots.to(tl.float32) * (other * row_scale[:, None])[:, None, :]
            products += dots.to(tl.float32) * (scale * row_scale[:, None])[:, None, :]
    columns = tl.program_id(0) * 16 + features
    result = tl.sum(tl.sum(products, axis=1) + offsets, axis=0)
    if HAS_BIAS:
        result += tl.load(bias + columns)
    if ACCUMULATE:
        result += tl.load(out + columns)
    tl.store(out + columns, result)


@triton.jit
def _half(words, index: tl.constexpr):
    """One of the four float16 in each int64."""
    return ((words >> (16 * index)) & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def _feature_values(pointers, inside, WARPS: tl.constexpr):
    """float32 [WARPS, 32], in the order of `_flat_kernel`, of int64 pointers [8 quads, WARPS] to four float16 each."""
    words = tl.trans(tl.load(pointers, mask=inside, other=0))
    values = tl.join(tl.join(_half(words, 0), _half(words, 2)), tl.join(_half(words, 1), _half(words, 3)))
    return values.permute(0, 2, 3, 1).reshape(WARPS, 32).to(tl.float32)


@triton.jit
def _row_values(pointers, inside, first, rows, ROWS: tl.constexpr, WARPS: tl.constexpr):
    """float32 [WARPS, ROWS] at `pointers` [WARPS] + row, zero past the last row. Triton loads a tensor with fewer
    elements than threads where it is used; a larger one would be loaded once and exchanged through shared memory."""
    if ROWS <= 16:
        row = first + tl.arange(0, ROWS)
        return tl.load(pointers[:, None] + row[None, :], mask=inside[:, None] & (row < rows)[None, :], other=0.0)
    else:
        low = _row_values(pointers, inside, first, rows, ROWS // 2, WARPS)
        high = _row_values(pointers, inside, first + ROWS // 2, rows, ROWS // 2, WARPS)
        return tl.join(low, high).permute(0, 2, 1).reshape(WARPS, ROWS)


@Kernel
@triton.jit(do_not_specialize=["rows", "num_blocks"])
def _flat_kernel(
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
    TILES: tl.constexpr,
    PARTS: tl.constexpr,
    UNROLL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """grid: (cdiv(rows, ROWS), cdiv(num_blocks, 2 * TILES)). weight: uint8 [num_blocks, block_bytes]; q: int8 [rows,
    num_groups * 64]; scales, sums: [num_groups, rows]; out: [rows, num_blocks * 16]. TILES * PARTS must be num_warps.

    A warp multiplies a tile of 32 features with ROWS rows, as one matrix of a batch, over every PARTS-th group. The
    features of a tile are ordered (feature of a quad, quad), and inputs as `quantize_activation` stores them, so that
    16 loaded bytes are fragments of the tensor cores: quad and row are lanes // 4, lines and quarters lanes % 4.
    """
    WARPS: tl.constexpr = TILES * PARTS
    BYTES: tl.constexpr = Q4_BYTES if IS_Q4 else Q8_BYTES
    first_row = tl.program_id(0) * ROWS
    warp, quad, quarter, byte = tl.arange(0, WARPS), tl.arange(0, 8), tl.arange(0, 4), tl.arange(0, 16)
    block = (tl.program_id(1) * TILES + warp // PARTS)[None, :] * 2 + quad[:, None] // 4
    live = block < num_blocks
    blocks = weight + block.to(tl.int64) * block_bytes  # (quad, warp)
    line = (quarter[:, None] + tl.arange(0, 2)[None, :] * 4)[:, None, None, :, None]
    row = first_row + quad[:, None] + tl.arange(0, ROWS // 8)[None, :] * 8
    row_q = (q + row.to(tl.int64) * q_stride)[None, :, None, :, None] + quarter[:, None, None, None, None] * 16
    live_row = (row < rows)[None, :, None, :, None]
    acc = tl.zeros([WARPS, 32, ROWS], tl.float32)
    for first in range(0, num_groups, PARTS * UNROLL):
        for step in tl.static_range(UNROLL):
            group = first + step * PARTS + warp % PARTS
            inside = group < num_groups
            stored = live & inside[None, :]
            superblock = blocks + (group * BYTES)[None, :]  # (quad, warp)
            lines = (superblock + (quad % 4 * 16)[:, None] + 64)[None, :, :, None, None] + line * 64 + byte
            line_mask = stored[None, :, :, None, None]
            header = (superblock + (quad % 4 * 8)[:, None]).to(tl.pointer_type(tl.int64))
            inputs = row_q + (group * 64)[None, None, :, None, None]  # (quarter, row % 8, warp, row // 8, byte)
            input_mask = live_row & inside[None, None, :, None, None]
            row_scale = _row_values(scales + group * scale_stride, inside, first_row, rows, ROWS, WARPS)
            if IS_Q4:
                packed = tl.load(lines, mask=line_mask, other=0)
                a = tl.join(low_nibbles(packed), high_nibbles(packed)).reshape(4, 8, WARPS, 2, 4, 4, 2)
                a = a.permute(2, 4, 1, 6, 0, 3, 5).reshape(WARPS, 32, 64)
                x = tl.load(inputs + byte, mask=input_mask, other=0).reshape(4, 8, WARPS, ROWS // 8, 2, 2, 4)
                x = x.permute(2, 4, 0, 5, 6, 3, 1).reshape(WARPS, 64, ROWS)
                minimum = _feature_values(header + 4, stored, WARPS)
                row_sum = _row_values(sums + group * scale_stride, inside, first_row, rows, ROWS, WARPS)
                acc += minimum[:, :, None] * row_sum[:, None, :]
                scale = _feature_values(header, stored, WARPS)
                acc += tl.dot(a, x, out_dtype=tl.int32).to(tl.float32) * (scale[:, :, None] * row_scale[:, None, :])
            else:
                for half in tl.static_range(2):
                    packed = tl.load(lines + half * 512, mask=line_mask, other=0)
                    a = signed(packed).reshape(4, 8, WARPS, 2, 4, 4).permute(2, 4, 1, 3, 0, 5).reshape(WARPS, 32, 32)
                    x = tl.load(inputs + half * 8 + tl.arange(0, 8), mask=input_mask, other=0)
                    x = x.reshape(4, 8, WARPS, ROWS // 8, 2, 4).permute(2, 4, 0, 5, 3, 1).reshape(WARPS, 32, ROWS)
                    scale = _feature_values(header + half * 4, stored, WARPS)
                    acc += tl.dot(a, x, out_dtype=tl.int32).to(tl.float32) * (scale[:, :, None] * row_scale[:, None, :])
    total = tl.sum(acc.reshape(TILES, PARTS, 4, 8, ROWS), axis=1)
    tile = tl.program_id(1) * TILES + tl.arange(0, TILES)
    column = tile[:, None, None] * 32 + quad[None, None, :] * 4 + quarter[None, :, None]
    inside = column < num_blocks * 16
    if HAS_BIAS:
        total += tl.load(bias + column, mask=inside, other=0.0)[:, :, :, None]
    rows_of_tile = first_row + tl.arange(0, ROWS)
    target = out + rows_of_tile.to(tl.int64) * out_row_stride + column[:, :, :, None]
    mask = inside[:, :, :, None] & (rows_of_tile < rows)
    if ACCUMULATE:
        total += tl.load(target, mask=mask, other=0.0)
    tl.store(target, total, mask=mask)


def quantized_linear(
    x: Tensor, weight: Tensor, weight_dtype: str, bias: Tensor | None, out: Tensor, accumulate: bool
) -> None:
    """Write (or add) the product of `x` with packed q8 or q4 blocks into `out`; arguments as `linear`.

    Allocates the int8 copy of x.
    """
    multiply_quantized(quantize_activation(x, weight_dtype), weight, weight_dtype, bias, out, accumulate)


def multiply_quantized(
    quantized: tuple[Tensor, ...], weight: Tensor, weight_dtype: str, bias: Tensor | None, out: Tensor, accumulate: bool
) -> None:
    """The same for an x that `quantize_activation` gave."""
    launch = _launch_gemv if out.shape[0] == 1 else _launch_flat
    launch(weight, *quantized, bias, out, (weight_dtype == "q4", bias is not None, accumulate))


def _launch_gemv(
    weight: Tensor,
    q: Tensor,
    scales: Tensor,
    sums: Tensor,
    bias: Tensor | None,
    out: Tensor,
    flags: tuple[bool, bool, bool],
) -> None:
    shape = gemv_launch(gemv_shape(weight.shape[0]), *flags)
    _gemv_kernel.launch(
        (weight.shape[0], 1, 1),
        (weight, q, scales, sums, out if bias is None else bias, out),
        (),
        (scales.shape[0], weight.stride(0)),
        shape,
    )


def _launch_flat(
    weight: Tensor,
    q: Tensor,
    scales: Tensor,
    sums: Tensor,
    bias: Tensor | None,
    out: Tensor,
    flags: tuple[bool, bool, bool],
) -> None:
    rows, num_blocks = out.shape[0], weight.shape[0]
    tile = tile_for(rows, num_blocks)
    _flat_kernel.launch(
        (-(-rows // tile.rows), -(-num_blocks // (2 * tile.tiles)), 1),
        (weight, q, scales, sums, out if bias is None else bias, out),
        (rows, num_blocks),
        (scales.shape[0], weight.stride(0), q.stride(0), scales.stride(0), out.stride(0)),
        flat_launch(tile, *flags),
    )
