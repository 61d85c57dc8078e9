"""decode_attention and prefill_attention over paged K and V, and the checks that keep them inside their pages."""

import torch

from cpu_kernels.attention import parameters as shared
from cpu_kernels.checks import bits_of, check_tensor, expect
from cpu_kernels.formats.pages import ITEM_BYTES, code_bytes, is_quantised, row_items
from cpu_kernels.team.arguments import DECODE, PREFILL
from cpu_kernels.team.team import Team

KV_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int8: "q8", torch.uint8: "q4"}
ITEMS_PER_THREAD = 4  # items of a row, to balance on a machine that is also doing something else
ROWS_ALIKE = 16  # as many rows as q4 and q8 linears sum alike, whoever is beside them


def check_pages(k_pages: torch.Tensor, v_pages: torch.Tensor, head_dim: int) -> str:
    """Name of the KV dtype; ValueError unless K and V are pages of one shape and KV dtype, as formats/pages.py says."""
    if k_pages.dtype not in KV_DTYPES:
        known = ", ".join(f"{dtype} ({name})" for dtype, name in KV_DTYPES.items())
        raise ValueError(f"k_pages is {k_pages.dtype}; pages are one of {known}")
    kv_dtype = KV_DTYPES[k_pages.dtype]
    check_tensor("k_pages", k_pages, k_pages.dtype, (None, None, row_items(kv_dtype, head_dim)))
    check_tensor("v_pages", v_pages, k_pages.dtype, tuple(k_pages.shape))
    if is_quantised(kv_dtype):
        for name, pages in (("k_pages", k_pages), ("v_pages", v_pages)):
            whole = pages.shape[1] <= 1 or pages.stride(1) == pages.shape[2]
            expect(whole, f"{name} holds codes, so the bytes of a page must be contiguous")
    return kv_dtype


def page_words(pages: torch.Tensor, kv_dtype: str, head_dim: int) -> tuple[int, int, int]:
    """(address, bytes from page to page, bytes from one token's numbers or codes to the next one's)."""
    item = ITEM_BYTES[kv_dtype]
    row_bytes = code_bytes(kv_dtype, head_dim) if is_quantised(kv_dtype) else item * pages.stride(1)
    return pages.data_ptr(), item * pages.stride(0), row_bytes


def check_heads(num_heads: int, num_kv_heads: int) -> None:
    """ValueError unless query heads divide evenly over KV heads."""
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads do not divide over {num_kv_heads} KV heads")


def raise_failure(failure: int, max_pages: int, page_size: int, num_pages: int) -> None:
    """Turn a kernel's failure code into the error it stands for."""
    if failure == 1:
        raise ValueError(f"kv_start and kv_stop must lie in 0..{max_pages * page_size}, what the page table covers")
    if failure == 2:
        raise ValueError(f"page_table has an entry outside 0..{num_pages - 1} inside [kv_start, kv_stop)")


