"""Pages of codes: the format byte by byte, and every op that writes or reads them on every instruction set."""

import math

import pytest
import torch

from cpu_kernels.contract import ChunkKeys, Pages, Partial, Rotation, RowKeys
from cpu_kernels.formats import pages as kv_layout
from gpu_kernels import kv_pages, reference
from tests.support.kernels.code_pages import DTYPES, HEAD_DIMS, check_rope_append, hadamard, read_row
from tests.support.kernels.cpu_oracles import BF16_PATHS, ISAS, attention, guarded, kernels, nmse, only_inside_written
from tests.support.kernels.kernel_data import generator, normal

FASTEST, PLAIN = BF16_PATHS[0], BF16_PATHS[-1]  # the paths between them multiply codes as the plain one does
# Decode multiplies codes by q and p * scale in 16 bits, 2**-16 of the largest; prefill widens codes to bf16, 2**-9.
DECODE_NMSE, PREFILL_NMSE, LSE_ERROR = 1e-7, 5e-5, 1e-4


class CodePages:
    """Random K and V in shuffled pages of codes; every byte that no token owns is 255, so that stray scales are NaN."""

    def __init__(self, kv_dtype, sequences, num_kv_heads, tokens, page_size, head_dim):
        self.page_size, self.head_dim, pages = page_size, head_dim, -(-tokens // page_size)
        count = sequences * num_kv_heads * pages
        order = torch.randperm(count + 3)[:count].to(torch.int32)
        self.table = order.reshape(sequences, num_kv_heads, pages)
        shape = (count + 3, page_size, kv_layout.row_items(kv_dtype, head_dim))
        self.k, self.v = (torch.full(shape, 255, dtype=torch.uint8).view(DTYPES[kv_dtype]) for _ in range(2))
        positions = torch.arange(tokens)
        for row in self.table.flatten(0, 1):
            at = row.long()[positions // page_size], positions % page_size
            for target in (self.k, self.v):
                kv_pages.write_rows(target, *at, torch.randn(tokens, head_dim) * (0.5 + torch.rand(head_dim)))

    def rows(self, sequence, kv_head, start, stop):
        """K and V of positions [start, stop), float64."""
        positions = torch.arange(start, max(start, stop))
        pages = self.table[sequence, kv_head].long()[positions // self.page_size]
        return [
            kv_pages.read_rows(target[pages], self.head_dim, torch.float64)[
                torch.arange(len(positions)), positions % self.page_size
            ]
            for target in (self.k, self.v)
        ]


@pytest.mark.parametrize("kv_dtype", kv_layout.KV_DTYPES)
@pytest.mark.parametrize("head_dim", [8, 40, 64, 96, 128, 256])
def test_the_two_descriptions_of_a_row_have_the_same_size(kv_dtype, head_dim):
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, **DTYPES}[kv_dtype]

    assert kv_layout.row_items(kv_dtype, head_dim) == kv_pages.row_items(dtype, head_dim)
    assert kv_layout.token_bytes(kv_dtype, head_dim) == 2 * dtype.itemsize * kv_pages.row_items(dtype, head_dim)


@pytest.mark.parametrize("kv_dtype", DTYPES)
@pytest.mark.parametrize("head_dim,page_size", [(40, 4), (64, 1), (128, 5)])
def test_rows_are_stored_as_described(kv_dtype, head_dim, page_size):
    """Also that a stored number is the nearest that its group's scale can say."""
    torch.manual_seed(head_dim)
    shape = (3, page_size, kv_layout.row_items(kv_dtype, head_dim))
    pages = torch.full(shape, 255, dtype=torch.uint8).view(DTYPES[kv_dtype])
    rows = torch.randn(2 * page_size, head_dim)
    at = torch.arange(2 * page_size)
    kv_pages.write_rows(pages, 1 + at // page_size, at % page_size, rows)

    read = kv_pages.read_rows(pages, head_dim, torch.float64)
    for index, row in enumerate(rows):
        page, offset = 1 + index // page_size, index % page_size
        assert torch.equal(read_row(pages[page], offset, head_dim), read[page, offset])
        for group in row.split(kv_layout.GROUP_DIMS[kv_dtype]):
            step = group.abs().max() / 127 if kv_dtype == "q8" else (group.max() - group.min()) / 15
            stored = read[page, offset, : len(group)] if group is row[: len(group)] else None
            assert stored is None or (stored - group).abs().max() <= 0.52 * step
    assert (pages[0].view(torch.uint8) == 255).all()


@pytest.mark.parametrize("kv_dtype", DTYPES)
def test_a_row_of_equal_numbers_and_one_of_zeros_are_kept(kv_dtype):
    pages = torch.zeros(1, 2, kv_layout.row_items(kv_dtype, 64), dtype=DTYPES[kv_dtype])
    rows = torch.stack((torch.zeros(64), torch.full((64,), -1.5)))

    kv_pages.write_rows(pages, torch.tensor([0, 0]), torch.tensor([0, 1]), rows)

    assert torch.allclose(kv_pages.read_rows(pages, 64, torch.float32)[0], rows, rtol=0.004)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kv_dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_rope_append_multiplies_q_and_k_by_the_matrix(isa, kv_dtype, head_dim):
    check_rope_append(kernels(isa).rope_append, "cpu", kv_dtype, head_dim)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kv_dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_the_reference_multiplies_q_and_k_by_the_matrix(dtype, kv_dtype, head_dim):
    check_rope_append(reference.rope_append, "cpu", kv_dtype, head_dim, dtype)


@pytest.mark.parametrize("kv_dtype", kv_layout.KV_DTYPES)
@pytest.mark.parametrize("head_dim", [1, 7, 24, *HEAD_DIMS])
def test_the_two_descriptions_of_a_block_agree(kv_dtype, head_dim):
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, **DTYPES}[kv_dtype]
    block = math.gcd(head_dim, 1 << 20) if kv_dtype in DTYPES else 1

    assert kv_layout.hadamard_block(kv_dtype, head_dim) == kv_pages.hadamard_block(dtype, head_dim) == block


SPREADING_BUGS = {
    "only k": lambda q, block: q @ hadamard(q.shape[-1]).float(),
    "q without the scale": lambda q, block: q * block**0.5,
    "another order of dims": lambda q, block: q.flip(-1),
}


@pytest.mark.parametrize("bug", SPREADING_BUGS)
def test_a_planted_bug_in_the_spreading_of_q_is_caught(bug):
    def mutant(*arguments):
        reference.rope_append(*arguments)
        q = arguments[3]
        q.copy_(SPREADING_BUGS[bug](q, 64))

    with pytest.raises(AssertionError):
        check_rope_append(mutant, "cpu", "q8", 64)


@pytest.mark.parametrize("bug", ["only q", "k without the scale"])
def test_a_planted_bug_in_the_spreading_of_k_is_caught(bug, monkeypatch):
    write_rows, written = kv_pages.write_rows, []

    def mutant(pages, page, offset, rows):
        written.append(None)
        if len(written) == 1:  # k comes before v
            rows = rows @ hadamard(64).float() if bug == "only q" else rows * 8
        write_rows(pages, page, offset, rows)

    monkeypatch.setattr(kv_pages, "write_rows", mutant)

    with pytest.raises(AssertionError):
        check_rope_append(reference.rope_append, "cpu", "q8", 64)


@pytest.mark.parametrize("kv_dtype,factor", [("q8", 5.0), ("q4", 2.0)])
def test_outlier_channels_of_keys_cost_less_than_without_the_matrix(kv_dtype, factor):
    """Squared error of attention, the mean of twenty draws."""
    without, with_matrix = torch.tensor([outlier_errors(kv_dtype, seed) for seed in range(20)]).mean(0)

    assert without > factor * with_matrix


def outlier_errors(kv_dtype: str, seed: int, sizes: tuple[float, ...] = (20, 25, 30, 35, 40, 50)) -> list[float]:
    """NMSE against float64 of decode attention over keys that are stored as they are, and of those of rope_append.

    sizes: what random channels of 128 are multiplied by.
    """
    tokens, heads, head_dim, page_size = 500, 16, 128, 64
    keys, values, q = (normal(rows, head_dim, seed=10 * seed + i) for i, rows in enumerate((tokens, tokens, heads)))
    channels = torch.randperm(head_dim, generator=generator(seed))[: len(sizes)]
    keys[:, channels] *= torch.tensor(sizes)
    scale = 2 / (q @ keys.T).std().item()  # neither one key alone nor all of them alike
    expected, _ = attention(q, keys, values, torch.ones(heads, tokens, dtype=torch.bool), scale)
    at, pages = torch.arange(tokens), -(-tokens // page_size)
    shape = (pages, page_size, kv_layout.row_items(kv_dtype, head_dim))
    plain_k, k, v = (torch.zeros(shape, dtype=DTYPES[kv_dtype]) for _ in range(3))
    kv_pages.write_rows(plain_k, at // page_size, at % page_size, keys)
    angles = torch.ones(tokens, head_dim // 2), torch.zeros(tokens, head_dim // 2)
    units = torch.cat((q.expand(tokens, -1, -1).flatten(1), keys, values), -1)[:, None]
    spread = torch.empty(tokens, heads, head_dim)
    kernels().rope_append(units, at, Rotation(*angles, None, None, 1e-6), spread, Pages(k, v), at[:, None])
    table, start = torch.arange(pages, dtype=torch.int32)[None, None], torch.zeros(1, dtype=torch.int32)
    errors = []
    for query, stored in ((q, plain_k), (spread[0], k)):
        out, lse = torch.empty(1, heads, head_dim), torch.empty(1, heads)
        kernels().decode_attention(
            query[None], Pages(stored, v), RowKeys(table, start, start + tokens), scale, Partial(out, lse)
        )
        errors.append(nmse(out[0], expected))
    return errors


@pytest.mark.parametrize(("isa", "heads", "head_dim"), [(FASTEST, 4, 128), (PLAIN, 1, 64)])
def test_a_value_group_whose_minimum_is_rounded_above_it(isa, heads, head_dim):
    """Its q4 scale is negative; what is left of its numbers is within a rounding to bf16."""
    torch.manual_seed(5)
    keys, values, positions = torch.randn(64, head_dim), torch.randn(64, head_dim), torch.arange(64)
    values[::2, :32] = 1.0045
    pages = [torch.zeros(1, 64, kv_layout.row_items("q4", head_dim), dtype=torch.uint8) for _ in range(2)]
    for page, rows in zip(pages, (keys, values), strict=True):
        kv_pages.write_rows(page, torch.zeros(64, dtype=torch.long), positions, rows)
    assert pages[1].view(-1)[64 * kv_layout.code_bytes("q4", head_dim) :].view(torch.bfloat16)[0] < 0
    q, table = torch.randn(1, heads, head_dim), torch.zeros(1, 1, 1, dtype=torch.int32)
    bounds, results = [torch.tensor([limit], dtype=torch.int32) for limit in (0, 64)], []
    for ops in (reference, kernels(isa)):
        out, lse = torch.empty_like(q), torch.empty(1, heads)
        ops.decode_attention(q, Pages(*pages), RowKeys(table, *bounds), head_dim**-0.5, Partial(out, lse))
        results.append(out)

    assert nmse(results[1], results[0]) < 2e-5


@pytest.mark.parametrize("isa", BF16_PATHS)
@pytest.mark.parametrize("kv_dtype", DTYPES)
@pytest.mark.parametrize("head_dim,page_size", [(40, 4), (64, 64), (96, 8), (128, 1)])
def test_rope_append_writes_the_bytes_of_the_reference(isa, kv_dtype, head_dim, page_size):
    """Rotation by nothing, so that both see the same numbers; the bytes of other tokens stay as they were."""
    torch.manual_seed(head_dim)
    rows, groups, heads = 7, 2, 2
    qkv = torch.randn(rows, groups, (heads + 2) * head_dim + 8)
    angles = torch.ones(rows, head_dim // 2), torch.zeros(rows, head_dim // 2)
    slots = torch.randperm(rows * groups + 11)[: rows * groups].reshape(rows, groups)
    num_pages = -(-(rows * groups + 11) // page_size)
    shape = (num_pages, page_size, kv_layout.row_items(kv_dtype, head_dim))
    written = []
    for ops in (reference, kernels(isa)):
        k, v = (torch.full(shape, 255, dtype=torch.uint8).view(DTYPES[kv_dtype]) for _ in range(2))
        q = torch.empty(rows, groups * heads, head_dim)
        ops.rope_append(qkv, torch.arange(rows), Rotation(*angles, None, None, 1e-6), q, Pages(k, v), slots)
        written.append((q, k, v))

    for expected, actual in zip(*written, strict=True):
        assert torch.equal(expected, actual)


@pytest.mark.parametrize(
    "isa,kv_dtype,queries_per_kv,head_dim,page_size",
    [
        (FASTEST, "q8", 1, 64, 64),
        (FASTEST, "q8", 7, 96, 4),
        (FASTEST, "q8", 8, 256, 64),
        (FASTEST, "q4", 2, 40, 1),
        (FASTEST, "q4", 4, 128, 16),
        ("avxvnni", "q8", 7, 96, 4),
        ("avx2", "q8", 8, 128, 16),
        (PLAIN, "q8", 4, 128, 16),
        (PLAIN, "q4", 1, 64, 64),
    ],
)
def test_decode_agrees_with_float64(isa, kv_dtype, queries_per_kv, head_dim, page_size):
    if isa not in ISAS:
        pytest.skip(f"this CPU runs {', '.join(ISAS)}")
    torch.manual_seed(head_dim + queries_per_kv)
    starts, stops, scale = [0, 5, 149, 9], [150, 133, 150, 4], head_dim**-0.5
    cache = CodePages(kv_dtype, 4, 2, 150, page_size, head_dim)
    q = torch.randn(4, 2 * queries_per_kv, head_dim)
    out, memory = guarded(*q.shape)
    lse, lse_memory = guarded(*q.shape[:2])
    bounds = [torch.tensor(values, dtype=torch.int32) for values in (starts, stops)]

    kernels(isa).decode_attention(q, Pages(cache.k, cache.v), RowKeys(cache.table, *bounds), scale, Partial(out, lse))

    assert only_inside_written(memory) and only_inside_written(lse_memory)
    for row in range(3):
        for head in range(2 * queries_per_kv):
            keys, values = cache.rows(row, head // queries_per_kv, starts[row], stops[row])
            visible = torch.ones(1, len(keys), dtype=torch.bool)
            expected, expected_lse = attention(q[row, head].bfloat16()[None], keys, values, visible, scale)
            assert nmse(out[row, head], expected[0]) < DECODE_NMSE
            assert abs(lse[row, head].item() - expected_lse.item()) <= LSE_ERROR * max(1, abs(expected_lse.item()))
    assert (out[3] == 0).all() and (lse[3] == -math.inf).all()


@pytest.mark.parametrize("kv_dtype", DTYPES)
def test_groups_that_one_item_takes_do_not_meet(kv_dtype):
    """So many sequences that an item takes every group: each keeps its own query, scales and sums."""
    torch.manual_seed(4)
    cache = CodePages(kv_dtype, 40, 3, 70, 64, 96)
    q, out, lse = torch.randn(40, 12, 96), torch.empty(40, 12, 96), torch.empty(40, 12)
    alone, alone_lse = torch.empty_like(out), torch.empty_like(lse)
    bounds = torch.arange(40, dtype=torch.int32), torch.full((40,), 70, dtype=torch.int32)

    kernels().decode_attention(q, Pages(cache.k, cache.v), RowKeys(cache.table, *bounds), 0.1, Partial(out, lse))
    for group in range(3):
        mine, table = slice(4 * group, 4 * group + 4), cache.table[:, group : group + 1]
        results = alone[:, mine], alone_lse[:, mine]
        kernels().decode_attention(q[:, mine], Pages(cache.k, cache.v), RowKeys(table, *bounds), 0.1, Partial(*results))

    assert torch.equal(out, alone) and torch.equal(lse, alone_lse)


@pytest.mark.parametrize("isa", BF16_PATHS)
@pytest.mark.parametrize("kv_dtype", DTYPES)
@pytest.mark.parametrize(
    "queries_per_kv,head_dim,page_size,kv_start,kv_stop,window",
    [(4, 64, 64, 0, 170, 0), (2, 40, 4, 20, 150, 0), (7, 128, 16, 30, 170, 90), (1, 96, 1, 0, 90, 33)],
)
def test_prefill_agrees_with_float64(isa, kv_dtype, queries_per_kv, head_dim, page_size, kv_start, kv_stop, window):
    torch.manual_seed(6)
    cache, q_start, rows = CodePages(kv_dtype, 1, 2, 170, page_size, head_dim), 97, 73
    q, scale = torch.randn(rows, 2 * queries_per_kv, head_dim), head_dim**-0.5
    out, memory = guarded(*q.shape)
    lse, lse_memory = guarded(*q.shape[:2])

    kernels(isa).prefill_attention(
        q,
        Pages(cache.k, cache.v),
        ChunkKeys(cache.table[0], kv_start, kv_stop, q_start, window),
        scale,
        Partial(out, lse),
    )

    assert only_inside_written(memory) and only_inside_written(lse_memory)
    row, key = torch.arange(rows)[:, None] + q_start, torch.arange(kv_start, kv_stop)
    visible = (key <= row) & ((key > row - window) if window else True)
    seen = visible.any(-1)
    for head in range(2 * queries_per_kv):
        keys, values = cache.rows(0, head // queries_per_kv, kv_start, kv_stop)
        expected, expected_lse = attention(q[:, head].bfloat16(), keys, values, visible, scale)
        assert (out[~seen, head] == 0).all() and (lse[~seen, head] == -math.inf).all()
        assert nmse(out[seen, head], expected[seen]) < PREFILL_NMSE
        assert torch.allclose(lse[seen, head].double(), expected_lse[seen], rtol=1e-3, atol=2e-2)


@pytest.mark.parametrize("kv_dtype", DTYPES)
def test_the_reference_reads_what_the_formula_says(kv_dtype):
    torch.manual_seed(3)
    cache = CodePages(kv_dtype, 1, 1, 20, 4, 40)
    q, out, lse = torch.randn(1, 2, 40).double(), torch.empty(1, 2, 40).double(), torch.empty(1, 2).double()
    bounds = torch.tensor([3], dtype=torch.int32), torch.tensor([18], dtype=torch.int32)

    reference.decode_attention(q, Pages(cache.k, cache.v), RowKeys(cache.table, *bounds), 0.2, Partial(out, lse))

    keys, values = cache.rows(0, 0, 3, 18)
    expected, expected_lse = attention(q[0].bfloat16(), keys, values, torch.ones(2, 15, dtype=torch.bool), 0.2)
    assert nmse(out[0], expected) < 1e-24 and torch.allclose(lse[0], expected_lse)


def test_pages_whose_bytes_are_not_contiguous_are_refused():
    pages = torch.zeros(2, 4, 80, dtype=torch.int8)[:, :, :66]
    q, table, bound = torch.zeros(1, 1, 64), torch.zeros(1, 1, 2, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)

    with pytest.raises(ValueError, match="contiguous"):
        kernels().decode_attention(
            q, Pages(pages, pages), RowKeys(table, bound, bound), 1.0, Partial(torch.zeros(1, 1, 64), torch.zeros(1, 1))
        )
