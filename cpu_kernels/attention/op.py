"""decode_attention and prefill_attention over paged K and V, and the checks that keep them inside their pages."""

import torch
from torch import Tensor

from cpu_kernels.attention import parameters as shared
from cpu_kernels.checks import bits_of, check_tensor, expect
from cpu_kernels.contract import ChunkKeys, Pages, Partial, RowKeys
from cpu_kernels.formats.pages import ITEM_BYTES, code_bytes, is_quantised, row_items
from cpu_kernels.team.arguments import DECODE, PREFILL
from cpu_kernels.team.team import Team

KV_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int8: "q8", torch.uint8: "q4"}
ITEMS_PER_THREAD = 4  # items of a row, to balance on a machine that is also doing something else


def check_pages(pages: Pages, head_dim: int) -> str:
    """Name of the KV dtype; ValueError unless K and V are pages of one shape and KV dtype, as formats/pages.py says."""
    if pages.k.dtype not in KV_DTYPES:
        known = ", ".join(f"{dtype} ({name})" for dtype, name in KV_DTYPES.items())
        raise ValueError(f"pages.k is {pages.k.dtype}; pages are one of {known}")
    kv_dtype = KV_DTYPES[pages.k.dtype]
    check_tensor("pages.k", pages.k, pages.k.dtype, (None, None, row_items(kv_dtype, head_dim)))
    check_tensor("pages.v", pages.v, pages.k.dtype, tuple(pages.k.shape))
    if is_quantised(kv_dtype):
        for name, cached in zip(("pages.k", "pages.v"), pages, strict=True):
            whole = cached.shape[1] <= 1 or cached.stride(1) == cached.shape[2]
            expect(whole, f"{name} holds codes, so the bytes of a page must be contiguous")
    return kv_dtype


def page_words(pages: Pages, kv_dtype: str, head_dim: int) -> dict[str, int]:
    """Of K and of V its address, bytes from page to page and bytes from one token's numbers or codes to the next one's;
    and tokens of a page."""
    (k, v), item = pages, ITEM_BYTES[kv_dtype]
    codes = code_bytes(kv_dtype, head_dim) if is_quantised(kv_dtype) else 0
    return {
        "page_size": k.shape[1],
        "k": k.data_ptr(),
        "k_page": item * k.stride(0),
        "k_row": codes or item * k.stride(1),
        "v": v.data_ptr(),
        "v_page": item * v.stride(0),
        "v_row": codes or item * v.stride(1),
    }


def check_heads(num_heads: int, num_kv_heads: int) -> None:
    """ValueError unless query heads divide evenly over KV heads."""
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads do not divide over {num_kv_heads} KV heads")


def raise_failure(failure: int, max_pages: int, pages: Pages) -> None:
    """Turn a kernel's failure code into the error it stands for."""
    num_pages, page_size, _ = pages.k.shape
    if failure == 1:
        raise ValueError(f"keys.start and keys.stop must lie in 0..{max_pages * page_size}, what keys.table covers")
    if failure == 2:
        raise ValueError(f"keys.table has an entry outside 0..{num_pages - 1} inside [keys.start, keys.stop)")


