"""The reference ops against independent float64 formulas; the merge algebra; planted bugs that must be seen."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cpu_kernels.contract import ChunkKeys, Pages, Partial, Rotation, RowKeys
from gpu_kernels import reference
from tests.support.kernels.delta_cases import SHAPES, check_delta_step
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
    read_packed,
)

FLOAT32_NMSE = 1e-11
LSE_TOLERANCE = 1e-5
WEIGHT_DTYPES = ["fp32", "bf16", "q8", "q4"]


def nan(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full(shape, torch.nan, dtype=dtype)


def decode(q, cache, start, stop, scale=0.2):
    """(out, lse) of the reference op; q's dtype chooses the arithmetic."""
    out, lse = nan(*q.shape, dtype=q.dtype), nan(*q.shape[:2], dtype=q.dtype)
    limits = (torch.tensor(limit, dtype=torch.int32) for limit in (start, stop))
    reference.decode_attention(
        q, Pages(cache.k_pages, cache.v_pages), RowKeys(cache.page_table, *limits), scale, Partial(out, lse)
    )
    return out, lse


def merged(partials):
    """Merge a list of (out, lse)."""
    into = Partial(*(torch.full_like(tensor, torch.nan) for tensor in partials[0]))
    reference.merge([Partial(*partial) for partial in partials], into)
    return into


@pytest.mark.parametrize("shape", SHAPES)
def test_delta_step(shape):
    check_delta_step(reference.delta_step, "cpu", shape)


@pytest.mark.parametrize("weight_dtype", WEIGHT_DTYPES)
@pytest.mark.parametrize("in_features", [64, 100, 129])
def test_unpack_equals_the_byte_reader(weight_dtype, in_features):
    weight = packed_weight(weight_dtype, 3, in_features, seed=1)
    expected = read_packed(weight, weight_dtype, in_features)

    assert torch.equal(reference.unpack(weight, weight_dtype, in_features), expected.float())
    assert torch.equal(reference.unpack(weight, weight_dtype, in_features, torch.float64), expected)


@pytest.mark.parametrize("weight_dtype", WEIGHT_DTYPES)
@pytest.mark.parametrize("rows,in_features", [(1, 64), (3, 100), (5, 192), (0, 64)])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, FLOAT32_NMSE), (torch.float64, 1e-26)])
def test_linear(weight_dtype, rows, in_features, dtype, tolerance):
    weight = packed_weight(weight_dtype, 2, in_features, seed=rows)
    x, bias = normal(rows, in_features, seed=2), normal(32, seed=3)
    out, start = nan(rows, 40, dtype=dtype), normal(rows, 32, seed=4).to(dtype)

    reference.linear(x.to(dtype), weight, weight_dtype, bias, out[:, :32])
    expected = oracle_linear(x, weight, weight_dtype)

    assert nmse(out[:, :32], expected + bias.double()) <= tolerance
    assert out[:, 32:].isnan().all()

    accumulated = start.clone()
    reference.linear(x.to(dtype), weight, weight_dtype, None, accumulated, accumulate=True)

    assert nmse(accumulated, expected + start.double()) <= tolerance


def test_linear_names_an_unknown_weight_dtype():
    with pytest.raises(ValueError, match="'q5' is unknown; known: fp32, bf16, q8, q4"):
        reference.linear(torch.zeros(1, 64), torch.zeros(1, 64, dtype=torch.uint8), "q5", None, torch.zeros(1, 16))


def test_quantize_activation_rounds_half_to_even_and_keeps_zero_groups():
    x = torch.zeros(1, 130)
    x[0, :4] = torch.tensor([127.0, 0.5, 1.5, -2.5])  # scale 1, so these are the ties
    x[0, 129] = -3.0

    q, scale = reference.quantize_activation(x)

    assert q[0, 0, :4].tolist() == [127, 0, 2, -2]
    assert q[0, 1].abs().max() == 0 and q[0, 2, 1] == -127
    assert torch.equal(scale, torch.tensor([[1.0, 0.0, 3.0]]) / torch.tensor([1.0, 1.0, 127.0]))