def split_limits(batch: int, kv_heads: int, tokens: int, num_threads: int) -> tuple[int, int, int]:
    """(most splits of a row's key range, items wanted of a row, most items of a row); how many there are is decided by
    the kernel, which knows the ranges.

    Up to ROWS_ALIKE rows, a row's sums do not depend on how many are computed beside it.
    """
    wanted = -(-ITEMS_PER_THREAD * num_threads * ROWS_ALIKE // max(ROWS_ALIKE, batch))
    splits = max(1, min(wanted, tokens // (shared.SPLIT_TILES * shared.KEY_TILE)))
    return splits, wanted, min(kv_heads * splits, wanted + kv_heads - 1)


def decode_attention(
    team: Team,
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    kv_start: torch.Tensor,
    kv_stop: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """See CpuKernels.decode_attention."""
    check_tensor("q", q, torch.float32, (None, None, None))
    batch, num_heads, head_dim = q.shape
    kv_dtype = check_pages(k_pages, v_pages, head_dim)
    check_tensor("page_table", page_table, torch.int32, (batch, None, None))
    _, num_kv_heads, max_pages = page_table.shape
    check_heads(num_heads, num_kv_heads)
    check_tensor("kv_start", kv_start, torch.int32, (batch,))
    check_tensor("kv_stop", kv_stop, torch.int32, (batch,))
    check_tensor("out", out, torch.float32, (batch, num_heads, head_dim))
    check_tensor("lse", lse, torch.float32, (batch, num_heads))
    if batch == 0 or num_heads == 0 or head_dim == 0:
        return
    num_pages, page_size, _ = k_pages.shape
    queries_per_kv = num_heads // num_kv_heads
    splits, items, most_items = split_limits(batch, num_kv_heads, max_pages * page_size, team.num_threads)
    tiles = shared.DecodeTiles.of(kv_dtype, queries_per_kv, head_dim)
    thread_bytes = shared.decode_thread_bytes(kv_dtype, team.isa.has_bf16, num_kv_heads, queries_per_kv, head_dim)
    results = batch * num_kv_heads * splits * shared.decode_part_bytes(kv_dtype, queries_per_kv, head_dim)
    failure = team.run(
        ("attention.decode_kernel", "decode", team.isa, kv_dtype, tiles.score_heads, tiles.value_heads, tiles.words),
        team.num_threads * thread_bytes + results,
        *DECODE.filled(
            **_queries(q, num_kv_heads),
            **_pages(k_pages, v_pages, kv_dtype, head_dim),
            table=page_table.data_ptr(),
            table_row=4 * page_table.stride(0),
            table_head=4 * page_table.stride(1),
            max_pages=max_pages,
            start=kv_start.data_ptr(),
            stop=kv_stop.data_ptr(),
            **_results(scale, out, lse),
            threads=team.num_threads,
            thread_bytes=thread_bytes,
            splits=splits,
            items=items,
            most_items=most_items,
        ),
    )
    raise_failure(failure, max_pages, page_size, num_pages)


def prefill_attention(
    team: Team,
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    kv_start: int,
    kv_stop: int,
    q_start: int,
    window: int,
    scale: float,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """See CpuKernels.prefill_attention."""
    check_tensor("q", q, torch.float32, (None, None, None))
    q_len, num_heads, head_dim = q.shape
    kv_dtype = check_pages(k_pages, v_pages, head_dim)
    check_tensor("page_table", page_table, torch.int32, (None, None))
    num_kv_heads, max_pages = page_table.shape
    check_heads(num_heads, num_kv_heads)
    expect(window >= 0, f"window is {window}; it must be 0 (none) or a number of tokens")
    check_tensor("out", out, torch.float32, (q_len, num_heads, head_dim))
    check_tensor("lse", lse, torch.float32, (q_len, num_heads))
    if q_len == 0 or num_heads == 0 or head_dim == 0:
        return
    num_pages, page_size, _ = k_pages.shape
    thread_bytes = shared.prefill_thread_bytes(kv_dtype, team.isa.has_bf16, num_heads // num_kv_heads, head_dim)
    failure = team.run(
        ("attention.prefill_kernel", "prefill", team.isa, kv_dtype),
        team.num_threads * thread_bytes,
        *PREFILL.filled(
            **_queries(q, num_kv_heads),
            **_pages(k_pages, v_pages, kv_dtype, head_dim),
            table=page_table.data_ptr(),
            table_row=0,
            table_head=4 * page_table.stride(0),
            max_pages=max_pages,
            start=kv_start,
            stop=kv_stop,
            **_results(scale, out, lse),
            threads=team.num_threads,
            thread_bytes=thread_bytes,
            q_start=q_start,
            window=window,
        ),
    )
    raise_failure(failure, max_pages, page_size, num_pages)


def _queries(q: torch.Tensor, num_kv_heads: int) -> dict[str, int]:
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


def _pages(k_pages: torch.Tensor, v_pages: torch.Tensor, kv_dtype: str, head_dim: int) -> dict[str, int]:
    (k, k_page, k_row), (v, v_page, v_row) = (page_words(pages, kv_dtype, head_dim) for pages in (k_pages, v_pages))
    num_pages, page_size, _ = k_pages.shape
    return {
        "k": k,
        "k_page": k_page,
        "k_row": k_row,
        "v": v,
        "v_page": v_page,
        "v_row": v_row,
        "num_pages": num_pages,
        "page_size": page_size,
    }


def _results(scale: float, out: torch.Tensor, lse: torch.Tensor) -> dict[str, int]:
    return {
        "scale": bits_of(scale),
        "out": out.data_ptr(),
        "out_row": 4 * out.stride(0),
        "out_head": 4 * out.stride(1),
        "lse": lse.data_ptr(),
        "lse_row": 4 * lse.stride(0),
    }