def split_limits(batch: int, kv_heads: int, tokens: int, num_threads: int) -> tuple[int, int, int]:
    """(most splits of a row's key range, items wanted of a row, most items of a row); how many there are is decided by
    the kernel, which knows the ranges.

    Up to ROWS_TOGETHER rows, a row's sums do not depend on how many are computed beside it.
    """
    wanted = -(-ITEMS_PER_THREAD * num_threads * shared.ROWS_TOGETHER // max(shared.ROWS_TOGETHER, batch))
    splits = max(1, min(wanted, tokens // (shared.SPLIT_TILES * shared.KEY_TILE)))
    return splits, wanted, min(kv_heads * splits, wanted + kv_heads - 1)


def decode_attention(
    team: Team, q: Tensor, pages: Pages, keys: RowKeys, scale: float, into: Partial, cap: float
) -> None:
    check_tensor("q", q, torch.float32, (None, None, None))
    batch, num_heads, head_dim = q.shape
    kv_dtype = check_pages(pages, head_dim)
    check_tensor("keys.table", keys.table, torch.int32, (batch, None, None))
    _, num_kv_heads, max_pages = keys.table.shape
    check_heads(num_heads, num_kv_heads)
    check_tensor("keys.start", keys.start, torch.int32, (batch,))
    check_tensor("keys.stop", keys.stop, torch.int32, (batch,))
    _check_results(into, q)
    if batch == 0 or num_heads == 0 or head_dim == 0:
        return
    queries_per_kv = num_heads // num_kv_heads
    splits, items, most_items = split_limits(batch, num_kv_heads, max_pages * pages.k.shape[1], team.num_threads)
    tiles = shared.DecodeTiles.of(kv_dtype, queries_per_kv, head_dim, team.isa)
    together, has_bf16 = min(batch, shared.ROWS_TOGETHER), team.isa.has_bf16
    thread_bytes = shared.decode_thread_bytes(
        kv_dtype, has_bf16, tiles.words, together, num_kv_heads, queries_per_kv, head_dim
    )
    results = batch * num_kv_heads * splits * shared.decode_part_bytes(kv_dtype, queries_per_kv, head_dim)
    failure = team.run(
        (
            *("attention.decode_kernel", "decode", team.isa, kv_dtype),
            *(tiles.score_heads, tiles.value_heads, tiles.words, *_capped(cap)),
        ),
        team.num_threads * thread_bytes + results,
        *DECODE.filled(
            **_queries(q, num_kv_heads),
            **page_words(pages, kv_dtype, head_dim),
            num_pages=pages.k.shape[0],
            table=keys.table.data_ptr(),
            table_row=4 * keys.table.stride(0),
            table_head=4 * keys.table.stride(1),
            max_pages=max_pages,
            start=keys.start.data_ptr(),
            stop=keys.stop.data_ptr(),
            **_results(scale, cap, into),
            threads=team.num_threads,
            thread_bytes=thread_bytes,
            splits=splits,
            items=items,
            most_items=most_items,
        ),
    )
    raise_failure(failure, max_pages, pages)


def prefill_attention(
    team: Team, q: Tensor, pages: Pages, keys: ChunkKeys, scale: float, into: Partial, cap: float
) -> None:
    check_tensor("q", q, torch.float32, (None, None, None))
    q_len, num_heads, head_dim = q.shape
    kv_dtype = check_pages(pages, head_dim)
    check_tensor("keys.table", keys.table, torch.int32, (None, None))
    num_kv_heads, max_pages = keys.table.shape
    check_heads(num_heads, num_kv_heads)
    expect(keys.window >= 0, f"keys.window is {keys.window}; it must be 0 (none) or a number of tokens")
    _check_results(into, q)
    if q_len == 0 or num_heads == 0 or head_dim == 0:
        return
    thread_bytes = shared.prefill_thread_bytes(kv_dtype, team.isa.has_bf16, num_heads // num_kv_heads, head_dim)
    failure = team.run(
        ("attention.prefill_kernel", "prefill", team.isa, kv_dtype, *_capped(cap)),
        team.num_threads * thread_bytes,
        *PREFILL.filled(
            **_queries(q, num_kv_heads),
            **page_words(pages, kv_dtype, head_dim),
            num_pages=pages.k.shape[0],
            table=keys.table.data_ptr(),
            table_row=0,
            table_head=4 * keys.table.stride(0),
            max_pages=max_pages,
            start=keys.start,
            stop=keys.stop,
            **_results(scale, cap, into),
            threads=team.num_threads,
            thread_bytes=thread_bytes,
            q_start=keys.q_start,
            window=keys.window,
        ),
    )
    raise_failure(failure, max_pages, pages)


def _queries(q: Tensor, num_kv_heads: int) -> dict[str, int]:
    rows, num_heads, head_dim = q.shape
    return {
        "q": q.data_ptr(),
        "q_row": 4 * q.stride(0),
        "q_head": 4 * q.stride(1),
        "rows": rows,
        "kv_heads": num_kv_heads,
        "queries_per_kv": num_heads // num_kv_heads,
        "head_dim": head_dim,
    }


def _check_results(into: Partial, q: Tensor) -> None:
    check_tensor("into.out", into.out, torch.float32, tuple(q.shape))
    check_tensor("into.lse", into.lse, torch.float32, tuple(q.shape[:-1]))


def _capped(cap: float) -> tuple[bool, ...]:
    """The parameter of a kernel with a soft cap, none of one without."""
    expect(cap >= 0, f"cap is {cap}; it must be 0 (none) or above")
    return (True,) if cap else ()


def _results(scale: float, cap: float, into: Partial) -> dict[str, int]:
    return {
        "scale": bits_of(scale),
        "cap": bits_of(cap),
        "out": into.out.data_ptr(),
        "out_row": 4 * into.out.stride(0),
        "out_head": 4 * into.out.stride(1),
        "lse": into.lse.data_ptr(),
        "lse_row": 4 * into.lse.stride(0),
    }
