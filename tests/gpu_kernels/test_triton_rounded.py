"""An op and the rounding of its result in one launch: bit for bit what two launches give."""

from __future__ import annotations

import pytest
import torch

from tests.support.kernels.kernel_data import normal

pytest.importorskip("triton", reason="triton is not installed (the test extra has it on x86-64 Linux)")

from gpu_kernels import elementwise, linear_layer
from gpu_kernels.fused import rounded_ops

# (weight dtype, rows, the most rows in int8): each way to store what is rounded. Many rows stand where an ordinary run
# gives them few columns.
ORDERS = [("q4", 70, 512), ("q4", 1, 64), ("q8", 3, 64), ("q4_k", 2, 64), ("q8", 70, 64), ("bf16", 2, 64)]


def same(fused, plain) -> bool:
    """Whether both hold the same bits; scales of rows that are padding are nobody's."""
    assert fused.shape == plain.shape and len(fused.values) == len(plain.values)
    return all(torch.equal(a, b) for a, b in zip(fused.values, plain.values, strict=True))


def awkward(*shape: int) -> torch.Tensor:
    """Values of very different sizes, with a group of zeros."""
    x = normal(*shape, seed=5) * torch.tensor([1e-6, 1.0, 1e3]).repeat(shape[1] // 3 + 1)[: shape[1]]
    x[-1, :64] = 0.0
    return x


@pytest.mark.table
@pytest.mark.parametrize("dtype,rows,limit", ORDERS)
@pytest.mark.parametrize("hidden", [64, 200, 1088])
def test_norm_and_rounding_are_those_of_two_launches(device, dtype, rows, limit, hidden):
    x, weight = awkward(rows, hidden + 3).to(device)[:, :hidden], normal(hidden, seed=2).to(device)
    together, apart = (torch.full((rows, hidden), torch.nan, device=device) for _ in range(2))

    fused = rounded_ops.rounded_norm(x, weight, 1e-5, together, dtype, limit)
    elementwise.rms_norm(x, weight, 1e-5, apart)

    assert torch.equal(together, apart)
    assert same(fused, linear_layer.rounded(apart, dtype, limit))


@pytest.mark.table
@pytest.mark.parametrize("dtype,rows,limit", ORDERS)
@pytest.mark.parametrize("activation,units", [("silu_mul", 3), ("gelu_mul", 70)])
def test_activation_and_rounding_are_those_of_two_launches(device, dtype, rows, limit, activation, units):
    gate_up = awkward(rows, 32 * units).to(device)
    together, apart = (torch.full((rows, 16 * units), torch.nan, device=device) for _ in range(2))

    fused = rounded_ops.rounded_gated(gate_up, together, activation, dtype, limit)
    getattr(elementwise, activation)(gate_up, apart)

    assert torch.equal(together, apart)
    assert same(fused, linear_layer.rounded(apart, dtype, limit))


def test_rows_that_are_narrow_or_missing_are_rounded_too(device):
    for rows, hidden in ((2, 16), (0, 64)):
        x, out = torch.ones(rows, hidden, device=device), torch.zeros(rows, hidden, device=device)
        fused = rounded_ops.rounded_norm(x, x.new_ones(hidden), 1e-5, out, "q4")
        assert same(fused, linear_layer.rounded(out, "q4"))
    empty = torch.zeros(0, 16, device=device)
    assert same(rounded_ops.rounded_gated(empty.new_zeros(0, 32), empty, "silu_mul", "q8"),
                linear_layer.rounded(empty, "q8"))  # fmt: skip
