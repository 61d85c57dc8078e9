"""The linear op over packed blocks in all three row regimes, against float64 over the bytes read one at a time."""

from __future__ import annotations

import kernel_checks as checks
import pytest
import torch
from kernel_data import normal

pytest.importorskip("triton", reason="triton is not installed (the test extra has it on x86-64 Linux)")

from gpu_kernels import linear_layer, quantized_linear, reference  # noqa: E402


@pytest.mark.parametrize("weight_dtype", ["q4", "q8"])
@pytest.mark.parametrize("rows,num_blocks,in_features", [
    (1, 3, 100), (1, 2, 2112), (1, 1, 64), (2, 3, 100), (5, 2, 2112), (16, 1, 320), (17, 3, 130), (33, 5, 64),
    (65, 3, 100), (130, 5, 192),
])
def test_quantised_linear(device, weight_dtype, rows, num_blocks, in_features):
    checks.check_linear(linear_layer.linear, device, weight_dtype, rows, num_blocks, in_features)


@pytest.mark.parametrize("weight_dtype", ["q4", "q8"])
@pytest.mark.parametrize("rows,in_features", [(1, 64), (1, 2112), (3, 64), (3, 2112), (70, 64)])
def test_quantised_linear_accumulates(device, weight_dtype, rows, in_features):
    checks.check_linear(linear_layer.linear, device, weight_dtype, rows, 3, in_features, with_bias=False,
                        accumulate=True)


@pytest.mark.parametrize("weight_dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("rows,in_features,with_bias,accumulate", [(1, 100, True, False), (9, 64, False, True)])
def test_dense_linear(device, weight_dtype, rows, in_features, with_bias, accumulate):
    checks.check_linear(linear_layer.linear, device, weight_dtype, rows, 3, in_features, with_bias, accumulate)


@pytest.mark.parametrize("weight_dtype", ["q4", "q8"])
def test_quantised_activations_are_those_of_the_reference(device, weight_dtype):
    x = normal(3, 200, seed=1) * torch.tensor([[1e-6], [1.0], [1e6]])
    expected, expected_scale = reference.quantize_activation(x)

    q, scale, sums = quantized_linear.quantize_activation(x.to(device), weight_dtype)
    q = q.cpu().view(3, 4, 64)
    if weight_dtype == "q4":  # stored as [low or high nibble, line, byte]; input = 8 * line + 4 * high + byte
        q = q.view(3, 4, 2, 8, 4).transpose(2, 3).reshape(3, 4, 64)

    assert torch.equal(q, expected)
    assert torch.equal(scale.cpu(), expected_scale)
    assert torch.allclose(sums.cpu(), expected_scale * expected.float().sum(-1), rtol=1e-6)


def test_a_wrong_weight_is_refused(device):
    x, out = torch.zeros(1, 64, device=device), torch.zeros(1, 16, device=device)

    with pytest.raises(ValueError, match="'q5' is unknown"):
        linear_layer.linear(x, torch.zeros(1, 576, dtype=torch.uint8, device=device), "q5", None, out)
    with pytest.raises(AssertionError, match="1088"):
        linear_layer.linear(x, torch.zeros(1, 576, dtype=torch.uint8, device=device), "q8", None, out)


def test_no_rows_and_no_blocks_are_accepted(device):
    x, weight = torch.zeros(2, 64, device=device), torch.zeros(1, 576, dtype=torch.uint8, device=device)

    linear_layer.linear(x[:0], weight, "q4", None, torch.zeros(0, 16, device=device))
    linear_layer.linear(x, weight[:0], "q4", None, torch.zeros(2, 0, device=device))
