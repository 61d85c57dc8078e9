"""rms_norm, layer_norm, silu_mul, gelu_mul, gelu and rope_append against float64."""

import pytest
import torch

from cpu_kernels.contract import Pages, Rotation
from tests.support.kernels.cpu_oracles import guarded, kernels, nmse, only_inside_written

ROUNDING = 1e-12  # NMSE of float32 arithmetic


@pytest.mark.parametrize(("rows", "hidden"), [(1, 1), (3, 63), (2, 2048), (0, 16)])
def test_rms_norm(rows, hidden):
    torch.manual_seed(hidden)
    x, weight = 3 * torch.randn(rows, hidden), torch.randn(hidden)
    out, memory = guarded(rows, hidden)

    kernels().rms_norm(x, weight, 1e-5, out)

    wide = x.double()
    expected = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5) * weight
    assert only_inside_written(memory)
    assert nmse(out, expected) < ROUNDING


@pytest.mark.parametrize("hidden", [5, 64, 75])
def test_rms_norm_added(hidden):
    torch.manual_seed(hidden)
    x, weight, before = 3 * torch.randn(2, hidden), torch.randn(hidden), torch.randn(2, hidden)
    out, memory = guarded(2, hidden)
    out.copy_(before)

    kernels().rms_norm(x, weight, 1e-5, out, True)

    wide = x.double()
    expected = before + wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5) * weight
    assert only_inside_written(memory)
    assert nmse(out, expected) < ROUNDING


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("rows", "hidden"), [(1, 1), (3, 63), (2, 2048), (0, 16)])
def test_layer_norm(rows, hidden, has_bias):
    """Far from zero, where the mean is what counts."""
    torch.manual_seed(hidden)
    x, weight, bias = 5 + 3 * torch.randn(rows, hidden), torch.randn(hidden), torch.randn(hidden)
    out, memory = guarded(rows, hidden)

    kernels().layer_norm(x, weight, bias if has_bias else None, 1e-2, out)

    wide = x.double()
    apart = wide - wide.mean(-1, keepdim=True)
    expected = apart * torch.rsqrt(apart.square().mean(-1, keepdim=True) + 1e-2) * weight + (bias if has_bias else 0)
    assert only_inside_written(memory)
    assert rows * hidden <= 1 or nmse(out, expected) < ROUNDING
    assert rows * hidden != 1 or torch.equal(out, expected.float())


@pytest.mark.parametrize(("rows", "features"), [(1, 5), (3, 1100), (2, 2048)])
def test_gather_columns(rows, features):
    x, order = torch.randn(rows, features + 1)[:, 1:], torch.randperm(features)
    out, memory = guarded(rows, features)

    kernels().gather_columns(x, order.int(), out)

    assert only_inside_written(memory)
    assert torch.equal(out, x[:, order])


@pytest.mark.parametrize(("rows", "features"), [(1, 5), (3, 1100), (2, 16), (0, 4)])
def test_copy_rows(rows, features):
    """Bit by bit, between rows that lie apart."""
    source = torch.randn(rows, features + 3)[:, 1 : features + 1]
    out, memory = guarded(rows, features)

    kernels().copy_rows(out, source)

    assert only_inside_written(memory)
    assert torch.equal(out, source)


@pytest.mark.parametrize(("rows", "features"), [(1, 5), (3, 1100), (2, 16)])
def test_gelu(rows, features):
    torch.manual_seed(features)
    x = 3 * torch.randn(rows, features)
    x[0, :5] = torch.tensor([-200.0, 200.0, -8.5, 0.0, -3e4])
    out, memory = guarded(rows, features)

    kernels().gelu(x, out)

    assert only_inside_written(memory)
    assert nmse(out, torch.nn.functional.gelu(x.double(), approximate="tanh")) < ROUNDING


@pytest.mark.parametrize(("rows", "units"), [(1, 1), (3, 65)])
def test_gelu_mul(rows, units):
    torch.manual_seed(units)
    gate_up = 3 * torch.randn(rows, units * 32)
    gate_up[0, :5] = torch.tensor([-200.0, 200.0, -8.5, 0.0, -3e4])
    out, memory = guarded(rows, units * 16)

    kernels().gelu_mul(gate_up, out)

    gate, up = gate_up.double().reshape(rows, units, 2, 16).unbind(2)
    assert only_inside_written(memory)
    assert nmse(out, (torch.nn.functional.gelu(gate, approximate="tanh") * up).reshape(rows, -1)) < ROUNDING


