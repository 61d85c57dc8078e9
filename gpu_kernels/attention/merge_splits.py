"""Merge of the splits of one decode attention, by its kernel; equations as those of `merge`."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Heads(NamedTuple):
    """Where the heads of one KV head go: pointers at the first of them, its strides, and constants."""

    out: Any
    lse: Any
    out_stride: Any
    lse_stride: Any
    QUERIES_PER_KV: Any
    HEAD_DIM: Any
    HEAD_PAD: Any


@triton.jit
def merge_splits(outs, lses, first, num_splits, target, STEP: tl.constexpr):
    """Merge the splits [first, first + num_splits), in their order, into `target`.

    outs: [splits, QUERIES_PER_KV, head_dim], lses: [splits, QUERIES_PER_KV], contiguous, each of at least one key, so
    without -inf. Other programs have just written them, so they are read past the first-level cache. STEP of them at
    once."""
    QUERIES_PER_KV: tl.constexpr = target.QUERIES_PER_KV
    HEADS: tl.constexpr = triton.next_power_of_2(QUERIES_PER_KV)
    heads = tl.arange(0, HEADS)
    dims = tl.arange(0, target.HEAD_PAD)
    live = heads < QUERIES_PER_KV
    inside = live[:, None] & (dims < target.HEAD_DIM)[None, :]
    maximum = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    acc = tl.zeros([HEADS, target.HEAD_PAD], tl.float32)
    for step in range(0, num_splits, STEP):
        splits = step + tl.arange(0, STEP)
        present = splits < num_splits
        parts = ((first + splits) * QUERIES_PER_KV)[:, None] + heads[None, :]
        part_lse = tl.load(
            lses + parts, mask=present[:, None] & live[None, :], other=float("-inf"), cache_modifier=".cg"
        )
        part = tl.load(
            outs + parts[:, :, None] * target.HEAD_DIM + dims[None, None, :],
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
    tl.store(target.out + heads[:, None] * target.out_stride + dims[None, :], acc / total[:, None], mask=inside)
    tl.store(target.lse + heads * target.lse_stride, maximum + tl.log(total), mask=live)
