"""The interpreter's shim: what it repairs, what it refuses. On a CUDA device the same kernels show what is right."""

from __future__ import annotations

import pytest
import torch

from tests.support.kernels.kernel_data import normal

triton = pytest.importorskip("triton", reason="triton is not installed (the test extra has it on x86-64 Linux)")

import triton.language as tl  # noqa: E402

from gpu_kernels.byte_products import dot4  # noqa: E402


@triton.jit
def _round_trip_kernel(x, out, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    tl.store(out + index, tl.load(x + index).to(tl.bfloat16).to(tl.float32))


@triton.jit
def _dot_kernel(x, y, out, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    grid = index[:, None] * SIZE + index[None, :]
    tl.store(out + grid, tl.dot(tl.load(x + grid), tl.load(y + grid)))


@triton.jit
def _loop_kernel(stop, out):
    total = 0
    for index in range(0, tl.load(stop)):
        total += index
    tl.store(out, total)


@triton.jit
def _dot4_kernel(x, y, out, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    tl.store(out + index, dot4(tl.load(x + index), tl.load(y + index), index))


@triton.jit
def _careless_load_kernel(x, out, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    tl.store(out + index, tl.load(x + index, mask=index < SIZE // 2))


@triton.jit
def _bf16_sum_kernel(x, out, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    tl.store(out + index, tl.load(x + index) + tl.load(x + index))


@triton.jit
def _short_dot_kernel(x, out):
    rows, columns = tl.arange(0, 16), tl.arange(0, 8)
    tile = tl.load(x + rows[:, None] * 8 + columns[None, :])
    tl.store(out + rows[:, None] * 16 + rows[None, :], tl.dot(tile, tl.trans(tile)))


@pytest.fixture
def interpreted_only(device):
    if device != "cpu":
        pytest.skip("only the interpreter can refuse this before it runs")


def test_float32_to_bf16_rounds_to_nearest_even(device):
    x = torch.cat(
        [
            normal(1015, seed=1),
            torch.tensor([0.0, -0.0, 1e-40, 3e38, torch.inf, -torch.inf, 1 + 2**-8, 1 + 3 * 2**-8, 1e-38]),
        ]
    ).to(device)
    out = torch.full_like(x, torch.nan)

    _round_trip_kernel[(1,)](x, out, SIZE=1024)

    assert torch.equal(out, x.bfloat16().float())


def test_a_dot_multiplies_bf16_values(device):
    x, y = normal(16, 16, seed=1, dtype=torch.bfloat16), normal(16, 16, seed=2, dtype=torch.bfloat16)
    out = torch.full((16, 16), torch.nan, device=device)

    _dot_kernel[(1,)](x.to(device), y.to(device), out, SIZE=16)

    assert torch.allclose(out.cpu(), x.float() @ y.float(), atol=1e-5)


def test_a_loop_bound_may_be_loaded(device):
    out = torch.zeros(1, dtype=torch.int32, device=device)

    _loop_kernel[(1,)](torch.tensor([5], dtype=torch.int32, device=device), out)

    assert out.item() == 10


def test_dp4a_multiplies_signed_bytes(device):
    x, y = (
        torch.randint(-128, 128, (16, 4), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
        for seed in (1, 2)
    )
    out = torch.zeros(16, dtype=torch.int32, device=device)

    _dot4_kernel[(1,)](x.to(device).view(torch.int32), y.to(device).view(torch.int32), out, SIZE=16)

    assert out.tolist() == ((x.int() * y.int()).sum(1) + torch.arange(16)).tolist()


@pytest.mark.usefixtures("interpreted_only")
def test_a_masked_load_without_other_yields_garbage():
    out = torch.zeros(16)

    _careless_load_kernel[(1,)](torch.ones(16), out, SIZE=16)

    assert out[:8].tolist() == [1.0] * 8 and out[8:].isnan().all()


@pytest.mark.usefixtures("interpreted_only")
@pytest.mark.parametrize(
    "launch,message",
    [
        (lambda: _bf16_sum_kernel[(1,)](torch.ones(16).bfloat16(), torch.zeros(16), SIZE=16), "bf16 arithmetic"),
        (lambda: _short_dot_kernel[(1,)](torch.ones(16, 8), torch.zeros(16, 16)), "inner dimension under 16"),
    ],
    ids=["bf16 arithmetic", "a dot too short"],
)
def test_what_a_gpu_would_not_do_is_refused(launch, message):
    with pytest.raises(Exception) as raised:
        launch()

    assert message in f"{raised.value} {raised.value.__cause__}"
