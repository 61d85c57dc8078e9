"""Rows of one sequence that decode attention takes together: every row's result is that of a call of its own, bit for
bit."""

import pytest
import torch

from cpu_kernels.contract import Pages, Partial, RowKeys
from tests.cpu_kernels.attention.test_kv_pages import CodePages
from tests.support.kernels.cpu_oracles import ISAS, PagedCache, kernels

PLAIN = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOKENS, PAGE = 1100, 64
# Of each sequence where its rows' keys end: drafts behind a token, at the border where 16 tiles in two splits become
# 17; pieces of a prompt; a row alone; rows that end alike; and one whose last page alone is that of the others.
STOPS = ([1022, 1023, 1024, 1025, 1026], [63, 64, 65], [900], [700, 700], [1025])
CASES = [
    ("avx512", "bf16", 1, 64),
    ("avx512", "bf16", 2, 40),
    ("avx512", "bf16", 4, 128),
    ("avx512", "q8", 1, 64),
    ("avx512", "q4", 7, 96),
    ("avx512vnni", "bf16", 8, 128),
    ("avx512vnni", "bf16", 1, 64),
    ("avxvnni", "q8", 7, 96),
    ("avx2", "bf16", 7, 72),
    ("avx2", "q8", 8, 128),
    ("portable", "q4", 1, 64),
    ("portable", "fp32", 4, 40),
]


def cache_of(kv_dtype, sequences, page_size, head_dim, tokens=TOKENS):
    if kv_dtype in PLAIN:
        return PagedCache(sequences, 2, tokens, page_size, head_dim, PLAIN[kv_dtype])
    return CodePages(kv_dtype, sequences, 2, tokens, page_size, head_dim)


def bounds_of(values):
    return torch.tensor(values, dtype=torch.int32)


def check_rows(ops, cache, rows, queries_per_kv, head_dim, cap=0.0):
    """rows: (sequence, start, stop) of each; all in one call, and each in one of its own."""
    q = torch.randn(len(rows), 2 * queries_per_kv, head_dim)
    together, alone = (Partial(torch.empty_like(q), torch.empty(q.shape[:2])) for _ in range(2))
    table = torch.stack([cache.table[sequence] for sequence, _, _ in rows])
    starts, stops = (bounds_of([row[at] for row in rows]) for at in (1, 2))
    pages, scale = Pages(cache.k, cache.v), head_dim**-0.5

    ops.decode_attention(q, pages, RowKeys(table, starts, stops), scale, together, cap)
    for at in range(len(rows)):
        own = slice(at, at + 1)
        into, keys = Partial(alone.out[own], alone.lse[own]), RowKeys(table[own], starts[own], stops[own])
        ops.decode_attention(q[own], pages, keys, scale, into, cap)

    assert torch.isfinite(alone.out).all()
    assert torch.equal(together.out, alone.out) and torch.equal(together.lse, alone.lse)


def drafted(window=0):
    """Rows of STOPS; window: keys that each sees at most, 0 for all."""
    return [
        (sequence, max(0, stop - window) if window else 0, stop)
        for sequence, stops in enumerate(STOPS)
        for stop in stops
    ]


@pytest.mark.parametrize("window", [0, 600])
@pytest.mark.parametrize(("isa", "kv_dtype", "queries_per_kv", "head_dim"), CASES)
def test_rows_together_are_rows_alone(isa, kv_dtype, queries_per_kv, head_dim, window):
    """Windows begin one key later a row, so that first tiles differ as last ones do."""
    if isa not in ISAS:
        pytest.skip(f"this CPU runs {', '.join(ISAS)}")
    torch.manual_seed(1)
    cache = cache_of(kv_dtype, len(STOPS), PAGE, head_dim)

    check_rows(kernels(isa), cache, drafted(window), queries_per_kv, head_dim)


@pytest.mark.parametrize("page_size", [1, 16, 128])
@pytest.mark.parametrize("kv_dtype", ["bf16", "q8"])
def test_pages_of_every_size(kv_dtype, page_size):
    torch.manual_seed(2)
    cache = cache_of(kv_dtype, len(STOPS), page_size, 64)

    check_rows(kernels(), cache, drafted(90), 1, 64)


@pytest.mark.parametrize("kv_dtype", ["bf16", "q8"])
def test_sixteen_rows_and_capped_scores(kv_dtype):
    """As many rows as an item takes, more query vectors than take a tile together, and ranges that hold no key."""
    torch.manual_seed(3)
    cache, stops = cache_of(kv_dtype, 1, PAGE, 64, 300), [280 + row for row in range(14)]
    rows = [(0, 0, stop) for stop in stops]

    check_rows(kernels(), cache, [*rows, (0, 250, 40), (0, 293, 294)], 6, 64, cap=3.0)


def test_prefixes_that_sequences_share():
    """Pages in common at the beginning, others behind: rows may be together or not, and read their own pages."""
    torch.manual_seed(4)
    cache = cache_of("bf16", 3, PAGE, 64, 300)
    cache.table[1, :, :3] = cache.table[0, :, :3]
    cache.table[2, 0] = cache.table[0, 0]  # the first KV head's alone, which tells whether rows are together

    check_rows(kernels(), cache, [(0, 0, 290), (1, 0, 290), (0, 0, 291), (2, 0, 291), (2, 0, 292)], 4, 64)


def test_more_rows_than_an_item_takes():
    """Beyond sixteen a row's splits depend on how many rows there are; results are those of float32 sums."""
    torch.manual_seed(5)
    cache, q = cache_of("fp32", 1, PAGE, 64, 300), torch.randn(40, 4, 64)
    starts, stops = bounds_of([0] * 40), bounds_of(range(260, 300))
    many, pairs = (Partial(torch.empty_like(q), torch.empty(40, 4)) for _ in range(2))

    def decode(rows, into):
        keys = RowKeys(cache.table.expand(40, -1, -1)[rows], starts[rows], stops[rows])
        own = Partial(into.out[rows], into.lse[rows])
        kernels().decode_attention(q[rows], Pages(cache.k, cache.v), keys, 0.1, own)

    decode(slice(None), many)
    for first in range(0, 40, 2):
        decode(slice(first, first + 2), pairs)

    assert torch.allclose(many.out, pairs.out, atol=1e-6) and torch.allclose(many.lse, pairs.lse, atol=1e-5)
