"""Copies, norms and gated activations, alone and with the rounding of the linear behind them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gpu_kernels.experts import ordered
from gpu_kernels.reference.linear_layer import rounded
from gpu_kernels.reference.packed import BLOCK_FEATURES

GELU_FACTOR, GELU_CUBIC = -2.0 * math.sqrt(2.0 / math.pi), 0.044715


def copy_rows(target: Tensor, source: Tensor) -> None:
    """target = source, both f32 [rows, columns]."""
    target.copy_(source)


def add_rows(target: Tensor, source: Tensor) -> None:
    """target += source, both f32 [rows, columns]."""
    target += source


def rounded_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor, weight_dtype: str) -> Tensor:
    """`rms_norm` into `out`, and what `rounded` makes of it."""
    rms_norm(x, weight, eps, out)
    return rounded(out, weight_dtype)


def rounded_gated(gate_up: Tensor, out: Tensor, activation: str, weight_dtype: str) -> Tensor:
    """`silu_mul` or `gelu_mul`, as `activation` says, into `out`, and what `rounded` makes of it."""
    (silu_mul if activation == "silu_mul" else gelu_mul)(gate_up, out)
    return rounded(out, weight_dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor, accumulate: bool = False) -> None:
    result = rms_normalized(x, weight, eps)
    out.copy_(out + result if accumulate else result)


def rms_normalized(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, out: Tensor) -> None:
    normed = rms_normalized(x - x.mean(-1, keepdim=True), weight, eps)
    out.copy_(normed if bias is None else normed + bias)


def gelu(x: Tensor, out: Tensor) -> None:
    out.copy_(torch.nn.functional.gelu(x, approximate="tanh"))


def gather_columns(x: Tensor, order: Tensor, out: Tensor) -> None:
    out.copy_(x[:, order.long()])


def silu_mul(gate_up: Tensor, out: Tensor) -> None:
    gate, up = _gate_and_up(gate_up)
    power = ordered.exp(-gate) if gate.dtype == torch.float32 else torch.exp(-gate)
    out.copy_((gate / (1.0 + power) * up).flatten(1))


def clamped_silu_mul(gate_up: Tensor, alpha: float, limit: float, out: Tensor) -> None:
    gate, up = _gate_and_up(gate_up)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    power = ordered.exp(gate * -alpha) if gate.dtype == torch.float32 else torch.exp(gate * -alpha)
    out.copy_(((up + 1.0) * (gate / (1.0 + power))).flatten(1))


def sigmoid_mul(gate: Tensor, out: Tensor) -> None:
    out.copy_(out / (1.0 + torch.exp(-gate)))


def gelu_mul(gate_up: Tensor, out: Tensor) -> None:
    gate, up = _gate_and_up(gate_up)
    power = (gate * GELU_FACTOR) * (1.0 + gate * gate * GELU_CUBIC)
    power = ordered.exp(power) if gate.dtype == torch.float32 else torch.exp(power)
    out.copy_((gate / (1.0 + power) * up).flatten(1))


def _gate_and_up(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    return gate_up.unflatten(-1, (gate_up.shape[-1] // 32, 2, BLOCK_FEATURES)).unbind(-2)


def norm_heads(qkv: Tensor, q_norm: Tensor, k_norm: Tensor, eps: float) -> None:
    kv_heads, q_width, k_width = qkv.shape[1], q_norm.shape[0] // qkv.shape[1], k_norm.shape[0] // qkv.shape[1]
    parts = (qkv[:, :, :q_width], q_norm), (qkv[:, :, q_width : q_width + k_width], k_norm)
    for part, weight in parts:
        inverse = torch.rsqrt(part.square().mean((1, 2), keepdim=True) + eps)
        part.copy_(part * inverse * weight.view(kv_heads, -1))
