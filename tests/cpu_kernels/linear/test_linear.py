"""linear on every instruction set against float64 over the dequantised weights and the input as quantised."""

import pytest
import torch

from cpu_kernels import CpuKernels
from cpu_kernels.formats import weights as layout
from tests.support.kernels.cpu_oracles import (
    BF16_PATHS,
    ISAS,
    guarded,
    kernels,
    nmse,
    only_inside_written,
    pack,
    round_input,
    unpack,
)

KERNEL_NMSE = 1e-11  # research: 7e-14 to 3e-13 measured for float32 accumulation
DTYPES = layout.WEIGHT_DTYPES


def make(rows: int, in_features: int, blocks: int, weight_dtype: str):
    """Inputs of one linear: (x, packed weight, expected output in float64)."""
    torch.manual_seed(rows + in_features)
    weight = pack(torch.randn(16 * blocks, in_features), weight_dtype)
    x = torch.randn(rows, in_features)
    return x, weight, round_input(x, weight_dtype) @ unpack(weight, weight_dtype, in_features).T


@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 7, 15, 19])
@pytest.mark.parametrize("in_features", [1, 63, 100, 192])
def test_agrees_with_float64(rows, in_features, weight_dtype):
    x, weight, expected = make(rows, in_features, 3, weight_dtype)
    out, memory = guarded(rows, 48)

    kernels().linear(x, weight, weight_dtype, None, out)

    assert only_inside_written(memory)
    assert nmse(out, expected) < KERNEL_NMSE


@pytest.mark.parametrize(
    ("isa", "weight_dtype"),
    [*((isa, name) for isa in ISAS for name in ("q8", "q4")), *((isa, "bf16") for isa in BF16_PATHS)],
)
def test_every_isa_agrees_with_float64(isa, weight_dtype):
    x, weight, expected = make(15, 200, 5, weight_dtype)
    out, memory = guarded(15, 80)

    kernels(isa).linear(x, weight, weight_dtype, None, out)

    assert only_inside_written(memory)
    assert nmse(out, expected) < KERNEL_NMSE


@pytest.mark.parametrize("weight_dtype", DTYPES)
def test_long_inputs_are_summed_in_pieces(weight_dtype):
    x, weight, expected = make(17, 4160, 1, weight_dtype)
    bias, out = torch.randn(16), torch.ones(17, 16)

    kernels().linear(x, weight, weight_dtype, bias, out, accumulate=True)

    assert nmse(out, expected + bias + 1) < KERNEL_NMSE


