"""The online softmax of the attention kernels, in base 2 while it runs.

    s_j = scale * q . k_j over the visible j;  lse = log sum_j exp(s_j);  out = sum_j exp(s_j - lse) v_j

With a soft cap, cap * tanh(s_j / cap) stands in the place of s_j. Weights meet bf16 values as bf16, rounded as the
reference says. A query that sees no key gives (0, -inf).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


class Scores(NamedTuple):
    """What becomes of a dot product: its scale, the soft cap, and the constant whether there is one."""

    scale: Any
    cap: Any
    CAPPED: Any


@triton.jit
def no_keys(ROWS: tl.constexpr, HEAD_PAD: tl.constexpr):
    """The running (maximum, total, acc) of queries that have seen no key."""
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, HEAD_PAD], tl.float32)
    return maximum, total, acc


@triton.jit
def _capped(scores, scale, cap):
    """cap * tanh(scale * scores / cap); near 0 by its series, 1 - exp would lose digits."""
    x = scores * (scale / cap)
    power = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - power) / (1.0 + power)
    square = x * x
    near = (((62.0 / 2835.0 * square - 17.0 / 315.0) * square + 2.0 / 15.0) * square - 1.0 / 3.0) * square + 1.0
    return cap * tl.where(tl.abs(x) < 0.25, near * x, tl.where(x < 0.0, -far, far))


@triton.jit
def scores_of(query, keys, form):
    """[queries, keys] in float32: not scaled yet, or capped."""
    scores = tl.dot(query, tl.trans(keys), input_precision="ieee")
    if form.CAPPED:
        scores = _capped(scores, form.scale, form.cap)
    return scores


@triton.jit
def take_in(scores, values, form, maximum, total, acc):
    """Take one block of keys into the running (maximum, total, acc); scores [M, N] of `scores_of`, -inf where masked.

    maximum is whole, so it scales weights by powers of two, and they round to bf16 alike in every block and split."""
    scale = LOG2_E if form.CAPPED else form.scale * LOG2_E
    new_maximum = tl.maximum(maximum, tl.ceil(tl.max(scores, axis=1) * scale))
    safe_maximum = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)  # nothing visible yet: avoid inf - inf
    correction = tl.exp2(maximum - safe_maximum)
    weights = tl.exp2(scores * scale - safe_maximum[:, None])
    total = total * correction + tl.sum(weights, axis=1)
    acc = tl.dot(weights.to(values.dtype), values, acc * correction[:, None], input_precision="ieee")
    return new_maximum, total, acc


@triton.jit
def normalised(maximum, total, acc):
    """(out, natural-log lse) of the running softmax."""
    nonzero = tl.where(total == 0.0, 1.0, total)
    lse = tl.where(total == 0.0, float("-inf"), (maximum + tl.log2(nonzero)) * LN_2)
    return acc / nonzero[:, None], lse
