"""Decode attention, prefill attention and merge in Triton against float64."""

from __future__ import annotations

import pytest
import torch

from cpu_kernels.contract import ChunkKeys, Pages, Partial, RowKeys
from tests.support.kernels import kernel_checks as checks

pytest.importorskip("triton", reason="triton is not installed (the test extra has it on x86-64 Linux)")

from gpu_kernels.attention import decode, prefill
from gpu_kernels.attention.merge import merge
from gpu_kernels.device_ops import DeviceOps

FP32, BF16 = torch.float32, torch.bfloat16
RANGES = [(5, 140), (0, 1), (300, 300), (63, 65)]


@pytest.mark.parametrize(
    "dtype,num_kv_heads,queries_per_kv,head_dim,page_size,length",
    [
        (BF16, 2, 4, 64, 16, 320),
        (BF16, 1, 7, 128, 8, 600),
        (FP32, 2, 1, 64, 16, 600),
        (BF16, 1, 2, 80, 256, 1200),
        (FP32, 1, 3, 24, 1, 310),
        (BF16, 1, 8, 256, 32, 320),
        (BF16, 1, 17, 16, 16, 600),
        (BF16, 2, 4, 128, 64, 320),
        (FP32, 1, 2, 64, 48, 320),
    ],
)
def test_decode_attention(device, dtype, num_kv_heads, queries_per_kv, head_dim, page_size, length):
    checks.check_decode(
        decode.decode_attention, device, dtype, num_kv_heads, queries_per_kv, head_dim, page_size, length, RANGES
    )


@pytest.mark.parametrize("dtype,head_dim,cap", [(BF16, 256, 1.5), (FP32, 24, 0.3), (BF16, 64, 50.0)])
def test_attention_with_a_soft_cap(device, dtype, head_dim, cap):
    """Far above the scores, near them and far below."""
    checks.check_decode(decode.decode_attention, device, dtype, 1, 2, head_dim, 16, 320, RANGES, cap)
    checks.check_prefill(prefill.prefill_attention, device, dtype, 70, 1, 2, head_dim, 16, 9, 98, 28, 20, cap)


@pytest.mark.parametrize("length", [320, 600])
def test_decode_attention_with_every_range_empty(device, length):
    checks.check_decode(decode.decode_attention, device, BF16, 2, 2, 32, 16, length, [(0, 0), (17, 17)])


def test_decode_attention_splits_a_long_cache_evenly(device):
    checks.check_decode(decode.decode_attention, device, BF16, 1, 1, 16, 64, 1024, [(1, 1024), (0, 257)])


@pytest.mark.table
@pytest.mark.parametrize(
    "page_size,ranges",
    [
        (64, [(70, 1000), (0, 3), (640, 704), (9, 9)]),
        (256, [(255, 257), (0, 1024), (200, 900)]),
        (16, [(1, 2), (31, 1021)]),
    ],
)
@pytest.mark.parametrize("max_splits", [64, 3])
def test_decode_attention_of_very_different_lengths(device, page_size, ranges, max_splits, monkeypatch):
    monkeypatch.setattr(decode, "MAX_SPLITS", max_splits)

    checks.check_decode(decode.decode_attention, device, BF16, 1, 3, 32, page_size, 1024, ranges)


def test_decode_attention_of_more_heads_than_counters_is_not_split(device):
    def uncounted(*arguments):
        decode.counted_decode_attention(torch.zeros(1, dtype=torch.int32, device=device), *arguments)

    checks.check_decode(uncounted, device, FP32, 2, 1, 16, 16, 200, [(3, 200)])


def test_calls_one_after_another_find_the_counters_clean(device):
    ops = DeviceOps(device)

    for ranges in ([(5, 600), (0, 70)], [(0, 0), (1, 2)], [(64, 128), (3, 599)], [(5, 600), (0, 70)]):
        checks.check_decode(ops.decode_attention, device, FP32, 2, 2, 16, 64, 600, ranges)


def test_a_decode_attention_is_the_same_every_time(device):
    q, pages = torch.randn(1, 4, 32, device=device), torch.randn(8, 64, 32, device=device).bfloat16()
    table = torch.arange(8, dtype=torch.int32, device=device).view(1, 1, 8)
    start, stop = table.new_zeros(1), table.new_full((1,), 500)
    outs = [torch.empty_like(q) for _ in range(3)]

    for out in outs:
        decode.decode_attention(
            q, Pages(pages, pages), RowKeys(table, start, stop), 0.2, Partial(out, torch.empty_like(q[..., 0]))
        )

    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