@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 5])
def test_bias_and_accumulate(rows, weight_dtype):
    x, weight, expected = make(rows, 96, 2, weight_dtype)
    bias, out = torch.randn(32), torch.randn(rows, 32)
    before = out.clone()

    kernels().linear(x, weight, weight_dtype, bias, out, accumulate=True)

    assert nmse(out, expected + bias + before) < KERNEL_NMSE


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("weight_dtype", ["q8", "q4"])
def test_integer_dot_is_exact(isa, weight_dtype):
    """Codes at their extremes with unit scales: any saturation or rounding inside the dot shows as a wrong integer."""
    in_features, rows = 192, 5
    weight = torch.zeros(2, layout.block_bytes(weight_dtype, in_features), dtype=torch.uint8)
    superblocks = weight.view(2, in_features // 64, -1)
    superblocks[:, :, 64:] = torch.where(torch.rand(superblocks[:, :, 64:].shape) < 0.5, 255, 1).to(torch.uint8)
    scales = torch.ones(32 if weight_dtype == "q8" else 16, dtype=torch.float16).view(torch.uint8)
    superblocks[:, :, : scales.numel()] = scales
    x = torch.where(torch.rand(rows, in_features) < 0.5, 127.0, -127.0)
    x[:, 3] = 1.0
    out = torch.empty(rows, 32)

    kernels(isa).linear(x, weight, weight_dtype, None, out)

    assert torch.equal(out.double(), x.double() @ unpack(weight, weight_dtype, in_features).T)


@pytest.mark.parametrize("weight_dtype", DTYPES)
def test_a_bad_input_value_shows_in_its_row_only(weight_dtype):
    x, weight, _ = make(3, 100, 1, weight_dtype)
    x[1, 70] = float("nan")
    out = torch.zeros(3, 16)

    kernels().linear(x, weight, weight_dtype, None, out)

    assert out[1].isnan().all() and not out[[0, 2]].isnan().any()


@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_threads_and_repeats_never_change_a_bit(num_threads, weight_dtype):
    torch.manual_seed(0)
    x, weight = torch.randn(5, 320), pack(torch.randn(640, 320), weight_dtype)
    first, again = torch.empty(5, 640), torch.empty(5, 640)
    kernels().linear(x, weight, weight_dtype, None, first)

    with CpuKernels(num_threads=num_threads) as ops:
        for _ in range(5):
            ops.linear(x, weight, weight_dtype, None, again)
            assert torch.equal(first, again)


@pytest.mark.parametrize("rows", [0, 4])
def test_strided_input_and_no_rows(rows):
    x, weight, expected = make(rows, 64, 2, "bf16")
    strided = torch.full((rows, 80), float("nan"))
    strided[:, :64] = x
    out = torch.empty(rows, 32)

    kernels().linear(strided[:, :64], weight, "bf16", None, out)

    assert rows == 0 or nmse(out, expected) < KERNEL_NMSE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 65)}, "weight has shape"),
        ({"x": torch.zeros(2, 64, dtype=torch.bfloat16)}, "x is torch.bfloat16"),
        ({"x": torch.zeros(64, 2).T}, "contiguous"),
        ({"weight_dtype": "q5"}, "fp32, bf16, q8, q4"),
        ({"bias": torch.zeros(31)}, "bias has shape"),
        ({"out": torch.zeros(2, 48)}, "out has shape"),
    ],
)
def test_wrong_arguments_name_the_rule(change, message):
    arguments = {
        "x": torch.zeros(2, 64),
        "weight": torch.zeros(2, layout.block_bytes("bf16", 64), dtype=torch.uint8),
        "weight_dtype": "bf16",
        "bias": None,
        "out": torch.zeros(2, 32),
    }

    with pytest.raises(ValueError, match=message):
        kernels().linear(**(arguments | change))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("weight_dtype", ["q8", "q4"])
@pytest.mark.parametrize("rows", [1, 5, 70])
def test_a_column_is_the_same_to_the_bit_wherever_the_cut_lies(isa, weight_dtype, rows):
    """Its integer sums are exact and its float sums run over its own groups: moving the boundary between CPU columns
    and others, or the number of columns, changes no bit of those that stay."""
    x, weight, _ = make(rows, 200, 9, weight_dtype)
    whole, part = torch.empty(rows, 144), torch.empty(rows, 144)
    kernels(isa).linear(x, weight, weight_dtype, None, whole)
    for first in (1, 4, 8):
        kernels(isa).linear(x, weight[first:], weight_dtype, None, part[:, 16 * first :])

        assert torch.equal(part[:, 16 * first :], whole[:, 16 * first :])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("weight_dtype", ["q8", "q4"])
def test_rows_beside_each_other_change_no_bit(isa, weight_dtype):
    """Panels of any size, and those whose last rows come again to fill them."""
    x, weight, _ = make(16, 200, 3, weight_dtype)
    alone = torch.empty(16, 48)
    for row in range(16):
        kernels(isa).linear(x[row : row + 1], weight, weight_dtype, None, alone[row : row + 1])
    for rows in range(2, 17):
        out, memory = guarded(rows, 48)
        kernels(isa).linear(x[:rows], weight, weight_dtype, None, out)

        assert only_inside_written(memory) and torch.equal(out, alone[:rows])


@pytest.mark.parametrize("weight_dtype", ["q8", "q4"])
@pytest.mark.parametrize("rows", [1, 5, 70])
def test_threads_change_no_bit(weight_dtype, rows):
    x, weight, _ = make(rows, 200, 9, weight_dtype)
    outs = []
    for threads in (1, 2, 3):
        with CpuKernels(threads) as ops:
            outs.append(torch.empty(rows, 144))
            ops.linear(x, weight, weight_dtype, None, outs[-1])

    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])
