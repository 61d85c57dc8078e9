"""The `linear` op of the GPU lane: cuBLAS for fp32 and bf16 blocks, our kernels for q8 and q4 blocks.

    y = round(x) W^T + b        round: none for fp32, to bf16 for bf16, to int8 per group of 64 for q8 and q4
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpu_kernels.quantized_linear import check_blocks, quantized_linear
from gpu_kernels.reference import BLOCK_FEATURES, SUPERBLOCK_BYTES, WEIGHT_DTYPES

PRODUCT_BYTES = 32 * 2**20  # of a dense product at once: what a call takes beside its arguments is bounded


def linear(x: Tensor, weight: Tensor, weight_dtype: str, bias: Tensor | None, out: Tensor,
           accumulate: bool = False) -> None:
    """Write (or with `accumulate` add) the linear layer of `x` into `out`.

    x: f32 [rows, in_features]. weight: uint8 [num_blocks, block_bytes], packed. weight_dtype: fp32, bf16, q8 or q4.
    bias: f32 [num_blocks*16] or None. out: f32 [rows, num_blocks*16]. Raises ValueError for an unknown weight dtype.
    """
    if weight_dtype not in WEIGHT_DTYPES:
        raise ValueError(f"weight dtype {weight_dtype!r} is unknown; known: {', '.join(WEIGHT_DTYPES)}")
    assert out.shape == (x.shape[0], weight.shape[0] * BLOCK_FEATURES), (x.shape, weight.shape, out.shape)
    strides = (weight.stride(), x.stride(), out.stride())
    assert weight.is_contiguous() and x.stride(1) == 1 and out.stride(1) == 1, strides
    if out.numel() == 0:
        return
    if weight_dtype in SUPERBLOCK_BYTES:
        check_blocks(weight, weight_dtype, x.shape[1])
        quantized_linear(x, weight, weight_dtype, bias, out, accumulate)
        return
    blocks = max(1, PRODUCT_BYTES // (4 * BLOCK_FEATURES * x.shape[0]))
    for start in range(0, weight.shape[0], blocks):
        columns = slice(start * BLOCK_FEATURES, (start + blocks) * BLOCK_FEATURES)
        result = _dense_product(x, weight[start:start + blocks], weight_dtype)
        if bias is not None:
            result += bias[columns]
        if accumulate:
            out[:, columns] += result
        else:
            out[:, columns] = result


def _dense_product(x: Tensor, weight: Tensor, weight_dtype: str) -> Tensor:
    """float32 x W^T of row-major fp32 or bf16 blocks."""
    if weight_dtype == "fp32":
        return torch.mm(x, weight.view(torch.float32).view(-1, x.shape[1]).T)
    rounded, dense = x.to(torch.bfloat16), weight.view(torch.bfloat16).view(-1, x.shape[1])
    if x.is_cuda:
        return torch.mm(rounded, dense.T, out_dtype=torch.float32)
    return torch.mm(rounded.float(), dense.T.float())  # torch has bf16 products with a float32 result on CUDA only
