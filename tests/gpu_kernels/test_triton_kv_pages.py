"""Pages of codes in Triton: the bytes that rope_append writes, attention over them, and planted bugs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cpu_kernels.contract import ChunkKeys, Pages, Partial, Rotation, RowKeys
from tests.support.kernels.code_pages import DTYPES, HEAD_DIMS, check_rope_append
from tests.support.kernels.kernel_data import lse_error, nmse, normal
from tests.support.planted import planted

pytest.importorskip("triton", reason="triton is not installed (the test extra has it on x86-64 Linux)")

from gpu_kernels import kv_pages, kv_rows, reference, rope
from gpu_kernels.attention import decode, keys, prefill

CODES_NMSE, CODES_LSE = 1e-4, 1e-2  # keys, values and probabilities are rounded to bf16 for the tensor cores


def code_pages(kv_dtype: str, page_size: int, head_dim: int, tokens: int, seed: int):
    """(k_pages, v_pages, table [1, 2, pages]) of random rows; bytes that no token owns are 255: NaN as a scale."""
    pages = -(-tokens // page_size)
    table = torch.randperm(2 * pages + 1, generator=torch.Generator().manual_seed(seed))[: 2 * pages].view(1, 2, pages)
    shape = (2 * pages + 1, page_size, kv_pages.row_items(DTYPES[kv_dtype], head_dim))
    position = torch.arange(tokens)
    stores = []
    for index in range(2):
        store = torch.full(shape, 255, dtype=torch.uint8).view(DTYPES[kv_dtype])
        for head in range(2):
            rows = normal(tokens, head_dim, seed=seed + 2 * index + head)
            kv_pages.write_rows(store, table[0, head, position // page_size], position % page_size, rows)
        stores.append(store)
    return *stores, table.to(torch.int32)


def check_decode(op, device, kv_dtype, queries_per_kv, head_dim, page_size, start, stop):
    k, v, table = code_pages(kv_dtype, page_size, head_dim, stop, 1)
    q, scale = normal(1, 2 * queries_per_kv, head_dim, seed=9), head_dim**-0.5
    bounds = [torch.tensor([value], dtype=torch.int32) for value in (start, stop)]
    expected, expected_lse = torch.empty_like(q).double(), torch.empty(q.shape[:2]).double()
    reference.decode_attention(q.double(), Pages(k, v), RowKeys(table, *bounds), scale, Partial(expected, expected_lse))
    out = torch.full(q.shape, torch.nan, device=device)
    lse = torch.full(q.shape[:2], torch.nan, device=device)

    q, k, v, table, *bounds = (tensor.to(device) for tensor in (q, k, v, table, *bounds))
    op(q, Pages(k, v), RowKeys(table, *bounds), scale, Partial(out, lse))

    assert nmse(out.cpu(), expected) <= CODES_NMSE and lse_error(lse.cpu(), expected_lse) <= CODES_LSE


def check_append(op, device, kv_dtype, head_dim, page_size):
    """Rotation by nothing, so that the rows are the same; every byte of the pages is compared."""
    groups, heads, rows = 2, 2, 5
    qkv = normal(rows, groups, (heads + 2) * head_dim + 3, seed=4)
    qkv[1, 0, heads * head_dim :] = 0.0
    qkv[2] = qkv[2].abs() + 1.0  # here padding that took part in the minimum would show
    angles = torch.ones(rows, head_dim // 2), torch.zeros(rows, head_dim // 2)
    slots = torch.randperm(16, generator=torch.Generator().manual_seed(2))[: rows * groups].view(rows, groups)
    shape = (16 // page_size, page_size, kv_pages.row_items(DTYPES[kv_dtype], head_dim))
    written = []
    for function, place in ((reference.rope_append, "cpu"), (op, device)):
        k, v = (torch.full(shape, 255, dtype=torch.uint8).view(DTYPES[kv_dtype]).to(place) for _ in range(2))
        q = torch.empty(rows, groups * heads, head_dim, device=place)
        units, positions, cos, sin = (tensor.to(place) for tensor in (qkv, torch.arange(rows), *angles))
        function(units, positions, Rotation(cos, sin, None, None, 1e-6), q, Pages(k, v), slots.to(place))
        written.append((k.cpu(), v.cpu()))

    for expected, actual in zip(*written, strict=True):
        assert torch.equal(expected.view(torch.uint8), actual.view(torch.uint8))


DECODE = {name: (name, 2, 40, 16, 5, 70) for name in DTYPES}
LONG_PAGE = ("q8", 2, 40, 128, 5, 300)
APPEND = {name: (name, 40, 4) for name in DTYPES}


@pytest.mark.table
@pytest.mark.parametrize("kv_dtype", DTYPES)
@pytest.mark.parametrize(
    "queries_per_kv,head_dim,page_size,start,stop",
    [
        (1, 64, 64, 0, 130),
        (4, 128, 16, 7, 90),
        (3, 24, 1, 0, 33),
        (2, 96, 8, 40, 40 + 600),
        (1, 16, 4, 9, 9),
        (2, 64, 128, 30, 300),
    ],
)
def test_decode_attention(device, kv_dtype, queries_per_kv, head_dim, page_size, start, stop):
    check_decode(decode.decode_attention, device, kv_dtype, queries_per_kv, head_dim, page_size, start, stop)


@pytest.mark.parametrize("kv_dtype", DTYPES)
@pytest.mark.parametrize("head_dim,page_size,window", [(64, 16, 0), (80, 4, 20)])
def test_prefill_attention(device, kv_dtype, head_dim, page_size, window):
    k, v, table = code_pages(kv_dtype, page_size, head_dim, 98, 3)
    q, scale = normal(70, 4, head_dim, seed=5), head_dim**-0.5
    expected, expected_lse = torch.empty_like(q).double(), torch.empty(q.shape[:2]).double()
    reference.prefill_attention(
        q.double(), Pages(k, v), ChunkKeys(table[0], 3, 98, 28, window), scale, Partial(expected, expected_lse)
    )
    out, lse = torch.full(q.shape, torch.nan, device=device), torch.full(q.shape[:2], torch.nan, device=device)

    q, k, v, table = (tensor.to(device) for tensor in (q, k, v, table[0]))
    prefill.prefill_attention(q, Pages(k, v), ChunkKeys(table, 3, 98, 28, window), scale, Partial(out, lse))

    assert nmse(out.cpu(), expected, dims=(0, 2)) <= CODES_NMSE and lse_error(lse.cpu(), expected_lse) <= CODES_LSE


@pytest.mark.table
@pytest.mark.parametrize("kv_dtype", DTYPES)
@pytest.mark.parametrize("head_dim,page_size", [(64, 16), (40, 4), (128, 1), (16, 2), (96, 4)])
def test_rope_append_writes_the_bytes_of_the_reference(device, kv_dtype, head_dim, page_size):
    check_append(rope.rope_append, device, kv_dtype, head_dim, page_size)


@pytest.mark.table
@pytest.mark.parametrize("kv_dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_rope_append_multiplies_q_and_k_by_the_matrix(device, kv_dtype, head_dim):
    check_rope_append(rope.rope_append, device, kv_dtype, head_dim)


# The function that is looked up: the module that has it, and the one that uses it.
PLACES = {
    "load_rows": (kv_rows, keys),
    "load_block": (keys, decode),
    "load_page_ids": (keys, decode),
    "store_row": (kv_rows, rope),
}
MUTANTS = {
    "scale of another group": ("load_rows", DECODE["q4"], "columns[None, :] * PAGE_SIZE", "0 * columns[None, :]"),
    "scale of another token": ("load_rows", DECODE["q8"], "// 2 + token)[:, None]", "// 2 + 0 * token)[:, None]"),
    "rows of a page are shifted": (
        "load_block",
        DECODE["q8"],
        "load_rows(keys.v, rows, page, token,",
        "load_rows(keys.v, rows, page, token ^ 1,",
    ),
    "token of another block of the page": ("load_block", LONG_PAGE, "start % PAGE_SIZE + tl", "tl"),
    "token of another page": (
        "load_block",
        DECODE["q8"],
        "(start + tl.arange(0, BLOCK_N)) % PAGE_SIZE",
        "tl.arange(0, BLOCK_N) % (PAGE_SIZE + 1)",
    ),
    "page of another position": ("load_page_ids", DECODE["q8"], "positions // PAGE_SIZE, mask", "positions * 0, mask"),
    "page of another block": ("load_page_ids", LONG_PAGE, "table + start // PAGE_SIZE", "table"),
    "nibbles swapped": (
        "load_rows",
        DECODE["q4"],
        "interleave(both & 15, both >> 4)",
        "interleave(both >> 4, both & 15)",
    ),
    "no minimum": ("load_rows", DECODE["q4"], "values += minimum[:, :, None]", "values += 0.0 * minimum[:, :, None]"),
    "codes of another token": ("load_rows", DECODE["q8"], "at = (page + token * ROW)", "at = (page + 0 * token)"),
    "scale of q8 is too small": ("store_row", APPEND["q8"], "axis=1), 127.0)", "axis=1), 128.0)"),
    "codes are cut off": ("store_row", APPEND["q8"], "_round(tl.div_rn(grouped", "(tl.div_rn(grouped"),
    "padding takes part in the minimum": (
        "store_row",
        APPEND["q4"],
        'tl.where(inside, grouped, float("inf"))',
        "grouped",
    ),
    "minima are not stored": ("store_row", APPEND["q4"], "minimum, mask=columns < GROUPS", "minimum, mask=columns < 0"),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name, device, tmp_path, monkeypatch):
    if device != "cpu":
        pytest.skip("mutants run under the interpreter, where a wrong address cannot hurt the device")
    function, arguments, right, wrong = MUTANTS[name]
    source, user = PLACES[function]
    mutant = planted.load_mutant(tmp_path, Path(source.__file__), right, wrong)
    monkeypatch.setattr(user, function, getattr(mutant, function))

    with pytest.raises(AssertionError):
        if function != "store_row":
            check_decode(decode.decode_attention, device, *arguments)
        else:
            check_append(rope.rope_append, device, *arguments)
