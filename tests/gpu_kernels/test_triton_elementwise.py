"""RMS norm, layer norm, silu_mul, gelu_mul, gelu, rope_append and copies of rows in Triton against float64."""

from __future__ import annotations

import pytest
import torch

from tests.support.kernels import kernel_checks as checks

pytest.importorskip("triton", reason="triton is not installed (the test extra has it on x86-64 Linux)")

from gpu_kernels import elementwise, rope, row_copies
from gpu_kernels.small import clamped, gather, gelu, layer_norm


@pytest.mark.parametrize("rows,hidden", [(1, 64), (3, 100), (2, 5000)])
def test_rms_norm(device, rows, hidden):
    checks.check_rms_norm(elementwise.rms_norm, device, rows, hidden)


@pytest.mark.parametrize("rows,columns", [(1, 4096), (1, 1), (3, 1030), (4, 16)])
def test_copy_rows(device, rows, columns):
    checks.check_copy_rows(row_copies.copy_rows, device, rows, columns)


@pytest.mark.parametrize("rows,columns", [(1, 4096), (3, 1030)])
def test_add_rows(device, rows, columns):
    """One kernel where a copy and an addition were: the same sums, to the bit."""
    checks.check_add_rows(row_copies.add_rows, device, rows, columns)


@pytest.mark.parametrize("rows,hidden", [(1, 64), (3, 75)])
def test_rms_norm_added(device, rows, hidden):
    checks.check_rms_norm_added(elementwise.rms_norm, device, rows, hidden)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("rows,hidden", [(1, 64), (3, 100), (2, 5000)])
def test_layer_norm(device, rows, hidden, has_bias):
    checks.check_layer_norm(layer_norm.layer_norm, device, rows, hidden, has_bias)


@pytest.mark.parametrize("rows,features", [(1, 16), (2, 1100)])
def test_gelu(device, rows, features):
    checks.check_gelu(gelu.gelu, device, rows, features)


@pytest.mark.parametrize("rows,features", [(1, 16), (2, 1100)])
def test_gather_columns(device, rows, features):
    checks.check_gather_columns(gather.gather_columns, device, rows, features)


@pytest.mark.parametrize("rows,units", [(1, 1), (2, 70)])
def test_gelu_mul(device, rows, units):
    checks.check_gelu_mul(elementwise.gelu_mul, device, rows, units)


@pytest.mark.parametrize("rows,units", [(1, 1), (3, 5), (2, 70)])
def test_silu_mul(device, rows, units):
    checks.check_silu_mul(elementwise.silu_mul, device, rows, units)


@pytest.mark.parametrize("rows,units", [(1, 1), (2, 70)])
def test_clamped_silu_mul(device, rows, units):
    checks.check_clamped_silu_mul(clamped.clamped_silu_mul, device, rows, units)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "num_kv_heads,queries_per_kv,head_dim,rotary_dim,norms",
    [
        (2, 3, 64, 64, (False, False)),
        (1, 1, 80, 80, (True, True)),
        (2, 2, 48, 24, (True, False)),
        (1, 4, 16, 4, (False, True)),
    ],
)
def test_rope_append(device, dtype, num_kv_heads, queries_per_kv, head_dim, rotary_dim, norms):
    checks.check_rope_append(rope.rope_append, device, dtype, num_kv_heads, queries_per_kv, head_dim, rotary_dim, norms)


def test_ops_accept_no_rows(device):
    none = torch.zeros(0, 32, device=device)

    elementwise.rms_norm(none, torch.ones(32, device=device), 1e-6, none)
    elementwise.silu_mul(none, none[:, :16])
    layer_norm.layer_norm(none, torch.ones(32, device=device), None, 1e-6, none)
    gelu.gelu(none, none)
    gather.gather_columns(none, torch.zeros(none.shape[1], dtype=torch.int32), none)
    row_copies.copy_rows(none, none)
    row_copies.add_rows(none, none)
