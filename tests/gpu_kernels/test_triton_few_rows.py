"""Few rows over coded and float16 blocks in Triton, read as they lie: the reference's results in another order of sums."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch

from gpu_kernels import linear_layer, reference
from gpu_kernels.activation import quantize_activation
from gpu_kernels.forms import few_number_rows, few_rows
from gpu_kernels.forms.unpack import FORMS
from tests.gpu_kernels.test_triton_experts import weight_of
from tests.support.gpu.watched_loads import watched_loads
from tests.support.kernels.kernel_checks import Guarded
from tests.support.planted import planted

FLOAT32 = 1e-11  # NMSE of sums in another order; weights rounded to bf16 would give 2e-6
BLOCKS = 3


def error_of(op, device, name, rows, in_features, bias=True, accumulate=False) -> float:
    """NMSE of a linear to the reference; interpreted, nothing is read behind the tensors."""
    weight = weight_of(name, in_features, 1, BLOCKS)[0]
    drawn = torch.Generator().manual_seed(rows)
    x, before = torch.randn(rows, in_features, generator=drawn), torch.randn(rows, 16 * BLOCKS, generator=drawn)
    added = torch.randn(16 * BLOCKS, generator=drawn) if bias else None
    expected = before.clone()
    reference.linear(x, weight, name, added, expected, accumulate)
    out = Guarded(device, rows, 16 * BLOCKS, fill=before)
    with watched_loads() if device == "cpu" else nullcontext():
        op(x.to(device), weight.to(device), name, None if added is None else added.to(device), out.view, accumulate)
    return ((out.result() - expected).double().square().sum() / expected.double().square().sum()).item()


def groups_of(name: str) -> int:
    """Inputs of a superblock: as few as a linear can have."""
    return FORMS[name].inputs if name in FORMS else 64


@pytest.mark.table
@pytest.mark.parametrize("name", [*FORMS, "fp16"])
@pytest.mark.parametrize("superblocks,rows,accumulate", [(1, 1, False), (9, 1, True), (3, 8, False)])
def test_few_rows_are_the_references(device, name, superblocks, rows, accumulate):
    """One superblock leaves warps without a group; nine groups or more take several turns of all of them."""
    in_features = superblocks * groups_of(name)

    error = error_of(linear_layer.linear, device, name, rows, in_features, bias=not accumulate, accumulate=accumulate)

    assert error <= FLOAT32


@pytest.mark.parametrize("in_features", [100, 101, 1030])
def test_float16_rows_of_any_length(device, in_features):
    assert error_of(linear_layer.linear, device, "fp16", 3, in_features) <= FLOAT32


@pytest.mark.parametrize("name", ["q4_k", "nf4", "fp16"])
def test_more_rows_are_multiplied_as_many_are(device, name, monkeypatch):
    """Nine rows are too many for these kernels, and eight are not."""
    called = []

    def counted(op):
        def counting(*arguments):
            called.append(op)
            op(*arguments)

        return counting

    for op in ("multiply_few_rows", "multiply_few_number_rows", "multiply_few_half_rows"):
        monkeypatch.setattr(linear_layer, op, counted(getattr(linear_layer, op)))

    assert error_of(linear_layer.linear, device, name, 8, 256) <= FLOAT32 and len(called) == 1
    assert error_of(linear_layer.linear, device, name, 9, 256) <= 2e-5 and len(called) == 1


@pytest.mark.parametrize("number", [0.0, 448.0, -448.0, 2.0**-9, -1.75 * 2.0**-6])
def test_every_kind_of_fp8_number_is_itself(device, number):
    """Zero, the largest, the smallest subnormal, and what has a mantissa."""
    codes = torch.full((16, 128), number).to(torch.float8_e4m3fn).view(torch.uint8)
    lines = codes.view(16, 32, 4).permute(1, 0, 2).reshape(-1)
    weight = torch.cat([torch.ones(16).view(torch.uint8), lines])[None].contiguous().to(device)
    out = torch.empty(1, 16, device=device)

    linear_layer.linear(torch.ones(1, 128, device=device), weight, "fp8", None, out)

    assert out[0].tolist() == pytest.approx([number * 128] * 16, rel=1e-6)


def rounded_first(multiply):
    """An op of plain inputs."""

    def op(x, weight, weight_dtype, bias, out, accumulate):
        given = x if weight_dtype == "fp16" else quantize_activation(x, "own")
        call = partial(multiply, given, weight)
        call(*(() if weight_dtype == "fp16" else (weight_dtype,)), bias, out, accumulate)

    return op


WHOLE, NUMBERS = (few_rows, "multiply_few_rows"), (few_number_rows, "multiply_few_number_rows")
HALVES = (few_number_rows, "multiply_few_half_rows")
# name: (module and op, format, right text, wrong text)
MUTANTS = {
    "inputs of the other half of a line": (WHOLE, "q4_k", "dot4(high, wide_high", "dot4(high, wide_low"),
    "minima forgotten": (WHOLE, "q4_k", "total += minimum", "total += 0.0 * minimum"),
    "sums of half a line": (WHOLE, "q4_1", "dot4(ones, x_high, dot4", "dot4(ones, 0 * x_high, dot4"),
    "zero points forgotten": (WHOLE, "int4_g64", "+= minimum", "+= 0.0 * minimum"),
    "codes keep the offset": (WHOLE, "int8", "mask=mask, other=0) ^ -2139062144", "mask=mask, other=0)"),
    "the other line of bytes": (WHOLE, "int8", "line * 32 + 16", "line * 32"),
    "warps share a group": (WHOLE, "q6_k", "+ tl.arange(0, WARPS)", "+ 0 * tl.arange(0, WARPS)"),
    "a step is left out": (WHOLE, "q5_k", "tl.static_range(UNROLL)", "tl.static_range(UNROLL - 1)"),
    "the last group is left out": (WHOLE, "q4_0", "inside = group < num_groups", "inside = group < num_groups - 1"),
    "scales of another superblock": (
        WHOLE,
        "iq4_xs",
        "scale_and_minimum(superblock,",
        "scale_and_minimum(block + 0 * group,",
    ),
    "scales of another group": (WHOLE, "mxfp4", "superblock, group % TOGETHER", "superblock, 0 * group"),
    "rows take the first one's inputs": (WHOLE, "q5_0", "(q + row * q_stride)", "(q + 0 * row)"),
    "rows take the first one's scales": (WHOLE, "q5_0", "* scale_stride + row", "* scale_stride + 0 * row"),
    "the bias is forgotten": (WHOLE, "q4_k", "result += tl.load(bias + columns)", "result += 0.0"),
    "numbers of the first half twice": (NUMBERS, "fp8", "_number(high, 8", "_number(low, 8"),
    "the sign of a byte is lost": (NUMBERS, "fp8", "code & 128) << 8", "code & 0) << 8"),
    "inputs without a sign": (NUMBERS, "fp8_g32", ">> 24).to(tl.float32)", ">> 24 & 255).to(tl.float32)"),
    "halves of the table change places": (NUMBERS, "nf4", "(code & HALF) != 0", "(code & HALF) == 0"),
    "bytes of a word in the wrong order": (
        NUMBERS,
        "nf4",
        "_signed_byte(x_low, index)",
        "_signed_byte(x_low, 3 - index)",
    ),
    "a 256th": (NUMBERS, "fp8", "256.0 if IS_E4M3", "1.0 if IS_E4M3"),
    "pairs change places": (HALVES, "fp16", "inputs + 1, mask", "inputs, mask"),
    "pairs behind the last": (HALVES, "fp16", "inside = at < in_features // 2", "inside = at <= in_features // 2"),
}


@pytest.mark.usefixtures("only_interpreted")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_bug_is_seen(device, name, tmp_path):
    (module, op), form, right, wrong = MUTANTS[name]
    mutant = planted.load_mutant(tmp_path, Path(module.__file__), right, wrong)
    sizes = {"rows": 2, "in_features": 9 * groups_of(form)}

    assert error_of(rounded_first(getattr(module, op)), device, form, **sizes) <= FLOAT32
    with pytest.raises(AssertionError):
        assert error_of(rounded_first(getattr(mutant, op)), device, form, **sizes) <= FLOAT32
