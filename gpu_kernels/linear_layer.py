"""The `linear` op of the GPU lane: cuBLAS for fp32 and bf16 blocks, our int8 kernels over coded blocks of few rows.

    y = round(x) W^T + b        round: none for fp32, to bf16 for bf16, to int8 per group of 64 for coded formats

Many rows are bound by arithmetic, and whether that is faster in int8 or in bf16 depends on the card: up to `int8_rows`
rows over q8 and q4 blocks are int8 products; up to eight over any other coded or float16 block meet it as it lies.
Beyond, pieces of the weight become bf16 in a buffer for cuBLAS, and the rounded x becomes bf16 too; float16 blocks
become float32. The only difference is then the rounding of both factors to bf16. A product goes straight into its
columns of `out`, or onto them. x is rounded once for all pieces of a weight, which come one at a time (`rounded`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from gpu_kernels.activation import quantize_activation, round_activation
from gpu_kernels.dequantize import dequantize
from gpu_kernels.forms.as_they_lie import MOST_ROWS, is_read_as_it_lies
from gpu_kernels.forms.dequantize import dequantize_form
from gpu_kernels.forms.few_number_rows import multiply_few_half_rows, multiply_few_number_rows
from gpu_kernels.forms.few_rows import multiply_few_rows
from gpu_kernels.forms.unpack import FORMS
from gpu_kernels.int8_tile import multiply_many_rows
from gpu_kernels.quantized_linear import multiply_quantized
from gpu_kernels.quantized_shapes import LARGEST_TILE_ROWS
from gpu_kernels.reference import BLOCK_FEATURES, GROUP, PLAIN_DTYPES, block_bytes, check_weight_dtype, mixed_parts

INT8_KERNELS = ("q8", "q4")  # formats that int8 kernels multiply
PRODUCT_BYTES = 32 * 2**20  # of a dense product at once: what a call takes beside its arguments is bounded
# Of weights as bf16 at once, likewise. The L2 cache of the largest GPUs holds half of it; smaller pieces would stay
# there whole, but Python queues each with three launches, which took longer than the GPU's work on 32 MiB for 512 rows.
DENSE_BYTES = 64 * 2**20
# Up to here int8 kernels are faster on every card: they read a weight once, at a quarter or half of its bytes as bf16.
INT8_ROWS = 64


class RoundedInput(NamedTuple):
    """The input of a linear as its products read it, for all the pieces of one weight: see `rounded`.

    shape: (rows, in_features). values: int8 with scales and sums for int8 products, else one matrix.
    """

    shape: tuple[int, int]
    values: tuple[Tensor, ...]

    @property
    def is_int8(self) -> bool:
        """Whether the products are in int8."""
        return len(self.values) == 3


def rounded(x: Tensor, weight_dtype: str, int8_rows: int = INT8_ROWS) -> RoundedInput:
    """x, f32 [rows, in_features], rounded as linears over weights of this dtype round it; newly allocated.

    int8_rows: the most rows that q8 and q4 weights multiply in int8. Over a mix of formats x is rounded anew for each
    of them, and stays here what it is.
    """
    if "*" in weight_dtype:
        return RoundedInput(tuple(x.shape), (x,))
    check_weight_dtype(weight_dtype)
    assert x.stride(1) == 1, x.stride()
    shape = tuple(x.shape)
    if weight_dtype == "bf16":
        return RoundedInput(shape, (x.to(torch.bfloat16),))
    order = rounding_order(shape[0], weight_dtype, int8_rows)
    if x.numel() == 0 or order is None:
        return RoundedInput(shape, (x,))
    return RoundedInput(shape, (round_activation(x),) if order == "bf16" else quantize_activation(x, order))


def rounding_order(rows: int, weight_dtype: str, int8_rows: int) -> str | None:
    """How `rounded` stores x after its rounding to int8 in groups: in an order of `quantize_activation`, or as "bf16";
    None for a weight whose x is not rounded so."""
    if "*" in weight_dtype or weight_dtype in ("fp32", "fp16", "bf16"):
        return None
    if weight_dtype in FORMS:
        return "own" if rows <= MOST_ROWS else "bf16"
    if rows > int8_rows or weight_dtype not in INT8_KERNELS:
        return "bf16"
    return weight_dtype if rows <= LARGEST_TILE_ROWS else "own"


def linear(
    x: Tensor | RoundedInput,
    weight: Tensor,
    weight_dtype: str,
    bias: Tensor | None,
    out: Tensor,
    accumulate: bool = False,
) -> None:
    """x may also be what `rounded` made of it for this format."""
    if "*" in weight_dtype:
        plain = x.values[0] if isinstance(x, RoundedInput) else x
        _linear_of_mix(plain, weight, weight_dtype, bias, out, accumulate)
        return
    if not isinstance(x, RoundedInput):
        x = rounded(x, weight_dtype)
    assert out.shape == (x.shape[0], weight.shape[0] * BLOCK_FEATURES), (x.shape, weight.shape, out.shape)
    assert weight.is_contiguous() and out.stride(1) == 1, (weight.stride(), out.stride())
    if out.numel() == 0:
        return
    if weight_dtype not in PLAIN_DTYPES:
        expected = block_bytes(weight_dtype, x.shape[1])
        assert weight.shape[1] == expected, (weight_dtype, weight.shape, x.shape, expected)
        if x.is_int8:
            _int8_product(x.shape[0], weight_dtype)(x.values, weight, weight_dtype, bias, out, accumulate)
            return
    if weight_dtype == "fp16" and is_read_as_it_lies(x.shape[0], weight_dtype, x.shape[1]):
        multiply_few_half_rows(x.values[0], weight, bias, out, accumulate)
        return
    in_place = not out.is_cuda or products_in_place(out.device)
    blocks = _blocks_at_once(x, weight_dtype, in_place)
    if weight.shape[0] <= blocks:
        _dense_linear(x, weight, weight_dtype, bias, out, accumulate, in_place)
        return
    for start in range(0, weight.shape[0], blocks):
        columns = slice(start * BLOCK_FEATURES, (start + blocks) * BLOCK_FEATURES)
        part = None if bias is None else bias[columns]
        _dense_linear(x, weight[start : start + blocks], weight_dtype, part, out[:, columns], accumulate, in_place)


def _int8_product(rows: int, weight_dtype: str) -> Callable[..., None]:
    if weight_dtype in FORMS:
        return multiply_few_rows if FORMS[weight_dtype].is_whole else multiply_few_number_rows
    return multiply_quantized if rows <= LARGEST_TILE_ROWS else multiply_many_rows


def _dense_linear(
    x: RoundedInput,
    weight: Tensor,
    weight_dtype: str,
    bias: Tensor | None,
    out: Tensor,
    accumulate: bool,
    in_place: bool,
) -> None:
    _product(x.values[0], _dense(weight, weight_dtype, x.shape[1]), out, accumulate, in_place)
    if bias is not None:
        out += bias


def _linear_of_mix(
    x: Tensor, weight: Tensor, weight_dtype: str, bias: Tensor | None, out: Tensor, accumulate: bool
) -> None:
    """Every format of a mix computes its columns of all units, which are then laid between those of the others."""
    for name, blocks, columns in mixed_parts(weight, weight_dtype, x.shape[1]):
        part = torch.empty(x.shape[0], blocks.shape[0] * BLOCK_FEATURES, dtype=torch.float32, device=x.device)
        linear(x, blocks, name, None if bias is None else bias[columns], part)
        if accumulate:
            out[:, columns] += part
        else:
            out[:, columns] = part


@cache
def products_in_place(device: torch.device) -> bool:
    """Whether torch multiplies bf16 straight into, and onto, columns of a wider float32 matrix on this device.

    Tried once, before anything is captured: with a release that cannot, results go through a buffer.
    """
    x, dense = (torch.ones(shape, dtype=torch.bfloat16, device=device) for shape in ((16, 64), (32, 64)))
    wide = torch.zeros(16, 48, device=device, dtype=torch.float32)
    try:
        for accumulate in (False, True):
            _product(x, dense, wide[:, 8:40], accumulate, True)
    except (RuntimeError, TypeError, AttributeError, NotImplementedError):
        return False
    expected = torch.zeros_like(wide)
    expected[:, 8:40] = 128
    return torch.equal(wide, expected)


def _blocks_at_once(x: Tensor | RoundedInput, weight_dtype: str, in_place: bool = False) -> int:
    """Blocks of which neither the product, where it needs a buffer, nor the weights as bf16 exceed their bound."""
    rows, in_features = x.shape
    bounds = [] if in_place else [PRODUCT_BYTES // (4 * BLOCK_FEATURES * rows)]
    if weight_dtype not in ("fp32", "bf16"):
        bounds.append(DENSE_BYTES // (2 * BLOCK_FEATURES * (in_features + GROUP)))
    return max(1, min(bounds, default=1 << 30))


def _dense(weight: Tensor, weight_dtype: str, in_features: int) -> Tensor:
    """Row-major [features, inputs] of blocks, in the dtype of the product."""
    if weight_dtype in FORMS:
        return dequantize_form(weight, weight_dtype, in_features)
    if weight_dtype == "fp16":
        return weight.view(torch.float16).view(-1, in_features).float()
    if weight_dtype in INT8_KERNELS:
        return dequantize(weight, weight_dtype)
    return weight.view(torch.float32 if weight_dtype == "fp32" else torch.bfloat16).view(-1, in_features)


def _product(x: Tensor, dense: Tensor, out: Tensor, accumulate: bool, in_place: bool) -> None:
    """float32 x W^T of float32 or bf16 factors into, or onto, `out`, which may be columns of a wider matrix."""
    if not x.is_cuda and x.dtype == torch.bfloat16:  # torch has bf16 products with a float32 result on CUDA only
        x, dense = x.float(), dense.float()
    wide = {} if x.dtype == torch.float32 else {"out_dtype": torch.float32}
    if in_place and accumulate:
        torch.addmm(out, x, dense.T, out=out, **wide)
    elif in_place:
        torch.mm(x, dense.T, out=out, **wide)
    else:
        result = torch.mm(x, dense.T, **wide)
        out.copy_(result) if not accumulate else out.add_(result)
