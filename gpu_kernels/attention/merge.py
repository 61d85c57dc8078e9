"""Merge of attention partials: the online softmax reduce.

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
