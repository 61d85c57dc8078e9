"""One check per op: run an implementation on awkward data and compare with the independent float64 formulas.

The op is an argument, so that the same check serves the kernels, the reference and planted mutants. Outputs lie inside
larger buffers filled with NaN: a check fails on a value that was not written and on a write outside.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cpu_kernels.contract import ChunkKeys, Pages, Partial, Rotation, RowKeys
from tests.support.kernels.kernel_data import (
    boundary_adversarial,
    lse_error,
    nmse,
    normal,
    oracle_decode,
    oracle_linear,
    oracle_prefill,
    packed_weight,
    paged_cache,
)

Op = Callable[..., None]
FLOAT32_NMSE = 1e-11
STORED_NMSE = 1e-5  # of keys rounded to bf16 as they are stored
# Rounding to bf16 adds an error of at most 2^-8 of a value's power of two, so on average its square is 2^-16 / 3 where
# that of the value is 7/3. Both factors are rounded and the signs are random: 2 * 2^-16 / 7 over many values, for
# outputs of many rows together. Twice as much is allowed, since a small shape holds few scales and unlike values.
DENSE_NMSE = 4 * 2.0**-16 / 7
# Weights of attention are rounded to bf16 alike on every lane; one near a boundary may go to the other side.
BF16_NMSE = 1e-6  # of a whole head
BF16_ROW_NMSE = 1e-4  # of a single row, whose values may nearly cancel
LSE_TOLERANCE = 1e-5


class Guarded:
    """An output tensor inside a larger NaN-filled buffer, so its rows are strided and its surroundings watched."""

    def __init__(
        self,
        device: str,
        *shape: int,
        dtype: torch.dtype = torch.float32,
        fill: Tensor | None = None,
        unguarded_dims: int = 0,
    ) -> None:
        guards = [int(index >= unguarded_dims) for index in range(len(shape))]
        self.inside = tuple(slice(guard, guard + size) for guard, size in zip(guards, shape))
        sizes = [size + 2 * guard for guard, size in zip(guards, shape)]
        self.buffer = torch.full(sizes, torch.nan, dtype=dtype, device=device)
        self.view = self.buffer[self.inside]
        if fill is not None:
            self.view.copy_(fill)

    def result(self) -> Tensor:
        """The output on the CPU; asserts that nothing outside of it was written."""
        inside, outside = self.view.cpu(), self.buffer.clone()
        outside[self.inside] = torch.nan

        assert outside.isnan().all(), "written outside of the output"
        return inside


def check_decode(
    op: Op,
    device: str,
    dtype: torch.dtype,
    num_kv_heads: int,
    queries_per_kv: int,
    head_dim: int,
    page_size: int,
    length: int,
    ranges: list[tuple[int, int]],
    cap: float = 0.0,
) -> None:
    """decode_attention over `ranges`, one per sequence, of a cache with room for `length` positions."""
    start, stop = map(list, zip(*ranges))
    edges = sorted({edge + step for low, high in ranges for edge in range(low, high, 64) for step in (0, 1)})
    q, keys, values = boundary_adversarial(
        len(ranges), num_kv_heads, queries_per_kv, length, head_dim, [*edges, *stop], dtype
    )
    cache = paged_cache(keys, values, page_size, [range(low, high) for low, high in ranges])
    scale = head_dim**-0.5
    expected, expected_lse = oracle_decode(q, cache, start, stop, scale, cap)
    out, lse = Guarded(device, *q.shape), Guarded(device, *q.shape[:2])
    limits = (torch.tensor(limit, dtype=torch.int32, device=device) for limit in (start, stop))

    op(
        _strided(q, device),
        Pages(cache.k_pages.to(device), cache.v_pages.to(device)),
        RowKeys(cache.page_table.to(device), *limits),
        scale,
        Partial(out.view, lse.view),
        *((cap,) if cap else ()),
    )

    _assert_attention(out, lse, expected, expected_lse, dtype)


def check_prefill(
    op: Op,
    device: str,
    dtype: torch.dtype,
    q_len: int,
    num_kv_heads: int,
    queries_per_kv: int,
    head_dim: int,
    page_size: int,
    start: int,
    stop: int,
    q_start: int,
    window: int,
    cap: float = 0.0,
) -> None:
    """prefill_attention of q_len rows from position q_start over the keys [start, stop)."""
    length = max(stop, q_start + q_len)
    edges = [start, stop, q_start, q_start + q_len, max(0, q_start - window), start + 64]
    _, keys, values = boundary_adversarial(1, num_kv_heads, 1, length, head_dim, edges, dtype)
    q = normal(q_len, num_kv_heads * queries_per_kv, head_dim, seed=9) * 2
    cache = paged_cache(keys, values, page_size, [range(start, stop)])
    scale = head_dim**-0.5
    expected, expected_lse = oracle_prefill(q, cache, start, stop, q_start, window, scale, cap)
    out, lse = Guarded(device, *q.shape), Guarded(device, *q.shape[:2])

    op(
        _strided(q, device),
        Pages(cache.k_pages.to(device), cache.v_pages.to(device)),
        ChunkKeys(cache.page_table[0].to(device), start, stop, q_start, window),
        scale,
        Partial(out.view, lse.view),
        *((cap,) if cap else ()),
    )

    _assert_attention(out, lse, expected, expected_lse, dtype)


def check_merge(op: Op, device: str, parts: int, shape: tuple[int, ...], empty: list[int]) -> None:
    """merge of `parts` partials, those listed in `empty` being (0, -inf); the first row is empty in all of them."""
    outs = [normal(*shape, seed=part) for part in range(parts)]
    lses = [20 * normal(*shape[:-1], seed=100 + part) for part in range(parts)]
    for part in range(parts):
        nothing = torch.zeros(shape[:-1], dtype=torch.bool)
        nothing.view(-1)[0] = True
        if part in empty:
            nothing[:] = True
        outs[part][nothing], lses[part][nothing] = 0.0, -torch.inf
    sums = [torch.exp(lse.double()) for lse in lses]
    total = sum(sums)
    expected = sum(out.double() * weight[..., None] for out, weight in zip(outs, sums))
    expected = expected / total.clamp_min(1e-300)[..., None]
    leading = 2 if len(shape) > 3 else 0  # dimensions that must collapse into one
    out, lse = (Guarded(device, *sizes, unguarded_dims=leading) for sizes in (shape, shape[:-1]))

    partials = [Partial(_strided(part, device), part_lse.to(device)) for part, part_lse in zip(outs, lses)]
    op(partials, Partial(out.view, lse.view))

    assert nmse(out.result(), expected) <= FLOAT32_NMSE
    assert lse_error(lse.result(), torch.log(total)) <= LSE_TOLERANCE


def _before_a_number(vector: Tensor) -> Tensor:
    """The vector in memory that goes on with a number: NaN, read past its end and written past the output's, would look
    like the NaN that is there."""
    return torch.cat([vector, vector.new_ones(1)])[:-1]


def check_linear(
    op: Op,
    device: str,
    weight_dtype: str,
    rows: int,
    num_blocks: int,
    in_features: int,
    with_bias: bool = True,
    accumulate: bool = False,
    tolerance: float = FLOAT32_NMSE,
) -> None:
    """linear over random packed blocks; a group of x is zero and one holds the ties of rounding to int8.

    With more than FLOAT32_NMSE as `tolerance` the error of the whole output counts, since one row may nearly cancel.
    """
    weight = packed_weight(weight_dtype, num_blocks, in_features, seed=3)
    x, bias, before = (
        normal(*shape, seed=seed)
        for seed, shape in enumerate([(rows, in_features), (num_blocks * 16,), (rows, num_blocks * 16)])
    )
    x[0, :4] = torch.tensor([127.0, 0.5, 1.5, -2.5])
    x[-1, 64:128] = 0.0
    expected = oracle_linear(x, weight, weight_dtype)
    expected = expected + (bias.double() if with_bias else 0) + (before.double() if accumulate else 0)
    out = Guarded(device, rows, num_blocks * 16, fill=before)

    op(
        _strided(x, device),
        weight.to(device),
        weight_dtype,
        _before_a_number(bias.to(device)) if with_bias else None,
        out.view,
        accumulate,
    )

    dims = (-1,) if tolerance == FLOAT32_NMSE else (-2, -1)
    assert nmse(out.result(), expected, dims) <= tolerance


def check_rms_norm(op: Op, device: str, rows: int, hidden: int) -> None:
    """rms_norm with an epsilon large enough to matter."""
    x, weight, out = 0.5 * normal(rows, hidden, seed=1), normal(hidden, seed=2), Guarded(device, rows, hidden)
    expected = x.double() / (x.double().square().mean(-1, keepdim=True) + 0.1).sqrt() * weight.double()

    op(_strided(x, device), weight.to(device), 0.1, out.view)

    assert nmse(out.result(), expected) <= FLOAT32_NMSE


def check_layer_norm(op: Op, device: str, rows: int, hidden: int, has_bias: bool) -> None:
    """layer_norm of rows far from zero with an epsilon large enough to matter."""
    x, out = 2.0 + 0.5 * normal(rows, hidden, seed=1), Guarded(device, rows, hidden)
    weight, bias = normal(hidden, seed=2), normal(hidden, seed=3)
    apart = x.double() - x.double().mean(-1, keepdim=True)
    expected = apart / (apart.square().mean(-1, keepdim=True) + 0.1).sqrt() * weight.double()

    op(_strided(x, device), weight.to(device), bias.to(device) if has_bias else None, 0.1, out.view)

    assert nmse(out.result(), expected + bias if has_bias else expected) <= FLOAT32_NMSE


def check_gelu(op: Op, device: str, rows: int, features: int) -> None:
    """gelu of both signs, small and so large that the cube is infinite."""
    x, out = 3 * normal(rows, features, seed=1), Guarded(device, rows, features)
    x[0, :2] = torch.tensor([3e13, -3e13])

    op(_strided(x, device), out.view)

    result, expected = out.result(), torch.nn.functional.gelu(x.double(), approximate="tanh")
    assert nmse(result[0, :2], expected[0, :2]) <= FLOAT32_NMSE
    result[0, :2], expected[0, :2] = 0, 0
    assert nmse(result, expected) <= FLOAT32_NMSE


def check_gather_columns(op: Op, device: str, rows: int, features: int) -> None:
    """Columns in another order, to the bit."""
    x, out = normal(rows, features, seed=1), Guarded(device, rows, features)
    order = torch.randperm(features, generator=torch.Generator().manual_seed(2))

    op(_strided(x, device), order.int().to(device), out.view)

    assert torch.equal(out.result(), x[:, order])


def check_copy_rows(op: Op, device: str, rows: int, columns: int) -> None:
    """copy_rows of rows with a stride, infinities and a NaN among them: every bit."""
    wide, target = normal(rows, columns + 3, seed=1), Guarded(device, rows, columns)
    source = wide[:, :columns]
    source[0, 0], source[-1, -1] = -torch.inf, torch.nan

    op(target.view, wide.to(device)[:, :columns])

    assert torch.equal(target.result().contiguous().view(torch.int32), source.contiguous().view(torch.int32))


def check_add_rows(op: Op, device: str, rows: int, columns: int) -> None:
    """add_rows of rows with a stride onto others with one: the bits of one addition each."""
    wide, target = normal(rows, columns + 3, seed=1), Guarded(device, rows, columns)
    before = normal(rows, columns, seed=2)
    target.view.copy_(before)

    op(target.view, wide.to(device)[:, :columns])

    assert torch.equal(target.result().contiguous(), before + wide[:, :columns])


def check_rms_norm_added(op: Op, device: str, rows: int, hidden: int) -> None:
    """rms_norm onto what is there."""
    x, weight, before = normal(rows, hidden, seed=1), normal(hidden, seed=2), normal(rows, hidden, seed=3)
    out = Guarded(device, rows, hidden)
    out.view.copy_(before)

    op(_strided(x, device), weight.to(device), 0.3, out.view, True)

    wide = x.double()
    expected = before + wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 0.3) * weight
    assert nmse(out.result(), expected) <= FLOAT32_NMSE


def check_gelu_mul(op: Op, device: str, rows: int, units: int) -> None:
    """gelu_mul with gates of both signs, small and so large that their cube is infinite."""
    gate_up, out = 3 * normal(rows, units * 32, seed=1), Guarded(device, rows, units * 16)
    gate_up[0, :2] = torch.tensor([3e13, -3e13])
    gate, up = gate_up.double().view(rows, units, 2, 16).unbind(2)

    op(_strided(gate_up, device), out.view)

    result, expected = out.result(), (torch.nn.functional.gelu(gate, approximate="tanh") * up).flatten(1)
    assert nmse(result[0, :2], expected[0, :2]) <= FLOAT32_NMSE
    result[0, :2], expected[0, :2] = 0, 0
    assert nmse(result, expected) <= FLOAT32_NMSE


def check_silu_mul(op: Op, device: str, rows: int, units: int) -> None:
    """silu_mul with gates of both signs and large size."""
    gate_up, out = 8 * normal(rows, units * 32, seed=1), Guarded(device, rows, units * 16)
    gate, up = gate_up.double().view(rows, units, 2, 16).unbind(2)

    op(_strided(gate_up, device), out.view)

    assert nmse(out.result(), (gate / (1 + torch.exp(-gate)) * up).flatten(1)) <= FLOAT32_NMSE


def check_clamped_silu_mul(op: Op, device: str, rows: int, units: int) -> None:
    """clamped_silu_mul with gates and ups of both signs, within the limit and beyond."""
    gate_up, out = 6 * normal(rows, units * 32, seed=1), Guarded(device, rows, units * 16)
    gate, up = gate_up.double().view(rows, units, 2, 16).unbind(2)
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)

    op(_strided(gate_up, device), 1.702, 7.0, out.view)

    assert nmse(out.result(), ((up + 1) * gate / (1 + torch.exp(-1.702 * gate))).flatten(1)) <= FLOAT32_NMSE


def check_rope_append(
    op: Op,
    device: str,
    dtype: torch.dtype,
    num_kv_heads: int,
    queries_per_kv: int,
    head_dim: int,
    rotary_dim: int,
    norms: tuple[bool, bool],
) -> None:
    """rope_append of three rows; padding of the units and slots that no row owns must stay as they are."""
    heads, half, page_size = queries_per_kv + 2, rotary_dim // 2, 4
    qkv = normal(3, num_kv_heads, heads * head_dim + 5, seed=1)
    qkv[..., heads * head_dim :] = torch.nan
    positions = torch.tensor([8, 0, 3])
    slots = torch.randperm(16, generator=torch.Generator().manual_seed(2))[: 3 * num_kv_heads].view(3, num_kv_heads)
    angles = torch.outer(torch.arange(9.0), 0.5 ** torch.arange(half))
    q_norm, k_norm = (normal(head_dim, seed=4 + index) if has else None for index, has in enumerate(norms))
    q, k_pages, v_pages = (
        Guarded(device, 3, num_kv_heads * queries_per_kv, head_dim),
        *(Guarded(device, 4, page_size, head_dim, dtype=dtype) for _ in range(2)),
    )
    on_device = [None if part is None else part.to(device) for part in (q_norm, k_norm)]

    op(
        _strided(qkv, device),
        positions.to(device),
        Rotation(angles.cos().to(device), angles.sin().to(device), *on_device, 1e-3),
        q.view,
        Pages(k_pages.view, v_pages.view),
        slots.to(device),
    )

    parts = qkv[..., : heads * head_dim].double().unflatten(-1, (heads, head_dim))
    query, key = (
        _turned(part, norm, angles[positions])
        for part, norm in ((parts[:, :, :queries_per_kv], q_norm), (parts[:, :, queries_per_kv:-1], k_norm))
    )
    keys, values = (pages.result().flatten(0, 1) for pages in (k_pages, v_pages))
    tolerance = STORED_NMSE if dtype == torch.bfloat16 else FLOAT32_NMSE
    assert nmse(q.result(), query.flatten(1, 2)) <= FLOAT32_NMSE
    assert nmse(keys[slots], key[:, :, 0]) <= tolerance
    assert torch.equal(values[slots], parts[:, :, -1].to(dtype))
    assert keys.isnan().all(-1).sum() == values.isnan().all(-1).sum() == 16 - slots.numel()


def _turned(heads: Tensor, norm: Tensor | None, angles: Tensor) -> Tensor:
    """float64 norm and rotation of [rows, num_kv_heads, heads, head_dim] as complex numbers."""
    if norm is not None:
        heads = heads / (heads.square().mean(-1, keepdim=True) + 1e-3).sqrt() * norm.double()
    half = angles.shape[1]
    pairs = torch.complex(heads[..., :half], heads[..., half : 2 * half])
    pairs = pairs * torch.polar(torch.ones(()).double(), angles.double())[:, None, None]
    return torch.cat((pairs.real, pairs.imag, heads[..., 2 * half :]), -1)


def _strided(tensor: Tensor, device: str) -> Tensor:
    """The same numbers with NaN between the rows."""
    wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 3), torch.nan, dtype=tensor.dtype, device=device)
    wide[..., : tensor.shape[-1]] = tensor.to(device)
    return wide[..., : tensor.shape[-1]]


def _assert_attention(out: Guarded, lse: Guarded, expected: Tensor, expected_lse: Tensor, dtype: torch.dtype) -> None:
    result = out.result()
    assert lse_error(lse.result(), expected_lse) <= LSE_TOLERANCE
    assert nmse(result, expected) <= (BF16_ROW_NMSE if dtype == torch.bfloat16 else FLOAT32_NMSE)
    assert nmse(result, expected, dims=(0, 2)) <= BF16_NMSE
