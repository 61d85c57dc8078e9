"""A launch past Triton's Python is the one that Triton makes: the same variant with the same arguments."""

from __future__ import annotations

import os

import pytest
import torch

from cpu_kernels.contract import Partial

pytest.importorskip("triton", reason="triton is not installed (the test extra has it on x86-64 Linux)")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiling needs a process without the interpreter", allow_module_level=True)

import triton
import triton.language as tl
from triton import knobs

from gpu_kernels import elementwise, linear_layer, reference
from gpu_kernels.attention.merge import merge
from gpu_kernels.launching import Kernel, Shape
from tests.support.gpu.silent_triton import silent_triton

FUNCTION, ARGUMENTS = 4, 9  # of what a launcher is given: the handle, and where the kernel's own arguments begin
ARCHITECTURE = 90


@triton.jit(do_not_specialize=["count"])
def _scale_kernel(x, out, factor, count, stride, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    values = tl.load(x + columns * stride, mask=columns < count, other=0.0)
    tl.store(out + columns, (values.to(tl.float32) * factor).to(out.dtype.element_ty), mask=columns < count)


SMALL, LARGE = Shape(BLOCK=16, num_warps=1), Shape(BLOCK=64, num_warps=2)
MEMORY = torch.zeros(256)
BF16 = torch.zeros(256, dtype=torch.bfloat16)
# (x, out), (factor, count), (stride,), shape: each another variant than the one before it
CALLS = {
    "aligned": ((MEMORY[4:], MEMORY), (2.0, 3), (16,), SMALL),
    "x is misaligned": ((MEMORY[1:], MEMORY), (2.0, 3), (16,), SMALL),
    "out is misaligned": ((MEMORY, MEMORY[2:]), (2.0, 3), (16,), SMALL),
    "odd stride": ((MEMORY, MEMORY), (2.0, 3), (7,), SMALL),
    "stride 1": ((MEMORY, MEMORY), (2.0, 3), (1,), SMALL),
    "stride beyond 32 bits": ((MEMORY, MEMORY), (2.0, 3), (2**33,), SMALL),
    "another dtype": ((BF16, MEMORY), (2.0, 3), (16,), SMALL),
    "other constants": ((MEMORY, MEMORY), (2.0, 3), (16,), LARGE),
}


def addresses(launch):
    """What a launcher was given, tensors as addresses."""
    if isinstance(launch, tuple):
        return tuple(map(addresses, launch))
    return launch.data_ptr() if isinstance(launch, torch.Tensor) else launch


def test_each_launch_is_of_the_variant_that_triton_would_choose():
    kernel = Kernel(_scale_kernel)

    with silent_triton(ARCHITECTURE, keep=True) as launches:
        for _ in range(3):
            for tensors, numbers, strides, shape in CALLS.values():
                kernel.launch((5, 1, 1), tensors, numbers, strides, shape)
                _scale_kernel[(5, 1, 1)](*tensors, *numbers, *strides, **shape.constants)

    ours, tritons = launches.kept[::2], launches.kept[1::2]
    for made, expected in zip(ours, tritons, strict=True):
        assert made[: FUNCTION + 2] == expected[: FUNCTION + 2]  # grid, stream, handle, metadata
        assert addresses(made[ARGUMENTS:]) == addresses(expected[ARGUMENTS:])
    assert len({made[FUNCTION] for made in ours}) == len(kernel._variants) == len(CALLS)
    direct = ours[len(CALLS) :]
    assert not any(isinstance(each, torch.Tensor) for made in direct for each in made)


def test_numbers_that_select_no_variant_make_none():
    kernel = Kernel(_scale_kernel)

    with silent_triton(ARCHITECTURE, keep=True) as launches:
        for numbers in ((2.0, 3), (0.5, 16), (1.0, 1), (-7.25, 40)):
            kernel.launch((1, 1, 1), (MEMORY, MEMORY), numbers, (16,), SMALL)

    assert len(kernel._variants) == 1
    assert [launch[ARGUMENTS + 2 : ARGUMENTS + 4] for launch in launches.kept] == [
        (2.0, 3),
        (0.5, 16),
        (1.0, 1),
        (-7.25, 40),
    ]


def test_memory_of_the_host_goes_as_tensors():
    kernel = Kernel(_scale_kernel)

    with silent_triton(ARCHITECTURE, keep=True) as launches:
        for _ in range(2):
            kernel.launch((1, 1, 1), (MEMORY, MEMORY), (2.0, 3), (16,), SMALL, by_address=False)

    assert all(launch[ARGUMENTS] is MEMORY for launch in launches.kept)


def test_tensors_without_memory_launch_nothing_though_the_variant_is_kept():
    """A second model compiles ahead what the first has launched: null addresses must not reach the device."""
    kernel, unreal = Kernel(_scale_kernel), torch.empty(256, device="meta")

    with silent_triton(ARCHITECTURE) as launches:
        for x in (unreal, MEMORY, unreal, MEMORY, unreal):
            kernel.launch((1, 1, 1), (x, x), (2.0, 3), (16,), SMALL)

    assert launches.count == 2


def test_launch_hooks_see_every_launch():
    kernel, seen = Kernel(_scale_kernel), []

    with silent_triton(ARCHITECTURE) as launches:
        kernel.launch((1, 1, 1), (MEMORY, MEMORY), (2.0, 3), (16,), SMALL)
        knobs.runtime.launch_enter_hook.add(seen.append)
        try:
            for _ in range(3):
                kernel.launch((1, 1, 1), (MEMORY, MEMORY), (2.0, 3), (16,), SMALL)
        finally:
            knobs.runtime.launch_enter_hook.remove(seen.append)

    assert (launches.count, len(seen)) == (4, 3)


def test_a_launcher_of_another_kind_is_left_to_triton_and_said_once():
    def of_another_kind(launches):
        class Launcher:
            def __init__(self, src, metadata):
                pass

            def __call__(self, *everything):
                launches.add(everything)

        return Launcher

    kernel = Kernel(_scale_kernel)

    with silent_triton(ARCHITECTURE, launcher_of=of_another_kind) as launches:
        with pytest.warns(UserWarning, match="release of Triton") as warned:
            for _ in range(3):
                kernel.launch((1, 1, 1), (MEMORY, MEMORY), (2.0, 3), (16,), SMALL)

    assert (launches.count, len(warned), kernel._variants) == (3, 1, {})


def calls():
    """Launches of some kernels whose arguments Triton tells apart: alignment, ones, multiples of 16, None, tuples."""
    for rows, hidden, offset in ((4, 64, 0), (4, 64, 1), (1, 64, 0), (4, 48, 0), (3, 50, 0)):
        x, weight = (
            torch.zeros(rows * hidden + 8)[offset : offset + rows * hidden].view(rows, hidden),
            torch.zeros(hidden),
        )
        yield lambda x=x, weight=weight: elementwise.rms_norm(x, weight, 1e-6, x)
    for units in (1, 2, 16, 40):
        gate_up, out = torch.zeros(3, units * 32), torch.zeros(3, units * 16)
        yield lambda gate_up=gate_up, out=out: elementwise.silu_mul(gate_up, out)
    parts = [Partial(torch.zeros(2, 4, 64), torch.zeros(2, 4)) for _ in range(3)]
    yield lambda: merge(parts[:2], parts[0])
    yield lambda: merge(parts, parts[0])


def test_each_op_launches_what_triton_would(monkeypatch):
    def by_triton(self, grid, tensors, numbers, strides, shape, by_address=True, nest=tuple):
        self.function[grid](*nest((*tensors, *numbers, *strides)), **shape.constants)

    with silent_triton(ARCHITECTURE, keep=True) as launches:
        for call in calls():
            call()  # kept here, if no call before was alike
            call()
            with monkeypatch.context() as patched:
                patched.setattr(Kernel, "launch", by_triton)
                call()

    for start in range(1, launches.count, 3):
        direct, expected = launches.kept[start : start + 2]
        assert direct[: FUNCTION + 2] == expected[: FUNCTION + 2]
        assert addresses(direct[ARGUMENTS:]) == addresses(expected[ARGUMENTS:])


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_product_fills_its_columns_and_no_others(accumulate, in_place):
    x, dense, wide = torch.randn(5, 64), torch.randn(24, 64), torch.randn(5, 40)
    expected = wide.clone()
    expected[:, 8:32] = x @ dense.T + (wide[:, 8:32] if accumulate else 0)

    linear_layer._product(x, dense, wide[:, 8:32], accumulate, in_place)

    assert torch.allclose(wide, expected, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 70])
def test_an_input_rounded_once_serves_every_piece(rows):
    """The wrappers' own order: one rounding, then launches that read it."""
    weight = torch.zeros(4, 576, dtype=torch.uint8)
    with silent_triton(ARCHITECTURE) as launches:
        inputs = linear_layer.rounded(torch.zeros(rows, 64), "q4")
        rounding = launches.count
        for start in (0, 2):
            linear_layer.linear(inputs, weight[start : start + 2], "q4", None, torch.zeros(rows, 32))

    assert (rounding, launches.count) == (1, 3)
    assert reference.rounded(weight, "q4") is weight
