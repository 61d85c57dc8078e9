"""Soft caps of attention scores: every KV dtype and instruction set against the reference in float64."""

import numpy as np
import pytest
import torch

from cpu_kernels.contract import ChunkKeys, Pages, Partial, RowKeys
from gpu_kernels import reference
from tests.cpu_kernels.attention.test_kv_pages import FASTEST, PLAIN, CodePages
from tests.support.kernels.cpu_oracles import PagedCache, guarded, kernels, nmse, only_inside_written

# KV dtype: NMSE of what its kernel rounds beside the reference, which holds q and weights more finely beside codes.
LIMITS = {"fp32": 1e-12, "bf16": 1e-8, "q8": 3e-5, "q4": 3e-5}
PLAIN_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CAP, SCALE = 3.0, 0.25  # scores reach several times the cap
CASES = [*((FASTEST, kv_dtype) for kv_dtype in LIMITS), (PLAIN, "bf16")]


def cache_of(kv_dtype, batch, head_dim):
    if kv_dtype in PLAIN_DTYPES:
        return PagedCache(batch, 2, 150, 16, head_dim, PLAIN_DTYPES[kv_dtype])
    return CodePages(kv_dtype, batch, 2, 150, 16, head_dim)


def agree(op, oracle, q, pages, keys, limit):
    """Written inside alone, near the oracle in float64, and far from what no cap gives."""
    (out, memory), (lse, lse_memory) = guarded(*q.shape), guarded(*q.shape[:2])
    expected, plain = (Partial(torch.empty(q.shape).double(), torch.empty(q.shape[:2]).double()) for _ in range(2))
    oracle(q.double(), pages, keys, SCALE, expected, CAP)
    oracle(q.double(), pages, keys, SCALE, plain)

    op(q, pages, keys, SCALE, Partial(out, lse), CAP)

    assert only_inside_written(memory) and only_inside_written(lse_memory)
    assert nmse(out, expected.out) < limit < 1e-2 < nmse(plain.out, expected.out)
    assert torch.allclose(lse.double(), expected.lse, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("isa", "kv_dtype"), CASES)
def test_decode_is_capped(isa, kv_dtype):
    torch.manual_seed(1)
    cache, q = cache_of(kv_dtype, 2, 64), 3 * torch.randn(2, 6, 64)
    keys = RowKeys(cache.table, torch.tensor([0, 9], dtype=torch.int32), torch.tensor([150, 77], dtype=torch.int32))

    agree(
        kernels(isa).decode_attention,
        reference.decode_attention,
        q,
        Pages(cache.k, cache.v),
        keys,
        limit=LIMITS[kv_dtype],
    )


@pytest.mark.parametrize(("isa", "kv_dtype"), CASES)
@pytest.mark.parametrize("window", [0, 40])
def test_prefill_is_capped(isa, kv_dtype, window):
    torch.manual_seed(2)
    cache, q = cache_of(kv_dtype, 1, 40), 3 * torch.randn(21, 4, 40)
    keys = ChunkKeys(cache.table[0], 3, 149, 130, window)
    ops = kernels(isa).prefill_attention, reference.prefill_attention

    agree(*ops, q, Pages(cache.k, cache.v), keys, limit=LIMITS[kv_dtype])


@pytest.mark.parametrize("kv_dtype", ["q8", "q4"])
def test_a_query_of_zeros_sees_all_keys_alike(kv_dtype):
    """Its codes have no scale, and nothing is divided by it."""
    torch.manual_seed(3)
    cache, q, lse = cache_of(kv_dtype, 1, 64), torch.zeros(1, 6, 64), torch.empty(1, 6)  # the kernel of above
    keys = RowKeys(cache.table, torch.tensor([0], dtype=torch.int32), torch.tensor([100], dtype=torch.int32))

    kernels().decode_attention(q, Pages(cache.k, cache.v), keys, SCALE, Partial(torch.empty_like(q), lse), CAP)

    assert torch.allclose(lse, torch.full_like(lse, np.log(100.0)))


def test_a_cap_below_zero_is_refused():
    cache, q = cache_of("fp32", 1, 64), torch.zeros(1, 2, 64)
    keys = RowKeys(cache.table, torch.tensor([0], dtype=torch.int32), torch.tensor([100], dtype=torch.int32))

    with pytest.raises(ValueError, match="cap is -1.0; it must be 0"):
        kernels().decode_attention(q, Pages(cache.k, cache.v), keys, SCALE, Partial(q, torch.empty(1, 2)), -1.0)
