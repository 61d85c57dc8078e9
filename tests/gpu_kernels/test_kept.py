"""Launches by kept forms pass what Triton's own would pass, to the form that Triton would choose; no GPU is asked."""

from __future__ import annotations

import os
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (the test extra has it on x86-64 Linux)")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels have no compiled form to keep", allow_module_level=True)

import triton  # noqa: E402
from triton.compiler.compiler import CompiledKernel  # noqa: E402
from triton.runtime.driver import driver  # noqa: E402

from gpu_kernels import elementwise, linear_layer, reference  # noqa: E402
from gpu_kernels.attention_merge import merge  # noqa: E402
from gpu_kernels.kept import KNOWN_RELEASES, KeptKernel, _facts  # noqa: E402
from tests.support.ahead_of_time import _NamedTarget  # noqa: E402


@pytest.fixture
def launches(monkeypatch):
    """Every launch as (form, arguments of the launcher beyond its hooks), in order; kernels are compiled for sm_90."""
    seen = []

    def run(kernel):
        return lambda *arguments: seen.append((id(kernel), *arguments[:4], *arguments[9:]))

    monkeypatch.setattr(driver, "_active", _NamedTarget(90))
    monkeypatch.setattr(CompiledKernel, "run", property(run))
    monkeypatch.setattr(CompiledKernel, "_init_handles", lambda kernel: None)
    return seen


def calls():
    """Launches of some kernels whose arguments Triton tells apart: alignment, ones, multiples of 16, None, tuples."""
    for rows, hidden, offset in ((4, 64, 0), (4, 64, 1), (1, 64, 0), (4, 48, 0), (3, 50, 0)):
        x, weight = torch.zeros(rows * hidden + 8)[offset : offset + rows * hidden].view(rows, hidden), torch.zeros(hidden)
        yield lambda x=x, weight=weight: elementwise.rms_norm(x, weight, 1e-6, x)
    for units in (1, 2, 16, 40):
        gate_up, out = torch.zeros(3, units * 32), torch.zeros(3, units * 16)
        yield lambda gate_up=gate_up, out=out: elementwise.silu_mul(gate_up, out)
    parts = [torch.zeros(2, 4, 64) for _ in range(3)], [torch.zeros(2, 4) for _ in range(3)]
    yield lambda: merge(parts[0][:2], parts[1][:2], parts[0][0], parts[1][0])
    yield lambda: merge(*parts, parts[0][0], parts[1][0])


@pytest.mark.skipif(not triton.__version__.startswith(KNOWN_RELEASES), reason=f"triton {triton.__version__} is not kept")
def test_a_kept_launch_is_tritons_own(launches):
    for call in calls():
        del launches[:]
        with mock.patch.object(KeptKernel, "__getitem__", lambda self, grid: self.function[grid]):
            call()
        call()  # kept here, if no call before was alike
        call()

        assert len(launches) == 3
        for launch in launches[1:]:
            assert all(_same(*pair) for pair in zip(launch, launches[0], strict=True))


def _same(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return (one.data_ptr(), one.shape, one.stride(), one.dtype) == (
            other.data_ptr(), other.shape, other.stride(), other.dtype)
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return one == other


def test_a_kept_form_is_found_without_tritons_search(launches):
    x, weight = torch.zeros(4, 64), torch.zeros(64)
    elementwise.rms_norm(x, weight, 1e-6, x)
    with mock.patch.object(triton.runtime.jit.JITFunction, "run", side_effect=AssertionError("searched")):
        elementwise.rms_norm(x, weight, 1e-6, x)


@pytest.mark.parametrize("one,other", [(1, 2), (16, 17), (1 << 31, 1 << 30), (None, 1), (1.0, 1), (True, 1)])
def test_what_triton_tells_apart_is_told_apart(one, other):
    assert _facts(one, False) != _facts(other, False)


def test_what_triton_takes_as_one_is_one():
    whole = torch.zeros(64)

    assert _facts(1, True) == _facts(16, True) == _facts(17, True) != _facts(1 << 31, True)
    assert _facts(whole, False) == _facts(whole[4:], False) != _facts(whole[1:], False)
    assert _facts(whole, False) != _facts(whole.bfloat16(), False)
    assert _facts((1, whole), False) != _facts((2, whole), False)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_product_fills_its_columns_and_no_others(accumulate, in_place):
    x, dense, wide = torch.randn(5, 64), torch.randn(24, 64), torch.randn(5, 40)
    expected = wide.clone()
    expected[:, 8:32] = x @ dense.T + (wide[:, 8:32] if accumulate else 0)

    linear_layer._product(x, dense, wide[:, 8:32], accumulate, in_place)

    assert torch.allclose(wide, expected, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 70])
def test_an_input_rounded_once_serves_every_piece(launches, rows):
    """The wrappers' own order: one rounding, then launches that read it."""
    weight = torch.zeros(4, 576, dtype=torch.uint8)
    inputs = linear_layer.rounded(torch.zeros(rows, 64), "q4")
    rounding = len(launches)
    for start in (0, 2):
        linear_layer.linear(inputs, weight[start : start + 2], "q4", None, torch.zeros(rows, 32))

    assert (rounding, len(launches)) == (1, 3)
    assert reference.rounded(weight, "q4") is weight
