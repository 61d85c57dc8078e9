"""Parts of the kernels of whole_kernel.py: sums and products of runs of inputs, and codes in the order of inputs."""

from __future__ import annotations

import triton
import triton.language as tl


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
