"""Merge of attention partials: the online softmax reduce, for separate partials and for the splits of one decode.

    m = max_i lse_i;  w_i = exp(lse_i - m);  out = sum_i w_i out_i / sum_i w_i;  lse = m + log(sum_i w_i)

The running maximum keeps every exponent at or below zero; -inf is the identity, and a row of nothing but identities
stays (0, -inf). Everything is float32 and natural log.
"""

from __future__ import annotations

import functools
from typing import Any

import triton
import triton.language as tl

from cpu_kernels.contract import Partial
from gpu_kernels.launching import Kernel, Shape


@Kernel
@triton.jit
def _merge_kernel(
    outs, lses, out, lse, num_heads, strides, PARTS: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr
):
    """grid: (rows * num_heads,). Tuples of PARTS tensors [rows, num_heads(, head_dim)]; strides: (out, lse) pairs of
    (row, head) strides for every part, then for the result."""
    row = (tl.program_id(0) // num_heads).to(tl.int64)
    head = tl.program_id(0) % num_heads
    dims = tl.arange(0, HEAD_PAD)
    inside = dims < HEAD_DIM
    maximum = float("-inf")
    for part in tl.static_range(PARTS):
        maximum = tl.maximum(maximum, tl.load(lses[part] + row * strides[part][2] + head * strides[part][3]))
    safe_maximum = tl.where(maximum == float("-inf"), 0.0, maximum)  # -inf - -inf would be NaN
    total = 0.0
    acc = tl.zeros([HEAD_PAD], tl.float32)
    for part in tl.static_range(PARTS):
        weight = tl.exp(tl.load(lses[part] + row * strides[part][2] + head * strides[part][3]) - safe_maximum)
        total += weight
        source = outs[part] + row * strides[part][0] + head * strides[part][1]
        acc += weight * tl.load(source + dims, mask=inside, other=0.0)
    result = strides[PARTS]
    tl.store(out + row * result[0] + head * result[1] + dims, acc / tl.where(total == 0.0, 1.0, total), mask=inside)
    tl.store(lse + row * result[2] + head * result[3], safe_maximum + tl.log(total))


@triton.jit
def merge_splits(
    outs,
    lses,
    first,
    num_splits,
    out,
    lse,
    out_head_stride,
    lse_head_stride,
    QUERIES_PER_KV: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    STEP: tl.constexpr,
):
    """Merge the splits [first, first + num_splits), in their order, into out [QUERIES_PER_KV, head_dim], lse
    [QUERIES_PER_KV].

    outs: [splits, QUERIES_PER_KV, head_dim], lses: [splits, QUERIES_PER_KV], contiguous, each of at least one key, so
    without -inf. Other programs have just written them, so they are read past the first-level cache. STEP of them at
    once."""
    HEADS: tl.constexpr = triton.next_power_of_2(QUERIES_PER_KV)
    heads = tl.arange(0, HEADS)
    dims = tl.arange(0, HEAD_PAD)
    live = heads < QUERIES_PER_KV
    inside = live[:, None] & (dims < HEAD_DIM)[None, :]
    maximum = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    acc = tl.zeros([HEADS, HEAD_PAD], tl.float32)
    for step in range(0, num_splits, STEP):
        splits = step + tl.arange(0, STEP)
        present = splits < num_splits
        parts = ((first + splits) * QUERIES_PER_KV)[:, None] + heads[None, :]
        part_lse = tl.load(
            lses + parts, mask=present[:, None] & live[None, :], other=float("-inf"), cache_modifier=".cg"
        )
        part = tl.load(
            outs + parts[:, :, None] * HEAD_DIM + dims[None, None, :],
            mask=present[:, None, None] & inside[None, :, :],
            other=0.0,
            cache_modifier=".cg",
        )
        new_maximum = tl.maximum(maximum, tl.max(part_lse, axis=0))
        correction = tl.exp(maximum - new_maximum)
        weights = tl.exp(part_lse - new_maximum[None, :])
        total = total * correction + tl.sum(weights, axis=0)
        acc = acc * correction[:, None] + tl.sum(weights[:, :, None] * part, axis=0)
        maximum = new_maximum
    tl.store(out + heads[:, None] * out_head_stride + dims[None, :], acc / total[:, None], mask=inside)
    tl.store(lse + heads * lse_head_stride, maximum + tl.log(total), mask=live)


def merge(partials: list[Partial], into: Partial) -> None:
    """Dimensions before the last three of `into.out` must collapse into one without a copy."""
    assert partials
    head_dim = into.out.shape[-1]
    *parts, result = every = [_as_rows(partial) for partial in (*partials, into)]
    rows, num_heads = result.lse.shape
    for part, part_lse in parts:
        assert part.shape == (rows, num_heads, head_dim) and part_lse.shape == (rows, num_heads), part.shape
    if rows * num_heads:
        tensors = (*[part for part, _ in parts], *[part_lse for _, part_lse in parts], *result)
        strides = [stride for part, part_lse in every for stride in (*part.stride()[:2], *part_lse.stride())]
        _merge_kernel.launch(
            (rows * num_heads, 1, 1),
            tensors,
            (),
            (num_heads, *strides),
            _shape(len(parts), head_dim),
            nest=_nested(len(parts)),
        )


@functools.cache
def _shape(parts: int, head_dim: int) -> Shape:
    return Shape(PARTS=parts, HEAD_DIM=head_dim, HEAD_PAD=triton.next_power_of_2(head_dim), num_warps=1)


@functools.cache
def _nested(parts: int) -> Any:
    """The kernel's arguments, tuples among them, of all tensors and then all numbers in a row."""
    last = 2 * parts + 3

    def nest(flat: tuple) -> tuple:
        strides = tuple(flat[first : first + 4] for first in range(last, len(flat), 4))
        return flat[:parts], flat[parts : 2 * parts], *flat[2 * parts : last], strides

    return nest


def _as_rows(partial: Partial) -> Partial:
    """Views [rows, heads, head_dim] and [rows, heads] of a partial with any number of leading dimensions."""
    out, lse = partial
    while out.ndim < 3:
        out, lse = out.unsqueeze(0), lse.unsqueeze(0)
    return Partial(out.view(-1, *out.shape[-2:]), lse.view(-1, lse.shape[-1]))