@pytest.mark.parametrize(("rows", "units"), [(1, 1), (3, 65), (5, 7)])
def test_silu_mul(rows, units):
    torch.manual_seed(units)
    gate_up = 20 * torch.randn(rows, units * 32)
    gate_up[0, :4] = torch.tensor([-200.0, 200.0, -87.5, 0.0])
    out, memory = guarded(rows, units * 16)

    kernels().silu_mul(gate_up, out)

    gate, up = gate_up.double().reshape(rows, units, 2, 16).unbind(2)
    assert only_inside_written(memory)
    assert nmse(out, (torch.nn.functional.silu(gate) * up).reshape(rows, -1)) < ROUNDING


def rotated(heads, positions, cos, sin, norm, eps):
    """[rows, groups, heads, head_dim] normed and rotated in float64."""
    x, half = heads.double(), cos.shape[1]
    if norm is not None:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * norm
    c, s = (table[positions].double()[:, None, None] for table in (cos, sin))
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * c - b * s, b * c + a * s, rest], -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("head_dim", "half", "queries_per_kv", "page_size", "has_norm"),
    [(64, 32, 4, 64, False), (40, 10, 2, 1, True), (128, 64, 1, 4, True), (80, 0, 3, 16, False)],
)
def test_rope_append(dtype, head_dim, half, queries_per_kv, page_size, has_norm):
    torch.manual_seed(head_dim)
    rows, groups = 5, 2
    features = -(-(queries_per_kv + 2) * head_dim // 16) * 16
    qkv, cos, sin = torch.randn(rows, groups, features), torch.randn(50, half), torch.randn(50, half)
    positions = torch.tensor([0, 49, 7, 7, 30])
    q_norm, k_norm = (torch.rand(head_dim), torch.rand(head_dim)) if has_norm else (None, None)
    pages = -(-3 * rows * groups // page_size)
    k_pages, v_pages = (torch.full((pages, page_size, head_dim), float("nan"), dtype=dtype) for _ in range(2))
    slots = torch.randperm(pages * page_size)[: rows * groups].reshape(rows, groups)
    q, memory = guarded(rows, groups * queries_per_kv, head_dim)

    kernels().rope_append(qkv, positions, Rotation(cos, sin, q_norm, k_norm, 1e-6), q, Pages(k_pages, v_pages), slots)

    heads = qkv[..., : (queries_per_kv + 2) * head_dim].reshape(rows, groups, -1, head_dim)
    k = k_pages.reshape(-1, head_dim)
    expected_k = rotated(heads[:, :, [-2]], positions, cos, sin, k_norm, 1e-6)[:, :, 0]
    expected_q = rotated(heads[:, :, :-2], positions, cos, sin, q_norm, 1e-6)
    assert only_inside_written(memory)
    assert nmse(q, expected_q.reshape(q.shape)) < ROUNDING
    assert nmse(k[slots], expected_k) < (1e-5 if dtype == torch.bfloat16 else ROUNDING)
    assert torch.equal(v_pages.reshape(-1, head_dim)[slots], heads[:, :, -1].to(dtype))
    untouched = torch.ones(len(k), dtype=torch.bool)
    untouched[slots.flatten()] = False
    assert k[untouched].isnan().all()


@pytest.mark.parametrize(("position", "slot", "message"), [(8, 0, "positions"), (-1, 0, "positions"), (0, 4, "slots")])
def test_positions_and_slots_outside_their_tables_are_errors(position, slot, message):
    angles, pages = torch.zeros(8, 8), torch.zeros(1, 4, 16)
    at, to = torch.tensor([position]), torch.tensor([[slot]])

    with pytest.raises(ValueError, match=message):
        kernels().rope_append(
            torch.zeros(1, 1, 48),
            at,
            Rotation(angles, angles, None, None, 1e-6),
            torch.zeros(1, 1, 16),
            Pages(pages, pages),
            to,
        )
