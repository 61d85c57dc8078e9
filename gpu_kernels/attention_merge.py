"""Merge of attention partials: the online softmax reduce, for separate partials and for the splits of one decode.

    m = max_i lse_i;  w_i = exp(lse_i - m);  out = sum_i w_i out_i / sum_i w_i;  lse = m + log(sum_i w_i)

The running maximum keeps every exponent at or below zero; -inf is the identity, and a row of nothing but identities
stays (0, -inf). Everything is float32 and natural log.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _merge_kernel(outs, lses, out, lse, strides, num_heads, PARTS: tl.constexpr, HEAD_DIM: tl.constexpr,
                  HEAD_PAD: tl.constexpr):
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
def _merge_splits_kernel(outs, lses, out, lse, out_row_stride, out_head_stride, lse_row_stride, lse_head_stride,
                         num_heads, num_splits, SPLITS_PAD: tl.constexpr, HEAD_DIM: tl.constexpr,
                         HEAD_PAD: tl.constexpr):
    """grid: (rows * num_heads,). outs: [rows * num_heads, num_splits, head_dim], lses: [rows * num_heads, num_splits],
    contiguous."""
    program = tl.program_id(0).to(tl.int64)
    row = program // num_heads
    head = program % num_heads
    splits = tl.arange(0, SPLITS_PAD)
    dims = tl.arange(0, HEAD_PAD)
    live = splits < num_splits
    part_lse = tl.load(lses + program * num_splits + splits, mask=live, other=float("-inf"))
    maximum = tl.max(part_lse, axis=0)
    safe_maximum = tl.where(maximum == float("-inf"), 0.0, maximum)
    weights = tl.exp(part_lse - safe_maximum)
    total = tl.sum(weights, axis=0)
    parts = tl.load(outs + (program * num_splits + splits[:, None]) * HEAD_DIM + dims[None, :],
                    mask=live[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
    acc = tl.sum(weights[:, None] * parts, axis=0)
    tl.store(out + row * out_row_stride + head * out_head_stride + dims, acc / tl.where(total == 0.0, 1.0, total),
             mask=dims < HEAD_DIM)
    tl.store(lse + row * lse_row_stride + head * lse_head_stride, safe_maximum + tl.log(total))


def merge(outs: list[Tensor], lses: list[Tensor], out: Tensor, lse: Tensor) -> None:
    """Merge any number (at least one) of attention partials over disjoint keys into `out` and `lse`.

    outs: f32 [..., head_dim] each; lses: f32 [...] each, natural log. `out` and `lse` may be one of the partials.
    Dimensions before the last three of `out` must collapse into one without a copy.
    """
    assert outs and len(outs) == len(lses), (len(outs), len(lses))
    head_dim = out.shape[-1]
    *parts, result = [_as_rows(part, part_lse) for part, part_lse in zip([*outs, out], [*lses, lse])]
    rows, num_heads = result[1].shape
    for part, part_lse in parts:
        assert part.shape == (rows, num_heads, head_dim) and part_lse.shape == (rows, num_heads), part.shape
    strides = tuple((*part.stride()[:2], *part_lse.stride()) for part, part_lse in [*parts, result])
    if rows * num_heads:
        _merge_kernel[(rows * num_heads,)](
            tuple(part for part, _ in parts), tuple(part_lse for _, part_lse in parts), *result, strides, num_heads,
            PARTS=len(parts), HEAD_DIM=head_dim, HEAD_PAD=triton.next_power_of_2(head_dim), num_warps=1)


def merge_splits(outs: Tensor, lses: Tensor, out: Tensor, lse: Tensor) -> None:
    """Merge the splits of one decode attention into out [batch, num_heads, head_dim] and lse [batch, num_heads].

    outs: f32 [batch, num_heads, num_splits, head_dim]; lses: f32 [batch, num_heads, num_splits]; both contiguous.
    """
    batch, num_heads, num_splits, head_dim = outs.shape
    _merge_splits_kernel[(batch * num_heads,)](
        outs, lses, out, lse, *out.stride()[:2], *lse.stride(), num_heads, num_splits,
        SPLITS_PAD=triton.next_power_of_2(num_splits), HEAD_DIM=head_dim, HEAD_PAD=triton.next_power_of_2(head_dim),
        num_warps=4)


def _as_rows(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Views [rows, heads, head_dim] and [rows, heads] of a partial with any number of leading dimensions."""
    while out.ndim < 3:
        out, lse = out.unsqueeze(0), lse.unsqueeze(0)
    return out.view(-1, *out.shape[-2:]), lse.view(-1, lse.shape[-1])
