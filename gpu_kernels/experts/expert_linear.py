"""The `expert_linear` op of the GPU lane: the picks of every expert times that expert's packed weight.

Which experts and how many rows are memory that the kernels read, so a captured step follows whatever the router writes;
the grid is the largest that any routes need, and programs without picks leave at once.
"""

from __future__ import annotations

from torch import Tensor

from gpu_kernels.experts.ordered import WHOLE_FORMS
from gpu_kernels.experts.plain_kernel import multiply_plain
from gpu_kernels.experts.whole_kernel import multiply_whole
from gpu_kernels.reference import BLOCK_FEATURES, block_bytes, mix_of


def expert_linear(
    x: Tensor, sources: Tensor | None, starts: Tensor, first: int, weight: Tensor, weight_dtype: str, out: Tensor
) -> None:
    """x W^T for every pick of some experts, each with its expert's W, into the picks' rows of `out`.

    x: f32 [rows, in_features]. sources: int32 [picks], the row of x of each pick, None where it is the pick's own.
    starts: int32 [all experts + 1], from `route`. first: the expert of weight[0]. weight: uint8 [experts, blocks,
    block_bytes], or of a mix [experts, units, unit_bytes], each expert's contiguous. out: f32 [picks, features]; picks
    of others stay. Raises ValueError for an unknown weight dtype.
    """
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
        multiply(x, sources, starts, first, weight[:, :, at:], name, count, first_block * BLOCK_FEATURES, out)
        at, first_block = at + count * block_bytes(name, x.shape[1]), first_block + count
