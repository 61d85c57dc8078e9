"""Parts of the kernels of whole_kernel.py: sums and products of runs of inputs, and codes in the order of inputs."""

from __future__ import annotations

import triton
import triton.language as tl

from gpu_kernels.byte_products import dot4
from gpu_kernels.experts.groups import code_words


@triton.jit
def run_sum(values, line, RUN: tl.constexpr, LINES: tl.constexpr):
    """int32 [blocks, features] or [1, 1]: the sum over the lines of one run of [blocks, lines, features]."""
    return tl.sum(tl.where(line[None, :, None] // LINES == RUN, values, 0), axis=1)


@triton.jit
def as_inputs(low, high, BITS: tl.constexpr, BLOCKS: tl.constexpr, LINES: tl.constexpr):
    """int8 [BLOCKS * 16, inputs], in their own order, of words [BLOCKS, LINES, 16] of four codes."""
    shift = tl.arange(0, 4) * 8
    if BITS == 8:
        codes = (low[:, :, :, None] >> shift[None, None, None, :]).to(tl.int8)
        return codes.permute(0, 2, 1, 3).reshape(BLOCKS * 16, LINES * 4)
    else:
        both = tl.join(low, high)  # (block, line, feature, low or high)
        codes = (both[:, :, :, :, None] >> shift[None, None, None, None, :]).to(tl.int8)
        return codes.permute(0, 2, 1, 3, 4).reshape(BLOCKS * 16, LINES * 8)


@triton.jit
def quarter_dots(x, codes, k, ROWS: tl.constexpr, INPUTS: tl.constexpr):
    """int32 products of the first 16 of 32 inputs, and of the last 16: with zeros for the others."""
    early = (k < 16)[None, :]
    zero = tl.zeros([ROWS, INPUTS], tl.int8)
    first = tl.dot(tl.where(early, x, zero), codes, out_dtype=tl.int32)
    return first, tl.dot(tl.where(early, zero, x), codes, out_dtype=tl.int32)


@triton.jit
def pick_products(
    inputs, low, high, line, BLOCKS: tl.constexpr, RUNS: tl.constexpr, TAKES_SUMS: tl.constexpr, BITS: tl.constexpr
):
    """Of one row and a group of 64 inputs: int32 [BLOCKS, 16] products of four runs, those of fewer repeated, and int32
    [1, 1] sums of the inputs of two.

    inputs: of the group, as words of four. low, high: words of codes [BLOCKS, 8, 16].
    """
    if BITS == 8:
        low_word, high_word = line, 8 + line
    else:
        low_word, high_word = 2 * line, 2 * line + 1
    LINES: tl.constexpr = 8 // RUNS
    zero = tl.zeros([BLOCKS, 8, 16], tl.int32)
    ones = tl.full([1, 8, 1], 0x01010101, tl.int32)
    x_low = tl.load(inputs + low_word)[None, :, None]
    x_high = tl.load(inputs + high_word)[None, :, None]
    x_low_all, x_high_all = tl.broadcast_to(x_low, [BLOCKS, 8, 16]), tl.broadcast_to(x_high, [BLOCKS, 8, 16])
    x0, x1 = tl.zeros([1, 1], tl.int32), tl.zeros([1, 1], tl.int32)
    if BITS == 8:
        first_half, last_half = dot4(low, x_low_all, zero), dot4(high, x_high_all, zero)
        d0, d1 = tl.sum(first_half, axis=1), tl.sum(last_half, axis=1)
        if TAKES_SUMS:
            nothing = tl.zeros([1, 8, 1], tl.int32)
            x0, x1 = tl.sum(dot4(ones, x_low, nothing), axis=1), tl.sum(dot4(ones, x_high, nothing), axis=1)
        if RUNS == 1:
            d0 = d0 + d1
        d2, d3 = d0, d1
    else:
        dots = dot4(high, x_high_all, dot4(low, x_low_all, zero))
        if TAKES_SUMS:
            x_sums = dot4(ones, x_high, dot4(ones, x_low, tl.zeros([1, 8, 1], tl.int32)))
            x0, x1 = run_sum(x_sums, line, 0, 4), run_sum(x_sums, line, 1, 4)
        if RUNS == 1:
            d0 = tl.sum(dots, axis=1)
            d1, d2, d3 = d0, d0, d0
        else:
            d0, d1 = run_sum(dots, line, 0, LINES), run_sum(dots, line, 1, LINES)
            d2, d3 = d0, d1
            if RUNS == 4:
                d2, d3 = run_sum(dots, line, 2, LINES), run_sum(dots, line, 3, LINES)
    return d0, d1, d2, d3, x0, x1


@triton.jit
def tile_products(
    codes,
    x,
    start,
    live,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    RUNS: tl.constexpr,
    TAKES_SUMS: tl.constexpr,
    BITS: tl.constexpr,
    OFFSET: tl.constexpr,
    T0: tl.constexpr,
    T1: tl.constexpr,
    T2: tl.constexpr,
    T3: tl.constexpr,
):
    """Of a tile of rows and a group of 64 inputs: int32 [ROWS, BLOCKS * 16] products of four runs, those of fewer
    repeated, and int32 [ROWS, 1] sums of the inputs of two.

    codes: words of the group's codes [BLOCKS, 1, 16]. x: int8 [ROWS, 1], of the first input of all; start: the group's.
    live: blocks to read.
    """
    HALVES: tl.constexpr = 1 if RUNS == 1 else 2
    INPUTS: tl.constexpr = 64 // HALVES
    LINES: tl.constexpr = 8 // HALVES
    line, k = tl.arange(0, LINES), tl.arange(0, INPUTS)
    words_mask = live[:, None, None] & (line >= 0)[None, :, None]
    x0, x1 = tl.zeros([ROWS, 1], tl.int32), tl.zeros([ROWS, 1], tl.int32)
    if BITS == 8:
        low, high = code_words(codes, tl.arange(0, 8)[None, :, None], live[:, None, None], 8, OFFSET, T0, T1, T2, T3)
        a = tl.load(x + start + tl.arange(0, 32)[None, :])
        b = tl.load(x + start + 32 + tl.arange(0, 32)[None, :])
        d0 = tl.dot(a, as_inputs(low, low, 8, BLOCKS, 8).T, out_dtype=tl.int32)
        d1 = tl.dot(b, as_inputs(high, high, 8, BLOCKS, 8).T, out_dtype=tl.int32)
        if TAKES_SUMS:
            x0, x1 = tl.sum(a.to(tl.int32), axis=1)[:, None], tl.sum(b.to(tl.int32), axis=1)[:, None]
        if RUNS == 1:
            d0 = d0 + d1
        d2, d3 = d0, d1
    elif RUNS == 1:
        low, high = code_words(codes, line[None, :, None], words_mask, BITS, OFFSET, T0, T1, T2, T3)
        a = tl.load(x + k[None, :] + start)
        d0 = tl.dot(a, as_inputs(low, high, BITS, BLOCKS, LINES).T, out_dtype=tl.int32)
        d1, d2, d3 = d0, d0, d0
        if TAKES_SUMS:
            x0 = tl.sum(a.to(tl.int32), axis=1)[:, None]
    else:
        low, high = code_words(codes, line[None, :, None], words_mask, BITS, OFFSET, T0, T1, T2, T3)
        more_low, more_high = code_words(codes, 4 + line[None, :, None], words_mask, BITS, OFFSET, T0, T1, T2, T3)
        first_codes = as_inputs(low, high, BITS, BLOCKS, LINES).T
        last_codes = as_inputs(more_low, more_high, BITS, BLOCKS, LINES).T
        a, b = tl.load(x + k[None, :] + start), tl.load(x + k[None, :] + start + 32)
        if TAKES_SUMS:
            x0, x1 = tl.sum(a.to(tl.int32), axis=1)[:, None], tl.sum(b.to(tl.int32), axis=1)[:, None]
        if RUNS == 4:
            d0, d1 = quarter_dots(a, first_codes, k, ROWS, INPUTS)
            d2, d3 = quarter_dots(b, last_codes, k, ROWS, INPUTS)
        else:
            d0 = tl.dot(a, first_codes, out_dtype=tl.int32)
            d1 = tl.dot(b, last_codes, out_dtype=tl.int32)
            d2, d3 = d0, d1
    return d0, d1, d2, d3, x0, x1