def test_quantised_dot_is_exact_in_integers():
    weight = packed_weight("q8", 1, 64, seed=5)
    weight.view(1, 17, 64)[0, 0] = torch.ones(32, dtype=torch.float16).view(torch.uint8)
    x = torch.randint(-127, 128, (1, 64), generator=torch.Generator().manual_seed(1)).float()
    x[0, 0] = 127.0
    out = nan(1, 16)

    reference.linear(x, weight, "q8", None, out)

    assert out[0].tolist() == (read_packed(weight, "q8", 64) @ x[0].double()).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("queries_per_kv", [1, 4, 7])
@pytest.mark.parametrize("page_size", [1, 8, 16])
def test_decode_attention(dtype, queries_per_kv, page_size):
    start, stop = [0, 5, 40, 17, 0], [41, 17, 40, 18, 1]
    q, keys, values = boundary_adversarial(5, 2, queries_per_kv, 41, 24, [5, 17, 40], dtype)
    cache = paged_cache(keys, values, page_size, [range(low, high) for low, high in zip(start, stop)])
    expected, expected_lse = oracle_decode(q, cache, start, stop, 0.2)

    out, lse = decode(q, cache, start, stop)

    assert nmse(out, expected) <= FLOAT32_NMSE
    assert lse_error(lse, expected_lse) <= LSE_TOLERANCE
    assert nmse(decode(q.double(), cache, start, stop)[0], expected) <= 1e-26


def test_decode_attention_with_every_range_empty():
    q, keys, values = boundary_adversarial(2, 1, 2, 8, 4, [])
    cache = paged_cache(keys, values, 4, [range(0), range(0)])

    out, lse = decode(q, cache, [3, 0], [3, 0])

    assert torch.equal(out, torch.zeros_like(out)) and torch.equal(lse, torch.full_like(lse, -torch.inf))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "start,stop,q_start,window",
    [
        (0, 33, 22, 0),
        (0, 33, 22, 5),
        (0, 33, 22, 1),
        (9, 30, 20, 0),
        (9, 30, 40, 12),
        (13, 13, 20, 0),
        (25, 33, 22, 0),
        (0, 22, 22, 3),
        (0, 11, 0, 0),
    ],
)
def test_prefill_attention(dtype, start, stop, q_start, window):
    _, keys, values = boundary_adversarial(1, 2, 3, 33, 24, [9, 22, 30], dtype)
    cache = paged_cache(keys, values, 8, [range(start, stop)])
    q = normal(11, 6, 24, seed=3)
    out, lse = nan(11, 6, 24), nan(11, 6)
    expected, expected_lse = oracle_prefill(q, cache, start, stop, q_start, window, 0.2)

    reference.prefill_attention(
        q,
        Pages(cache.k_pages, cache.v_pages),
        ChunkKeys(cache.page_table[0], start, stop, q_start, window),
        0.2,
        Partial(out, lse),
    )

    assert nmse(out, expected) <= FLOAT32_NMSE
    assert lse_error(lse, expected_lse) <= LSE_TOLERANCE


def test_attention_without_rows():
    q, keys, values = boundary_adversarial(1, 1, 2, 8, 4, [])
    cache = paged_cache(keys, values, 4, [range(8)])
    empty = q[:0]
    none = torch.zeros(0, dtype=torch.int32)
    pages, lse = (cache.k_pages, cache.v_pages), empty[..., 0].clone()

    reference.prefill_attention(
        empty, Pages(*pages), ChunkKeys(cache.page_table[0], 0, 8, 8), 1.0, Partial(empty.clone(), lse)
    )
    reference.decode_attention(
        empty, Pages(*pages), RowKeys(cache.page_table[:0], none, none), 1.0, Partial(empty.clone(), lse)
    )


