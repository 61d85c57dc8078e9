"""The `linear` op of the GPU lane: cuBLAS for fp32 and bf16 blocks, our kernels for few rows over q8 and q4 blocks.

    y = round(x) W^T + b        round: none for fp32, to bf16 for bf16, to int8 per group of 64 for q8 and q4

Many rows over q8 and q4 blocks are bound by arithmetic, which cuBLAS does best: pieces of the weight become bf16 in a
buffer, and the rounded x becomes bf16 too. Beside the exact arithmetic of few rows the only
difference is the rounding of both factors to bf16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpu_kernels.activation import round_activation
from gpu_kernels.dequantize import dequantize
from gpu_kernels.quantized_linear import check_blocks, quantized_linear
from gpu_kernels.reference import BLOCK_FEATURES, GROUP, SUPERBLOCK_BYTES

WEIGHT_DTYPES = ("fp32", "bf16", "q8", "q4")
PRODUCT_BYTES = 32 * 2**20  # of a dense product at once: what a call takes beside its arguments is bounded
# Of weights as bf16 at once, likewise. The L2 cache of the largest GPUs holds half of it; smaller pieces would stay there
# whole, but Python queues each with three launches, which took longer than the GPU's work on 32 MiB for 512 rows.
DENSE_BYTES = 64 * 2**20
# Up to here the kernels for few rows are faster: they read a weight once, at a quarter or half of its bytes as bf16.
QUANTIZED_ROWS = 64


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
        if x.shape[0] <= QUANTIZED_ROWS:
            quantized_linear(x, weight, weight_dtype, bias, out, accumulate)
            return
    rounded = _rounded(x, weight_dtype)
    blocks = _blocks_at_once(x, weight_dtype)
    for start in range(0, weight.shape[0], blocks):
        columns = slice(start * BLOCK_FEATURES, (start + blocks) * BLOCK_FEATURES)
        result = _dense_product(rounded, _dense(weight[start:start + blocks], weight_dtype, x.shape[1]))
        if bias is not None:
            result += bias[columns]
        if accumulate:
            out[:, columns] += result
        else:
            out[:, columns] = result


def _rounded(x: Tensor, weight_dtype: str) -> Tensor:
    if weight_dtype in SUPERBLOCK_BYTES:
        return round_activation(x)
    return x if weight_dtype == "fp32" else x.to(torch.bfloat16)


def _blocks_at_once(x: Tensor, weight_dtype: str) -> int:
    """Blocks of which neither the product nor the weights as bf16 exceed their bound, at least one."""
    blocks = PRODUCT_BYTES // (4 * BLOCK_FEATURES * x.shape[0])
    if weight_dtype in SUPERBLOCK_BYTES:
        blocks = min(blocks, DENSE_BYTES // (2 * BLOCK_FEATURES * (x.shape[1] + GROUP)))
    return max(1, blocks)


def _dense(weight: Tensor, weight_dtype: str, in_features: int) -> Tensor:
    """Row-major [features, inputs] of blocks, in the dtype of the product."""
    if weight_dtype in SUPERBLOCK_BYTES:
        return dequantize(weight, weight_dtype)
    return weight.view(torch.float32 if weight_dtype == "fp32" else torch.bfloat16).view(-1, in_features)


def _dense_product(x: Tensor, dense: Tensor) -> Tensor:
    """float32 x W^T of float32 or bf16 factors."""
    if x.dtype == torch.float32:
        return torch.mm(x, dense.T)
    if x.is_cuda:
        return torch.mm(x, dense.T, out_dtype=torch.float32)
    return torch.mm(x.float(), dense.T.float())  # torch has bf16 products with a float32 result on CUDA only
