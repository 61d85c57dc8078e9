"""The reference operations with no number rounded on its way into them: what exact arithmetic gives for packed weights.

Weights stay as they are packed; activations, queries and attention weights are not rounded to int8 or bf16. Keys and
values must lie in float32 pages. Outputs are written in place, as by `gpu_kernels.reference`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cpu_kernels.contract import Partial, Picks
from gpu_kernels import reference


class UnroundedOps:
    """Operations that compute in `dtype`, float32 or float64, whatever the weights are packed as."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def linear(
        self, x: Tensor, weight: Tensor, weight_dtype: str, bias: Tensor | None, out: Tensor, accumulate: bool = False
    ) -> None:
        """As `reference.linear`, but `x` is not rounded."""
        for name, blocks, columns in reference.mixed_parts(weight, weight_dtype, x.shape[-1]):
            dense = reference.unpack(blocks, name, x.shape[-1], self._dtype)
            result = torch.empty(x.shape[0], dense.shape[0], dtype=self._dtype, device="cpu")
            reference.linear_unpacked(x.to(self._dtype), dense, None if bias is None else bias[columns], result)
            if accumulate:
                out[:, columns] += result
            else:
                out[:, columns] = result.to(out.dtype)

    def expert_linear(self, x: Tensor, picks: Picks, weight: Tensor, weight_dtype: str, out: Tensor) -> None:
        """As `reference.expert_linear`, but `x` is not rounded."""
        sources, starts, first, _ = picks
        bounds = starts[first : first + weight.shape[0] + 1].tolist()
        for expert, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
            if start < stop:
                rows = x[start:stop] if sources is None else x[sources[start:stop].long()]
                self.linear(rows, weight[expert], weight_dtype, None, out[start:stop])

    def unpack_rows(self, weight: Tensor, weight_dtype: str, row_ids: Tensor, out: Tensor) -> None:
        """As `reference.unpack_rows`: nothing is rounded there."""
        reference.unpack_rows(weight, weight_dtype, row_ids, out)

    def copy_rows(self, target: Tensor, source: Tensor) -> None:
        """As `reference.copy_rows`, which writes its first argument."""
        reference.copy_rows(target, source)

    def norm_heads(self, qkv: Tensor, q_norm: Tensor, k_norm: Tensor, eps: float) -> None:
        """As `reference.norm_heads`."""
        wide = qkv.to(self._dtype)
        reference.norm_heads(wide, q_norm, k_norm, eps)
        qkv.copy_(wide)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """Every other operation: the reference's, whose arithmetic follows the dtype of its first argument."""
        operation = getattr(reference, name)
        return lambda first, *others: operation(self._widened(first), *others)

    def _widened(self, first: Any) -> Any:
        if isinstance(first, Tensor):
            return first.to(self._dtype)
        return [Partial(*(tensor.to(self._dtype) for tensor in partial)) for partial in first]  # of merge
