"""linear: the input rounded as the format of the weight wants it, times the unpacked weight."""

from __future__ import annotations

import torch
from torch import Tensor

from gpu_kernels.reference.packed import GROUP, check_weight_dtype, mixed_parts, unpack


def linear(
    x: Tensor, weight: Tensor, weight_dtype: str, bias: Tensor | None, out: Tensor, accumulate: bool = False
) -> None:
    for name, blocks, columns in mixed_parts(weight, weight_dtype, x.shape[-1]):
        dense = unpack(blocks, name, x.shape[-1], compute_dtype(x))
        part = None if bias is None else bias[columns]
        result = torch.empty(x.shape[0], dense.shape[0], dtype=out.dtype, device=out.device)
        linear_unpacked(round_activation(x, name), dense, part, result)
        if accumulate:
            out[:, columns] += result
        else:
            out[:, columns] = result


def linear_unpacked(x: Tensor, dense: Tensor, bias: Tensor | None, out: Tensor, accumulate: bool = False) -> None:
    """The second half of `linear`, for a caller that keeps unpacked weights.

    x: [rows, in_features] from `round_activation`. dense: [out_features, in_features] from `unpack`, in x's dtype.
    """
    result = x @ dense.T
    if bias is not None:
        result = result + bias
    if accumulate:
        out += result
    else:
        out.copy_(result)


def rounded(x: Tensor, weight_dtype: str) -> Tensor:
    """What `linear` takes for x where it multiplies several pieces of a weight: here x itself, rounded every time."""
    return x


def round_activation(x: Tensor, weight_dtype: str) -> Tensor:
    """The input of a linear layer as the arithmetic of `weight_dtype` sees it, in the dtype and shape of `x`."""
    check_weight_dtype(weight_dtype)
    if weight_dtype in ("fp32", "fp16"):
        return x
    if weight_dtype == "bf16":
        return x.float().to(torch.bfloat16).to(x.dtype)
    q, scale = quantize_activation(x)
    return (q.to(x.dtype) * scale.to(x.dtype)[..., None]).flatten(1)[:, : x.shape[-1]]


def quantize_activation(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise each row per group of 64 inputs: (int8 [rows, groups, 64], float32 scale [rows, groups]).

    x: [rows, in_features], padded with zeros to whole groups. scale = absmax / 127, q = round_half_even(x / scale).
    """
    groups = -(-x.shape[-1] // GROUP)
    padded = torch.nn.functional.pad(x.float(), (0, groups * GROUP - x.shape[-1]))
    grouped = padded.view(x.shape[0], groups, GROUP)
    scale = grouped.abs().amax(-1) / 127.0
    q = torch.round(grouped / torch.where(scale == 0, 1.0, scale)[..., None])
    return q.clamp(-127, 127).to(torch.int8), scale


def compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