def test_scores_of_ten_thousand_do_not_overflow():
    q, keys, values = boundary_adversarial(1, 1, 2, 9, 16, [4])
    cache = paged_cache(keys, values, 4, [range(9)])

    out, lse = decode(1e4 * q, cache, [0], [9], scale=1.0)

    assert out.isfinite().all() and lse.isfinite().all()


@settings(max_examples=60, deadline=None)
@given(cuts=st.lists(st.integers(0, 29), max_size=6), order=st.randoms(use_true_random=False))
def test_any_split_in_any_order_equals_no_split(cuts, order):
    edges = [0, *sorted(cuts), 29]
    q, keys, values = boundary_adversarial(1, 2, 2, 29, 16, edges)
    cache = paged_cache(keys, values, 8, [range(29)])
    whole, whole_lse = decode(q.double(), cache, [0], [29])
    partials = [decode(q, cache, [low], [high]) for low, high in zip(edges, edges[1:])]
    order.shuffle(partials)

    out, lse = merged(partials)

    assert nmse(out, whole) <= FLOAT32_NMSE
    assert lse_error(lse, whole_lse) <= LSE_TOLERANCE


@settings(max_examples=60, deadline=None)
@given(lses=st.lists(st.floats(-1e4, 1e4) | st.just(-math.inf), min_size=1, max_size=5), cut=st.integers(0, 5))
def test_merge_is_associative_and_minus_infinity_is_its_identity(lses, cut):
    partials = [
        ((normal(8, seed=index) * (lse > -math.inf)).double(), torch.tensor(lse, dtype=torch.float64))
        for index, lse in enumerate(lses)
    ]
    expected = merged([partial for partial in partials if partial[1] > -math.inf] or partials)
    parts = [part for part in (partials[:cut], partials[cut:]) if part]

    nested = merged([merged(part) for part in parts])

    assert nmse(nested[0][None], expected[0][None]) <= 1e-18
    assert lse_error(nested[1], expected[1]) <= 1e-12


def test_merge_of_empty_partials_is_empty():
    empty = torch.zeros(3, 8), torch.full((3,), -torch.inf)

    out, lse = merged([empty, empty, empty])

    assert torch.equal(out, empty[0]) and torch.equal(lse, empty[1])


def test_merge_may_write_over_a_partial():
    partials = [(normal(3, 8, seed=seed), normal(3, seed=seed + 9)) for seed in range(3)]
    expected, expected_lse = merged(partials)

    reference.merge([Partial(*partial) for partial in partials], Partial(*partials[1]))

    assert torch.equal(partials[1][0], expected) and torch.equal(partials[1][1], expected_lse)


def split_with_bug(bug: str):
    """(merged result with the bug, float64 truth) of a sequence of 512 cut at 200."""
    q, keys, values = boundary_adversarial(1, 2, 4, 512, 32, [200])
    cache = paged_cache(keys, values, 16, [range(512)])
    first_stop, second_start = {"drop": (199, 200), "repeat": (200, 199)}.get(bug, (200, 200))
    partials = [
        decode(q, cache, [0], [first_stop]),
        decode(q, cache, [second_start], [511 if bug == "drop newest" else 512]),
    ]
    whole = decode(q.double(), cache, [0], [512])
    if bug == "base 2 lse":
        partials[1] = partials[1][0], partials[1][1] / math.log(2)
    if bug == "average":
        return torch.stack([out for out, _ in partials]).mean(0), whole[0]
    return merged(partials)[0], whole[0]


def test_a_split_without_a_bug_passes_the_threshold():
    assert nmse(*split_with_bug("none")) <= FLOAT32_NMSE


