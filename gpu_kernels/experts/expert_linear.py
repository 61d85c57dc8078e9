"""The `expert_linear` op of the GPU lane: the picks of every expert times that expert's packed weight.

Which experts and how many rows are memory that the kernels read, so a captured step follows whatever the router writes;
the grid is the largest that any routes need, and programs without picks leave at once.
"""

from __future__ import annotations

from torch import Tensor

from cpu_kernels.contract import Picks
from gpu_kernels.experts.ordered import WHOLE_FORMS
from gpu_kernels.experts.plain_kernel import multiply_plain
from gpu_kernels.experts.whole_kernel import multiply_whole
from gpu_kernels.reference import BLOCK_FEATURES, block_bytes, mix_of


def expert_linear(x: Tensor, picks: Picks, weight: Tensor, weight_dtype: str, out: Tensor) -> None:
    """Each expert's weight is contiguous."""
    sources, starts, first, _ = picks
    parts, at, first_block = mix_of(weight_dtype), 0, 0
    unit_bytes = sum(count * block_bytes(name, x.shape[1]) for name, count in parts)
    blocks = weight.shape[1] * sum(count for _, count in parts)
    assert weight.shape[2] == unit_bytes, (weight_dtype, weight.shape, x.shape, unit_bytes)
    assert out.shape[1] == blocks * BLOCK_FEATURES, (weight.shape, out.shape)
    assert first + weight.shape[0] < starts.shape[0], (first, weight.shape, starts.shape)
    assert out.shape[0] == (x if sources is None else sources).shape[0], (x.shape, out.shape)
    assert weight.stride()[1:] == (unit_bytes, 1) and x.stride(1) == out.stride(1) == 1, weight.stride()
    if out.numel() == 0 or weight.numel() == 0:
        return
    for name, count in parts:
        multiply = multiply_whole if name in WHOLE_FORMS else multiply_plain
        multiply(x, picks, weight[:, :, at:], name, count, first_block * BLOCK_FEATURES, out)
        at, first_block = at + count * block_bytes(name, x.shape[1]), first_block + count
