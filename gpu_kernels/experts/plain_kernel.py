"""Experts in formats of numbers: rows of float32, float16 or bf16, and codes that stand for numbers, rounded to bf16.

Tiles of an expert's picks times features, gathered by index. float32 and float16 weights meet unrounded inputs.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from cpu_kernels.contract import Picks
from gpu_kernels.activation import round_activation
from gpu_kernels.experts.picks import BLOCKS, most_tiles, picks_of, tile_rows
from gpu_kernels.forms.unpack import FORMS, superblock_bytes
from gpu_kernels.launching import Kernel, Shape
from gpu_kernels.reference import GROUP, PLAIN_DTYPES, block_bytes


@triton.jit
def _rows_of(base, k, inside, live, in_features):
    """[columns, inputs] of row-major weights."""
    return tl.load(base[:, None] + k[None, :], mask=live[:, None] & inside[None, :], other=0.0)


@triton.jit
def _numbers_of(
    superblock, live, IS_E4M3: tl.constexpr, VALUES: tl.constexpr, HEADER_BYTES: tl.constexpr, BLOCKS: tl.constexpr
):
    """bf16 [BLOCKS * 16, 64] of 64 inputs at `superblock` [BLOCKS], the address of their codes less the header."""
    feature, line, byte = tl.arange(0, 16)[None, None, :], tl.arange(0, 8)[None, :, None], tl.arange(0, 8)
    mask = live[:, None, None] & (line >= 0) & (feature >= 0)
    words = (superblock + HEADER_BYTES).to(tl.pointer_type(tl.int32))[:, None, None] + feature
    if IS_E4M3:
        pointers = (words + line * 32)[:, :, :, None] + (byte // 4 * 16)[None, None, None, :]
        code = (tl.load(pointers, mask=mask[:, :, :, None], other=0) >> (byte % 4 * 8)[None, None, None, :]) & 255
        half = (code & 128) << 8 | (code & 127) << 7
        number = half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    else:
        word = tl.load(words + line * 16, mask=mask, other=0)
        code = (word[:, :, :, None] >> (byte % 4 * 8 + byte // 4 * 4)[None, None, None, :]) & 15
        number = tl.full(code.shape, VALUES[0], tl.float32)
        for entry in tl.static_range(1, 16):
            number = tl.where(code == entry, VALUES[entry], number)
    return number.permute(0, 2, 1, 3).reshape(BLOCKS * 16, 64)


@Kernel
@triton.jit(do_not_specialize=["first", "count", "num_blocks", "run", "first_column"])
def _plain_tile_kernel(
    weight,
    x,
    sources,
    starts,
    out,
    first,
    count,
    num_blocks,
    run,
    first_column,
    in_features,
    expert_stride,
    unit_stride,
    block_bytes,
    unit_features,
    x_stride,
    out_stride,
    HAS_SOURCES: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    STEP: tl.constexpr,
    KIND: tl.constexpr,
    VALUES: tl.constexpr,
    TOGETHER: tl.constexpr,
    HEADER_BYTES: tl.constexpr,
    SUPERBLOCK_BYTES: tl.constexpr,
):
    """grid: (most_tiles, cdiv(num_blocks, BLOCKS)). weight: uint8 [count, units, ...]; x: [rows, in_features], bf16
    unless the KIND of weights is "fp32" or "fp16"; out: [picks, features]."""
    expert, place, behind = picks_of(starts, first, count, tl.program_id(0), ROWS, EXPERTS)
    if place >= behind:
        return
    places = place + tl.arange(0, ROWS)
    live_row = places < behind
    row = tl.load(sources + places, mask=live_row, other=0) if HAS_SOURCES else places
    column = tl.arange(0, BLOCKS * 16)
    block, feature = tl.program_id(1) * BLOCKS + column // 16, column % 16
    live = block < num_blocks
    base = weight + expert.to(tl.int64) * expert_stride
    of_column = base + (block // run).to(tl.int64) * unit_stride + block % run * block_bytes
    own = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    of_block = base + (own // run).to(tl.int64) * unit_stride + own % run * block_bytes
    k = tl.arange(0, STEP)
    result = tl.zeros([ROWS, BLOCKS * 16], tl.float32)
    for start in range(0, in_features, STEP):
        inside = start + k < in_features
        a = tl.load(
            x + row.to(tl.int64)[:, None] * x_stride + (start + k)[None, :],
            mask=live_row[:, None] & inside[None, :],
            other=0.0,
        )
        if KIND == "fp32":
            rows = of_column.to(tl.pointer_type(tl.float32)) + feature * in_features
            b = _rows_of(rows, start + k, inside, live, in_features)
        elif KIND == "fp16":
            rows = of_column.to(tl.pointer_type(tl.float16)) + feature * in_features
            b = _rows_of(rows, start + k, inside, live, in_features).to(tl.float32)
        elif KIND == "bf16":
            rows = of_column.to(tl.pointer_type(tl.bfloat16)) + feature * in_features
            b = _rows_of(rows, start + k, inside, live, in_features)
        else:
            group = start // 64
            superblock = group // TOGETHER * SUPERBLOCK_BYTES
            codes = superblock + group % TOGETHER * (SUPERBLOCK_BYTES - HEADER_BYTES) // TOGETHER
            numbers = _numbers_of(of_block + codes, own < num_blocks, KIND == "e4m3", VALUES, HEADER_BYTES, BLOCKS)
            scales = (of_column + superblock).to(tl.pointer_type(tl.float32)) + feature
            if HEADER_BYTES == 128:  # a line of scales for every 32 inputs
                scale = tl.load(scales[:, None] + (k // 32 * 16)[None, :], mask=live[:, None], other=0.0)
            else:
                scale = tl.load(scales, mask=live, other=0.0)[:, None]
            b = (numbers * scale).to(tl.bfloat16)
        result = tl.dot(a, b.T, result, input_precision="ieee")
    to = first_column + block // run * unit_features + block % run * 16 + feature
    target = out + places.to(tl.int64)[:, None] * out_stride + to[None, :]
    tl.store(target, result, mask=live_row[:, None] & live[None, :])


def multiply_plain(
    x: Tensor, picks: Picks, weight: Tensor, weight_dtype: str, run: int, first_column: int, out: Tensor
) -> None:
    """`expert_linear` over one format that is none of WHOLE_FORMS; arguments as those of `multiply_whole`."""
    sources, starts, first, _ = picks
    (num_picks, features), count, num_blocks = out.shape, weight.shape[0], weight.shape[1] * run
    if weight_dtype == "bf16":
        inputs = x.to(torch.bfloat16)
    else:
        inputs = round_activation(x) if weight_dtype in FORMS else x
    rows = tile_rows(num_picks, starts.shape[0] - 1)
    _plain_tile_kernel.launch(
        (most_tiles(num_picks, count, rows), -(-num_blocks // BLOCKS), 1),
        (weight, inputs, starts if sources is None else sources, starts, out),
        (first, count, num_blocks, run, first_column),
        (
            x.shape[1],
            weight.stride(0),
            weight.stride(1),
            block_bytes(weight_dtype, x.shape[1]),
            features // weight.shape[1],
            inputs.stride(0),
            out.stride(0),
        ),
        _shape(weight_dtype, rows, sources is not None, triton.next_power_of_2(starts.shape[0] - 1)),
    )


@functools.cache
def _shape(weight_dtype: str, rows: int, has_sources: bool, experts: int) -> Shape:
    form = None if weight_dtype in PLAIN_DTYPES else FORMS[weight_dtype]
    return Shape(
        HAS_SOURCES=has_sources,
        EXPERTS=experts,
        ROWS=rows,
        BLOCKS=BLOCKS,
        STEP=32 if weight_dtype in ("fp32", "fp16") else GROUP,
        KIND=weight_dtype if form is None else "e4m3" if form.e4m3 else "values",
        VALUES=() if form is None else form.values,
        TOGETHER=1 if form is None else form.inputs // GROUP,
        HEADER_BYTES=0 if form is None else 64 * form.header_lines,
        SUPERBLOCK_BYTES=0 if form is None else superblock_bytes(form),
        num_warps=max(4, rows // 8),
        num_stages=2,
    )