@pytest.mark.parametrize("bug", ["drop", "repeat", "drop newest", "base 2 lse", "average"])
def test_a_planted_bug_misses_the_threshold_by_far(bug):
    assert nmse(*split_with_bug(bug)) > 1e-4


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_rms_norm(rows):
    x, weight, out = normal(rows, 100, seed=1) * 3, normal(100, seed=2), nan(rows, 100)
    expected = x.double() / (x.double().square().sum(-1, keepdim=True) / 100 + 1e-5).sqrt() * weight.double()

    reference.rms_norm(x, weight, 1e-5, out)

    assert nmse(out, expected) <= FLOAT32_NMSE


def test_rms_norm_is_added_to_what_is_there():
    x, weight, out = normal(3, 100, seed=1) * 3, normal(100, seed=2), normal(3, 100, seed=3)
    expected = out + x.double() / (x.double().square().sum(-1, keepdim=True) / 100 + 1e-5).sqrt() * weight.double()

    reference.rms_norm(x, weight, 1e-5, out, True)

    assert nmse(out, expected) <= FLOAT32_NMSE


def test_gelu_mul_is_that_of_its_formula():
    gate_up, out = normal(2, 96, seed=1), nan(2, 48)
    gate, up = gate_up.double().view(2, 3, 2, 16).unbind(2)
    inner = (2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)

    reference.gelu_mul(gate_up, out)

    assert nmse(out, (gate * (1 + torch.tanh(inner)) / 2 * up).flatten(1)) <= FLOAT32_NMSE


def test_silu_mul_reads_sixteen_gates_then_sixteen_ups():
    gate_up, out = normal(2, 96, seed=1), nan(2, 48)
    columns = [(32 * (i // 16) + i % 16, 32 * (i // 16) + 16 + i % 16) for i in range(48)]
    gate, up = (gate_up[:, list(part)].double() for part in zip(*columns))

    reference.silu_mul(gate_up, out)

    assert nmse(out, gate * up / (1 + torch.exp(-gate))) <= FLOAT32_NMSE


@pytest.mark.parametrize("rotary_dim", [16, 12])
@pytest.mark.parametrize("with_norm", [False, True])
def test_rope_append_equals_complex_rotation(rotary_dim, with_norm):
    rows, num_kv_heads, queries_per_kv, head_dim, padding = 3, 2, 3, 16, 4
    qkv = normal(rows, num_kv_heads, 5 * head_dim + padding, seed=1)
    angles = torch.outer(torch.arange(9.0), 0.3 ** torch.arange(rotary_dim // 2))
    positions, slots = torch.tensor([8, 0, 3]), torch.tensor([[5, 9], [0, 1], [11, 6]])
    norm = normal(head_dim, seed=2) if with_norm else None
    q, k_pages, v_pages = nan(rows, 6, head_dim), nan(3, 4, head_dim), nan(3, 4, head_dim, dtype=torch.bfloat16)

    reference.rope_append(
        qkv, positions, Rotation(angles.cos(), angles.sin(), norm, norm, 1e-6), q, Pages(k_pages, v_pages), slots
    )

    heads = qkv[..., : 5 * head_dim].double().unflatten(-1, (5, head_dim))
    expected = heads.clone()
    if with_norm:
        expected = heads / (heads.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.double()
    half = rotary_dim // 2
    turned = torch.complex(expected[..., :half], expected[..., half:rotary_dim])
    turned = turned * torch.polar(torch.ones(()).double(), angles[positions].double())[:, None, None]
    expected[..., :half], expected[..., half:rotary_dim] = turned.real, turned.imag
    keys, values = k_pages.view(12, head_dim), v_pages.view(12, head_dim)

    assert nmse(q, expected[:, :, :queries_per_kv].reshape(q.shape)) <= FLOAT32_NMSE
    assert nmse(keys[slots], expected[:, :, queries_per_kv]) <= FLOAT32_NMSE
    assert torch.equal(values[slots], heads[:, :, queries_per_kv + 1].bfloat16())
    assert keys.isnan().all(-1).sum() == 6


def test_importing_the_package_and_the_reference_does_not_import_triton():
    code = "import sys, gpu_kernels, gpu_kernels.reference; sys.exit('triton' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
