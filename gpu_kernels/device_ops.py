"""The ops of this package together with what one of them keeps on the device from call to call."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import gpu_kernels
from cpu_kernels.contract import Pages, Partial, RowKeys

COUNTERS = 256  # sequences times KV heads of one decode; more of them fill a GPU without being split


class DeviceOps:
    """Every op of `gpu_kernels`, for the calls and captured graphs of one stream at a time.

    Keeps the counters by which the splits of a decode attention find out who is last. A call leaves them zero, as it
    finds them, so nothing clears them in between. They are ready when the work queued here is done.

    int8_rows: the most rows that this card multiplies in int8, by weight format; see `linear_layer`.
    """

    def __init__(self, device: torch.device | str, int8_rows: Mapping[str, int] | None = None) -> None:
        self._int8_rows = {format_name: {"int8_rows": rows} for format_name, rows in (int8_rows or {}).items()}
        self._arrivals = torch.zeros(COUNTERS, dtype=torch.int32, device=device)
        self._counted: Any = None  # imported as late as the other ops: it needs Triton

    def __getattr__(self, name: str) -> Any:
        """An op of the package, which is looked up, and its module imported, once."""
        op = getattr(gpu_kernels, name)
        setattr(self, name, op)
        return op

    def clear(self) -> None:
        """Count from zero again, after a launch that was given up half-way."""
        self._arrivals.zero_()

    def rounded(self, x: Tensor, weight_dtype: str) -> Any:
        """x as a linear of that format rounds it; see gpu_kernels.linear_layer.rounded."""
        return gpu_kernels.rounded(x, weight_dtype, **self._int8_rows.get(weight_dtype, {}))

    def rounded_norm(self, x: Tensor, weight: Tensor, eps: float, out: Tensor, weight_dtype: str) -> Any:
        """RMS norm into `out`, and its rounding as this card multiplies it with such a weight, in one launch."""
        return gpu_kernels.rounded_norm(x, weight, eps, out, weight_dtype, **self._int8_rows.get(weight_dtype, {}))

    def rounded_gated(self, gate_up: Tensor, out: Tensor, activation: str, weight_dtype: str) -> Any:
        """The activation into `out`, and its rounding as this card multiplies it with such a weight, in one launch."""
        limit = self._int8_rows.get(weight_dtype, {})
        return gpu_kernels.rounded_gated(gate_up, out, activation, weight_dtype, **limit)

    def linear(
        self, x: Any, weight: Tensor, weight_dtype: str, bias: Tensor | None, out: Tensor, accumulate: bool = False
    ) -> None:
        inputs = self.rounded(x, weight_dtype) if isinstance(x, Tensor) else x
        gpu_kernels.linear(inputs, weight, weight_dtype, bias, out, accumulate)

    def decode_attention(
        self, q: Tensor, pages: Pages, keys: RowKeys, scale: float, into: Partial, cap: float = 0.0
    ) -> None:
        if self._counted is None:
            self._counted = importlib.import_module("gpu_kernels.attention.decode").counted_decode_attention
        self._counted(self._arrivals, q, pages, keys, scale, into, cap)
