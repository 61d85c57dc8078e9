"""Experts in whole-number formats: int8 activations times packed codes, bit for bit what `ordered` says.

A result is one chain of float32 operations over its groups of 64 inputs, so programs share no sum. One pick an expert
multiplies with dp4a, a warp a block of 16 features, its lines of codes over the lanes; more picks are tiles that int8
tensor cores multiply, gathered from the rounded rows by index.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from cpu_kernels.contract import Picks
from gpu_kernels.activation import quantize_activation
from gpu_kernels.experts.groups import add_group, code_words
from gpu_kernels.experts.picks import BLOCKS, FEW_ROWS, most_tiles, picks_of, tile_rows
from gpu_kernels.experts.whole_parts import pick_products, tile_products
from gpu_kernels.experts.whole_shapes import shape_of
from gpu_kernels.launching import Kernel
from gpu_kernels.reference import block_bytes

_UNSPECIALISED = ["first", "count", "num_blocks", "run", "first_column"]


@Kernel
@triton.jit(do_not_specialize=_UNSPECIALISED)
def _pick_kernel(
    weight,
    q,
    scales,
    sums,
    sources,
    starts,
    out,
    first,
    count,
    num_blocks,
    run,
    first_column,
    num_groups,
    expert_stride,
    unit_stride,
    block_bytes,
    unit_features,
    q_stride,
    scale_stride,
    out_stride,
    HAS_SOURCES: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCKS: tl.constexpr,
    UNROLL: tl.constexpr,
    HEADER: tl.constexpr,
    RUNS: tl.constexpr,
    TAKES_SUMS: tl.constexpr,
    BITS: tl.constexpr,
    OFFSET: tl.constexpr,
    TOGETHER: tl.constexpr,
    HEADER_BYTES: tl.constexpr,
    SUPERBLOCK_BYTES: tl.constexpr,
    T0: tl.constexpr,
    T1: tl.constexpr,
    T2: tl.constexpr,
    T3: tl.constexpr,
):
    """grid: (picks, cdiv(num_blocks, BLOCKS)). weight: uint8 [count, units, ...]; q: int8 [rows, num_groups * 64];
    scales, sums: [num_groups, rows]; out: [picks, features]. BLOCKS must be num_warps."""
    expert, place, behind = picks_of(starts, first, count, tl.program_id(0), 1, EXPERTS)
    if place >= behind:
        return
    row = tl.load(sources + place) if HAS_SOURCES else place
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    live, line, feature = block < num_blocks, tl.arange(0, 8), tl.arange(0, 16)
    base = weight + expert.to(tl.int64) * expert_stride
    base = base + (block // run).to(tl.int64) * unit_stride + block % run * block_bytes
    inputs = (q + row.to(tl.int64) * q_stride).to(tl.pointer_type(tl.int32))
    result = tl.zeros([BLOCKS, 16], tl.float32)
    mask, words_mask = live[:, None] & (feature >= 0)[None, :], live[:, None, None] & (line >= 0)[None, :, None]
    for group in tl.range(0, num_groups, loop_unroll_factor=UNROLL):
        superblock = base + group // TOGETHER * SUPERBLOCK_BYTES
        codes = superblock + HEADER_BYTES + group % TOGETHER * (SUPERBLOCK_BYTES - HEADER_BYTES) // TOGETHER
        codes = codes.to(tl.pointer_type(tl.int32))[:, None, None] + feature[None, None, :]
        low, high = code_words(codes, line[None, :, None], words_mask, BITS, OFFSET, T0, T1, T2, T3)
        d0, d1, d2, d3, x0, x1 = pick_products(inputs + group * 16, low, high, line, BLOCKS, RUNS, TAKES_SUMS, BITS)
        factor, x_sum = tl.load(scales + group * scale_stride + row), tl.load(sums + group * scale_stride + row)
        result = add_group(
            result,
            d0,
            d1,
            d2,
            d3,
            x0,
            x1,
            factor,
            x_sum,
            superblock[:, None],
            feature[None, :],
            mask,
            group % TOGETHER,
            HEADER,
            TOGETHER,
        )
    column = first_column + block // run * unit_features + block % run * 16
    tl.store(out + place.to(tl.int64) * out_stride + column[:, None] + feature[None, :], result, mask=mask)


@Kernel
@triton.jit(do_not_specialize=_UNSPECIALISED)
def _tile_kernel(
    weight,
    q,
    scales,
    sums,
    sources,
    starts,
    out,
    first,
    count,
    num_blocks,
    run,
    first_column,
    num_groups,
    expert_stride,
    unit_stride,
    block_bytes,
    unit_features,
    q_stride,
    scale_stride,
    out_stride,
    HAS_SOURCES: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    HEADER: tl.constexpr,
    RUNS: tl.constexpr,
    TAKES_SUMS: tl.constexpr,
    BITS: tl.constexpr,
    OFFSET: tl.constexpr,
    TOGETHER: tl.constexpr,
    HEADER_BYTES: tl.constexpr,
    SUPERBLOCK_BYTES: tl.constexpr,
    T0: tl.constexpr,
    T1: tl.constexpr,
    T2: tl.constexpr,
    T3: tl.constexpr,
):
    """grid: (most_tiles, cdiv(num_blocks, BLOCKS)); arguments as those of `_pick_kernel`."""
    expert, place, behind = picks_of(starts, first, count, tl.program_id(0), ROWS, EXPERTS)
    if place >= behind:
        return
    places = place + tl.arange(0, ROWS)
    live_row = places < behind
    row = tl.load(sources + places, mask=live_row, other=0) if HAS_SOURCES else tl.where(live_row, places, place)
    column = tl.arange(0, BLOCKS * 16)
    block, feature = tl.program_id(1) * BLOCKS + column // 16, column % 16
    live = block < num_blocks
    base = weight + expert.to(tl.int64) * expert_stride
    of_column = base + (block // run).to(tl.int64) * unit_stride + block % run * block_bytes
    own = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    of_block = base + (own // run).to(tl.int64) * unit_stride + own % run * block_bytes
    x = q + row.to(tl.int64)[:, None] * q_stride
    result = tl.zeros([ROWS, BLOCKS * 16], tl.float32)
    for group in range(num_groups):
        superblock = group // TOGETHER * SUPERBLOCK_BYTES
        codes = of_block + superblock + HEADER_BYTES + group % TOGETHER * (SUPERBLOCK_BYTES - HEADER_BYTES) // TOGETHER
        codes = codes.to(tl.pointer_type(tl.int32))[:, None, None] + tl.arange(0, 16)[None, None, :]
        d0, d1, d2, d3, x0, x1 = tile_products(
            codes, x, group * 64, own < num_blocks, ROWS, BLOCKS, RUNS, TAKES_SUMS, BITS, OFFSET, T0, T1, T2, T3
        )
        factor = tl.load(scales + group * scale_stride + row)[:, None]
        x_sum = tl.load(sums + group * scale_stride + row)[:, None]
        result = add_group(
            result,
            d0,
            d1,
            d2,
            d3,
            x0,
            x1,
            factor,
            x_sum,
            (of_column + superblock)[None, :],
            feature[None, :],
            live[None, :],
            group % TOGETHER,
            HEADER,
            TOGETHER,
        )
    to = first_column + block // run * unit_features + block % run * 16 + feature
    target = out + places.to(tl.int64)[:, None] * out_stride + to[None, :]
    tl.store(target, result, mask=live_row[:, None] & live[None, :])


def multiply_whole(
    x: Tensor, picks: Picks, weight: Tensor, weight_dtype: str, run: int, first_column: int, out: Tensor
) -> None:
    """`expert_linear` over one format of WHOLE_FORMS.

    weight: uint8 [experts, units, ...], from the first byte of that format on. run: blocks of it in a unit, whose
    outputs begin at first_column of the unit's.
    """
    sources, starts, first, _ = picks
    (num_picks, features), count = out.shape, weight.shape[0]
    q, scales, sums = quantize_activation(x, "own")
    rows = 1 if x.shape[0] == 1 or num_picks <= FEW_ROWS else tile_rows(num_picks, starts.shape[0] - 1)
    num_blocks = weight.shape[1] * run
    shape = shape_of(weight_dtype, rows, sources is not None, triton.next_power_of_2(starts.shape[0] - 1))
    (_pick_kernel if rows == 1 else _tile_kernel).launch(
        (most_tiles(num_picks, count, rows), -(-num_blocks // BLOCKS), 1),
        (weight, q, scales, sums, starts if sources is None else sources, starts, out),
        (first, count, num_blocks, run, first_column),
        (
            scales.shape[0],
            weight.stride(0),
            weight.stride(1),
            block_bytes(weight_dtype, x.shape[1]),
            features // weight.shape[1],
            q.stride(0),
            scales.stride(0),
            out.stride(0),
        ),
        shape,
    )
