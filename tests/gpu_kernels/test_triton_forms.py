"""Linears over the coded formats of files on the GPU lane, against the reference, which unpacks by its own hand."""

import pytest
import torch

from gpu_kernels import linear_layer, reference
from gpu_kernels.forms.dequantize import dequantize_form
from gpu_kernels.forms.unpack import FORMS
from tests.support.kernels.cpu_oracles import kernels
from tests.support.models.gguf_data import CODED, random_rows, repacked
from tests.support.quantised.int4_data import BITS_AND_GROUPS, packed, random_groups
from tests.support.quantised.scaled_data import KINDS, random_blocks
from tests.support.quantised.scaled_data import packed as packed_blocks

by_form = pytest.mark.parametrize("kind", [kind for kind in CODED if kind.format in FORMS], ids=lambda kind: kind.name)


def nmse(actual, expected):
    return ((actual.double() - expected.double()).square().sum() / expected.double().square().sum()).item()


@by_form
@pytest.mark.parametrize("blocks", [1, 3])
def test_dequantised_values_are_the_references_rounded_to_bf16(device, kind, blocks):
    in_features = blocks * kind.items
    weight = repacked(kernels(), kind, random_rows(kind, 32, in_features)).to(device)

    actual = dequantize_form(weight, kind.format, in_features)[:, :in_features]

    assert torch.equal(actual.float(), reference.unpack(weight, kind.format, in_features).to(torch.bfloat16).float())


@by_form
@pytest.mark.parametrize("rows", [1, 9])
def test_linear_agrees_with_the_reference(device, kind, rows):
    torch.manual_seed(rows)
    weight, x = repacked(kernels(), kind, random_rows(kind, 32, 256)).to(device), torch.randn(rows, 256, device=device)
    bias, before = torch.randn(32, device=device), torch.randn(rows, 32, device=device)
    actual, expected = before.clone(), before.clone()

    linear_layer.linear(x, weight, kind.format, bias, actual, accumulate=True)
    reference.linear(x, weight, kind.format, bias, expected, accumulate=True)

    assert nmse(actual, expected) < (1e-11 if rows == 1 else 2e-5)  # many: weights and inputs rounded to bf16


@pytest.mark.parametrize(("bits", "group"), BITS_AND_GROUPS)
@pytest.mark.parametrize("count", [1, 9])
def test_groups_with_zero_points_are_the_references_rounded_to_bf16(device, bits, group, count):
    name, weight = packed(kernels(), random_groups(32, group * count, group, bits=bits))
    weight = weight.to(device)

    actual = dequantize_form(weight, name, group * count)[:, : group * count]

    assert torch.equal(actual.float(), reference.unpack(weight, name, group * count).to(torch.bfloat16).float())


@pytest.mark.parametrize(("bits", "group"), BITS_AND_GROUPS)
def test_linear_over_groups_with_zero_points_agrees_with_the_reference(device, bits, group):
    name, weight = packed(kernels(), random_groups(32, 256, group, bits=bits))
    weight, x = weight.to(device), torch.randn(9, 256, device=device)
    actual, expected = torch.empty(9, 32, device=device), torch.empty(9, 32, device=device)

    linear_layer.linear(x, weight, name, None, actual)
    reference.linear(x, weight, name, None, expected)

    assert nmse(actual, expected) < 2e-5


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.format)
@pytest.mark.parametrize("count", [1, 9])
def test_groups_with_float32_scales_are_the_references_rounded_to_bf16(device, kind, count):
    in_features = kind.items * count
    weight = packed_blocks(kernels(), kind, random_blocks(kind, 32, count)[0]).to(device)

    actual = dequantize_form(weight, kind.format, in_features)[:, :in_features]

    assert torch.equal(actual.float(), reference.unpack(weight, kind.format, in_features).to(torch.bfloat16).float())


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.format)
def test_linear_over_groups_with_float32_scales_agrees_with_the_reference(device, kind):
    weight = packed_blocks(kernels(), kind, random_blocks(kind, 32, 512 // kind.items)[0]).to(device)
    x = torch.randn(9, 512, device=device)
    actual, expected = torch.empty(9, 32, device=device), torch.empty(9, 32, device=device)

    linear_layer.linear(x, weight, kind.format, None, actual)
    reference.linear(x, weight, kind.format, None, expected)

    assert nmse(actual, expected) < 2e-5


@pytest.mark.parametrize("rows", [3, 9])
def test_fp16_weights_are_multiplied_unrounded(device, rows):
    dense, x = torch.randn(32, 100).half().to(device), torch.randn(rows, 100, device=device)
    out = torch.empty(rows, 32, device=device)

    linear_layer.linear(x, dense.view(torch.uint8).reshape(2, -1), "fp16", None, out)

    assert nmse(out, x.double() @ dense.double().T) < 1e-10


@pytest.mark.parametrize("rows", [4, 9])
def test_a_mix_computes_every_format_in_its_columns(device, rows):
    parts = []
    for name, count in (("Q4_K", 2), ("Q6_K", 1)):
        kind = next(item for item in CODED if item.name == name)
        parts.append(repacked(kernels(), kind, random_rows(kind, 16 * count * 3, 256)).view(3, -1))
    weight, x = torch.cat(parts, 1).contiguous().to(device), torch.randn(rows, 256, device=device)
    actual, expected = torch.empty(rows, 144, device=device), torch.empty(rows, 144, device=device)

    linear_layer.linear(linear_layer.rounded(x, "q4_k*2+q6_k*1"), weight, "q4_k*2+q6_k*1", None, actual)
    reference.linear(x, weight, "q4_k*2+q6_k*1", None, expected)

    assert nmse(actual, expected) < 2e-5
