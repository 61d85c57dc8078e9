"""decode_attention, prefill_attention and merge on every instruction set against float64."""

import math

import pytest
import torch

from cpu_kernels import CpuKernels
from cpu_kernels.contract import ChunkKeys, Pages, Partial, RowKeys
from tests.support.kernels.cpu_oracles import (
    BF16_PATHS,
    ISAS,
    PagedCache,
    attention,
    guarded,
    kernels,
    nmse,
    only_inside_written,
)

# Against float64 over the same rounded q, K and V: float32 accumulation only. Rounding of outputs would be 1e-5.
ATTENTION_NMSE = 1e-11
# Beside bf16 rows a weight within that error of a rounding boundary may go to the other side, which is 2**-8 of it.
BF16_NMSE = 1e-8
LSE_ERROR = 1e-5
BF16, FP32 = torch.bfloat16, torch.float32
LIMITS = {FP32: ATTENTION_NMSE, BF16: BF16_NMSE}


def check_decode(ops, cache, queries_per_kv, starts, stops):
    """Run decode_attention with guarded outputs and compare every head of every sequence."""
    sequences, kv_heads, _ = cache.table.shape
    head_dim, num_heads = cache.k.shape[2], kv_heads * queries_per_kv
    q, scale = torch.randn(sequences, num_heads, head_dim), head_dim**-0.5
    out, memory = guarded(sequences, num_heads, head_dim)
    lse, lse_memory = guarded(sequences, num_heads)
    bounds = [torch.tensor(values, dtype=torch.int32) for values in (starts, stops)]

    ops.decode_attention(q, Pages(cache.k, cache.v), RowKeys(cache.table, *bounds), scale, Partial(out, lse))

    assert only_inside_written(memory) and only_inside_written(lse_memory)
    for row in range(sequences):
        for head in range(num_heads):
            keys, values = cache.rows(row, head // queries_per_kv, starts[row], stops[row])
            visible = torch.ones(1, len(keys), dtype=torch.bool)
            query = q[row, head].to(cache.k.dtype)[None]
            expected, expected_lse = attention(query, keys, values, visible, scale)
            if starts[row] >= stops[row]:
                assert out[row, head].abs().max() == 0 and lse[row, head] == -math.inf
            else:
                assert nmse(out[row, head], expected[0]) < LIMITS[cache.k.dtype]
                assert abs(lse[row, head].item() - expected_lse.item()) <= LSE_ERROR * max(1, abs(expected_lse.item()))


@pytest.mark.parametrize("queries_per_kv", [1, 2, 4, 7, 8])
@pytest.mark.parametrize(("head_dim", "page_size"), [(40, 1), (64, 64), (96, 4), (128, 16), (256, 64)])
def test_decode_agrees_with_float64(queries_per_kv, head_dim, page_size):
    torch.manual_seed(head_dim + queries_per_kv)
    cache = PagedCache(3, 2, 150, page_size, head_dim, BF16)

    check_decode(kernels(), cache, queries_per_kv, [0, 5, 149], [150, 133, 150])


@pytest.mark.parametrize("queries_per_kv", [1, 4])
def test_decode_fp32_cache(queries_per_kv):
    torch.manual_seed(1)
    cache = PagedCache(2, 2, 90, 4, 40, FP32)

    check_decode(kernels(), cache, queries_per_kv, [0, 3], [90, 70])


@pytest.mark.parametrize(
    ("isa", "queries_per_kv"), [("avx512", 4), ("avx512vnni", 8), ("avx512vnni", 1), ("avx2", 7), ("portable", 2)]
)
def test_decode_with_and_without_bf16_instructions(isa, queries_per_kv):
    if isa not in ISAS:
        pytest.skip(f"this CPU runs {', '.join(ISAS)}")
    torch.manual_seed(2)
    cache = PagedCache(2, 1, 70, 16, 72, BF16)

    check_decode(kernels(isa), cache, queries_per_kv, [0, 1], [70, 67])


@pytest.mark.parametrize("isa", ISAS)
def test_a_key_that_is_no_number_leaves_none(isa):
    """Whatever the bits of a NaN: rounded to bf16 as a number is, one of ones alone would become -0."""
    cache = PagedCache(1, 1, 70, 64, 64, BF16)
    cache.k[cache.table[0, 0, 0].item()].view(torch.int16)[0, 0] = 0x7FFF
    out, lse, bounds = (
        torch.empty(1, 4, 64),
        torch.empty(1, 4),
        [torch.tensor([at], dtype=torch.int32) for at in (0, 70)],
    )

    kernels(isa).decode_attention(
        torch.randn(1, 4, 64), Pages(cache.k, cache.v), RowKeys(cache.table, *bounds), 0.125, Partial(out, lse)
    )

    assert out.isnan().all() and lse.isnan().all()


def test_decode_of_empty_segments_is_the_identity_of_merge():
    """Also the empty range that starts after its stop, and every size around one tile of keys."""
    torch.manual_seed(3)
    cache = PagedCache(6, 1, 130, 16, 64, BF16)

    check_decode(kernels(), cache, 4, [0, 40, 9, 0, 0, 65], [0, 40, 4, 1, 65, 130])


@pytest.mark.parametrize("num_threads", [1, 3])
def test_a_long_range_is_split_over_threads(num_threads):
    """One group and more threads: the range is cut in parts and merged inside."""
    torch.manual_seed(4)
    cache = PagedCache(1, 1, 3000, 64, 64, BF16)

    with CpuKernels(num_threads=num_threads) as ops:
        check_decode(ops, cache, 2, [7], [2990])


@pytest.mark.parametrize("page_size", [16, 64, 128])
@pytest.mark.parametrize(("sequences", "groups", "tokens"), [(2, 6, 2500), (1, 6, 9000), (1, 8, 4100), (40, 3, 70)])
def test_an_item_takes_several_groups(sequences, groups, tokens, page_size):
    """Half of them and four splits, all and sixteen, four and eight, all and one; ranges that begin inside a page."""
    torch.manual_seed(sequences)
    cache = PagedCache(sequences, groups, tokens, page_size, 64, FP32)
    starts = [(7 * row) % 60 for row in range(sequences)]

    with CpuKernels(num_threads=1) as ops:
        check_decode(ops, cache, 2, starts, [tokens - row for row in range(sequences)])


def test_a_single_large_value_at_each_boundary_is_seen():
    """Boundary-adversarial data: one token carries the whole weight, so losing it changes everything."""
    torch.manual_seed(5)
    for position in (0, 63, 64, 127, 128, 129):
        cache = PagedCache(1, 1, 130, 16, 64, FP32)
        page = cache.table[0, 0, position // 16].long()
        cache.k[page, position % 16] = 10.0
        cache.v[page, position % 16] = 1e3 + torch.arange(64)
        q, out, lse = torch.ones(1, 1, 64), torch.empty(1, 1, 64), torch.empty(1, 1)
        bounds = torch.tensor([0], dtype=torch.int32), torch.tensor([130], dtype=torch.int32)

        kernels().decode_attention(q, Pages(cache.k, cache.v), RowKeys(cache.table, *bounds), 1.0, Partial(out, lse))

        assert torch.allclose(out[0, 0], 1e3 + torch.arange(64.0), rtol=1e-6)


@pytest.mark.parametrize(
    ("kv_start", "kv_stop", "window"),
    [(0, 170, 0), (0, 170, 1), (0, 170, 33), (20, 150, 0), (30, 170, 90), (160, 170, 0), (0, 90, 0), (50, 50, 0)],
)
@pytest.mark.parametrize(("queries_per_kv", "head_dim", "dtype"), [(4, 64, BF16), (2, 40, FP32), (7, 128, BF16)])
def test_prefill_agrees_with_float64(queries_per_kv, head_dim, dtype, kv_start, kv_stop, window):
    torch.manual_seed(6)
    cache, q_start, rows = PagedCache(1, 2, 170, 16, head_dim, dtype), 97, 73
    num_heads, scale = 2 * queries_per_kv, head_dim**-0.5
    q = torch.randn(rows, num_heads, head_dim)
    out, memory = guarded(rows, num_heads, head_dim)
    lse, lse_memory = guarded(rows, num_heads)

    kernels().prefill_attention(
        q,
        Pages(cache.k, cache.v),
        ChunkKeys(cache.table[0], kv_start, kv_stop, q_start, window),
        scale,
        Partial(out, lse),
    )

    assert only_inside_written(memory) and only_inside_written(lse_memory)
    row, key = torch.arange(rows)[:, None] + q_start, torch.arange(kv_start, kv_stop)
    visible = key <= row
    if window:
        visible &= key > row - window
    for head in range(num_heads):
        keys, values = cache.rows(0, head // queries_per_kv, kv_start, kv_stop)
        expected, expected_lse = attention(q[:, head].to(dtype), keys, values, visible, scale)
        nothing = ~visible.any(-1)
        assert (out[nothing, head] == 0).all() and (lse[nothing, head] == -math.inf).all()
        assert nmse(out[~nothing, head], expected[~nothing]) < LIMITS[dtype]
        assert torch.allclose(lse[~nothing, head].double(), expected_lse[~nothing], rtol=LSE_ERROR, atol=LSE_ERROR)


@pytest.mark.parametrize("isa", BF16_PATHS)
@pytest.mark.parametrize("rows", [1, 5, 150])
def test_prefill_of_a_prompt_from_the_start(rows, isa):
    torch.manual_seed(7)
    cache = PagedCache(1, 1, rows, 64, 64, BF16)
    q, out, lse = torch.randn(rows, 4, 64), torch.empty(rows, 4, 64), torch.empty(rows, 4)

    kernels(isa).prefill_attention(
        q, Pages(cache.k, cache.v), ChunkKeys(cache.table[0], 0, rows, 0), 0.125, Partial(out, lse)
    )

    keys, values = cache.rows(0, 0, 0, rows)
    visible = torch.ones(rows, rows).tril().bool()
    for head in range(4):
        expected, expected_lse = attention(q[:, head].to(BF16), keys, values, visible, 0.125)
        assert nmse(out[:, head], expected) < BF16_NMSE
        assert torch.allclose(lse[:, head].double(), expected_lse, rtol=LSE_ERROR, atol=LSE_ERROR)


def test_large_scores_do_not_overflow():
    torch.manual_seed(8)
    cache = PagedCache(1, 1, 80, 16, 64, FP32)
    q, out, lse = 1e4 * torch.randn(1, 1, 64), torch.empty(1, 1, 64), torch.empty(1, 1)
    bounds = torch.tensor([0], dtype=torch.int32), torch.tensor([80], dtype=torch.int32)

    kernels().decode_attention(q, Pages(cache.k, cache.v), RowKeys(cache.table, *bounds), 1.0, Partial(out, lse))

    keys, values = cache.rows(0, 0, 0, 80)
    best = (keys.double() @ q[0, 0].double()).argmax()
    assert torch.allclose(out[0, 0], values[best], rtol=1e-5) and lse.isfinite().all()


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_merge_of_parts_is_the_whole(parts):
    torch.manual_seed(9)
    cache = PagedCache(1, 1, 200, 16, 40, FP32)
    cuts = sorted(torch.randint(0, 201, (parts - 1,)).tolist())
    ranges = list(zip([0, *cuts], [*cuts, 200]))
    q, partials = torch.randn(1, 3, 40), []
    for start, stop in [*ranges, (5, 5)]:
        partials.append(Partial(torch.empty(1, 3, 40), torch.empty(1, 3)))
        bounds = [torch.tensor([value], dtype=torch.int32) for value in (start, stop)]
        kernels().decode_attention(q, Pages(cache.k, cache.v), RowKeys(cache.table, *bounds), 0.2, partials[-1])
    out, memory = guarded(1, 3, 40)
    lse, lse_memory = guarded(1, 3)

    kernels().merge(partials, Partial(out, lse))

    assert only_inside_written(memory) and only_inside_written(lse_memory)
    keys, values = cache.rows(0, 0, 0, 200)
    expected, expected_lse = attention(q[0], keys, values, torch.ones(3, 200, dtype=torch.bool), 0.2)
    assert nmse(out[0], expected) < ATTENTION_NMSE
    assert torch.allclose(lse[0].double(), expected_lse, rtol=LSE_ERROR)


def test_merge_of_nothing_is_nothing():
    out, lse = torch.ones(2, 3, 8), torch.ones(2, 3)
    empty = Partial(torch.zeros(2, 3, 8), torch.full((2, 3), -math.inf))

    kernels().merge([empty] * 2, Partial(out, lse))

    assert (out == 0).all() and (lse == -math.inf).all()


@pytest.mark.parametrize(
    ("bounds", "table", "message"),
    [((0, 65), [0, 1, 2, 3], "0..64"), ((-1, 5), [0, 1, 2, 3], "0..64"), ((0, 64), [0, 1, 9, 3], "keys.table")],
)
def test_content_that_points_outside_the_pages_is_an_error(bounds, table, message):
    pages, q = torch.zeros(4, 16, 8), torch.zeros(1, 1, 8)
    start, stop = (torch.tensor([value], dtype=torch.int32) for value in bounds)
    entries = torch.tensor([[table]], dtype=torch.int32)

    with pytest.raises(ValueError, match=message):
        kernels().decode_attention(
            q, Pages(pages, pages), RowKeys(entries, start, stop), 1.0, Partial(torch.empty(1, 1, 8), torch.empty(1, 1))
        )


def test_merge_of_many_strided_partials():
    """More partials than one call takes, out of and into tensors that are not contiguous."""
    torch.manual_seed(10)
    outs = [torch.randn(3, 2, 24)[..., :20] for _ in range(33)]
    lses = [torch.randn(3, 2) for _ in outs]
    out, memory = guarded(3, 2, 20)
    lse, lse_memory = guarded(3, 2)

    kernels().merge([Partial(*part) for part in zip(outs, lses)], Partial(out, lse))

    total = torch.logsumexp(torch.stack(lses).double(), 0)
    weights = torch.exp(torch.stack(lses).double() - total)[..., None]
    assert only_inside_written(memory) and only_inside_written(lse_memory)
    assert nmse(out, (weights * torch.stack(outs)).sum(0)) < ATTENTION_NMSE
    assert torch.allclose(lse.double(), total, rtol=LSE_ERROR)