def test_a_scale_that_is_not_positive_is_refused(device):
    q, pages = torch.zeros(1, 1, 16, device=device), torch.zeros(1, 4, 16, device=device)
    table = torch.zeros(1, 1, dtype=torch.int32, device=device)

    with pytest.raises(AssertionError, match="the largest score is looked for before it is multiplied by -1"):
        prefill.prefill_attention(q, Pages(pages, pages), ChunkKeys(table, 0, 1, 0), -1.0, Partial(q, q[..., 0]))


@pytest.mark.table
@pytest.mark.parametrize(
    "dtype,num_kv_heads,queries_per_kv,head_dim,page_size",
    [(BF16, 2, 2, 64, 16), (FP32, 1, 1, 24, 8), (BF16, 1, 3, 80, 1), (BF16, 1, 4, 128, 64)],
)
@pytest.mark.parametrize(
    "start,stop,q_start,window", [(0, 98, 28, 0), (9, 98, 28, 20), (7, 20, 40, 0), (0, 98, 28, 1), (90, 98, 28, 0)]
)
def test_prefill_attention(
    device, dtype, num_kv_heads, queries_per_kv, head_dim, page_size, start, stop, q_start, window
):
    checks.check_prefill(
        prefill.prefill_attention,
        device,
        dtype,
        70,
        num_kv_heads,
        queries_per_kv,
        head_dim,
        page_size,
        start,
        stop,
        q_start,
        window,
    )


@pytest.mark.parametrize(
    "q_len,start,stop,q_start,window",
    [(1, 0, 130, 129, 0), (1, 3, 130, 200, 64), (5, 0, 5, 0, 0), (5, 3, 3, 3, 0), (3, 10, 40, 60, 8)],
)
def test_prefill_attention_of_few_rows(device, q_len, start, stop, q_start, window):
    checks.check_prefill(prefill.prefill_attention, device, BF16, q_len, 1, 2, 128, 16, start, stop, q_start, window)


@pytest.mark.table
@pytest.mark.parametrize("page_size", [32, 48, 128])
@pytest.mark.parametrize(
    "start,stop,q_start,window",
    [
        (0, 330, 260, 0),
        (70, 330, 260, 0),
        (5, 200, 260, 0),
        (0, 330, 260, 150),
        (100, 290, 260, 150),
        (0, 330, 260, 33),
    ],
)
def test_prefill_attention_over_whole_and_cut_blocks(device, page_size, start, stop, q_start, window):
    checks.check_prefill(prefill.prefill_attention, device, FP32, 70, 1, 2, 32, page_size, start, stop, q_start, window)


def test_prefill_attention_of_a_large_head(device):
    checks.check_prefill(prefill.prefill_attention, device, BF16, 66, 1, 1, 256, 16, 0, 66, 0, 0)


@pytest.mark.parametrize(
    "parts,shape,empty",
    [
        (1, (3, 4, 64), []),
        (2, (3, 2, 80), []),
        (2, (3, 2, 64), [0]),
        (3, (4, 1, 128), [2]),
        (5, (2, 2, 3, 16), [1, 3]),
        (2, (4, 16), []),
        (3, (3, 2, 64), [0, 1, 2]),
    ],
)
def test_merge(device, parts, shape, empty):
    checks.check_merge(merge, device, parts, shape, empty)


def test_merge_may_write_over_a_partial(device):
    def merge_in_place(partials, into):
        merge(partials, partials[1])
        into.out.copy_(partials[1].out)
        into.lse.copy_(partials[1].lse)

    checks.check_merge(merge_in_place, device, 3, (3, 2, 64), [2])


def test_ops_accept_no_rows(device):
    none, pages = torch.zeros(0, 2, 16, device=device), torch.zeros(1, 4, 16, device=device)
    limits = torch.zeros(0, dtype=torch.int32, device=device)
    table = limits.new_zeros(0, 1, 1)

    decode.decode_attention(none, Pages(pages, pages), RowKeys(table, limits, limits), 1.0, Partial(none, none[..., 0]))
    prefill.prefill_attention(
        none, Pages(pages, pages), ChunkKeys(table.new_zeros(1, 1), 0, 4, 4), 1.0, Partial(none, none[..., 0])
    )
    nothing = Partial(none, none[..., 0])
    merge([nothing, nothing], nothing)


def test_a_head_too_large_is_refused(device):
    q, pages = torch.zeros(1, 1, 600, device=device), torch.zeros(1, 4, 600, device=device)
    table = torch.zeros(1, 1, dtype=torch.int32, device=device)

    with pytest.raises(ValueError, match="head_dim 600 has no attention kernel: the largest is 512"):
        prefill.prefill_attention(q, Pages(pages, pages), ChunkKeys(table, 0, 1, 0), 1.0, Partial(q, q[..., 0]))
