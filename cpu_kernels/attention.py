"""decode_attention and prefill_attention over paged K and V, and the checks that keep them inside their pages."""

import struct

import torch

from . import attention_layout as shared
from .checks import check_tensor, expect
from .team import Team

KV_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
ITEMS_PER_THREAD = 4  # items to balance on a machine that is also doing something else
SPLIT_TOKENS = 512  # shorter splits cost more in merging than they balance


def check_pages(k_pages: torch.Tensor, v_pages: torch.Tensor, head_dim: int) -> str:
    """Name of the KV dtype; ValueError unless K and V are pages of the same shape and a KV dtype."""
    check_tensor("k_pages", k_pages, tuple(KV_DTYPES), (None, None, head_dim))
    check_tensor("v_pages", v_pages, k_pages.dtype, tuple(k_pages.shape))
    return KV_DTYPES[k_pages.dtype]


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


def split_count(items: int, tokens: int, num_threads: int) -> int:
    """Parts of the key range per (row, group), so that all threads have work."""
    wanted = -(-ITEMS_PER_THREAD * num_threads // items)
    return max(1, min(wanted, tokens // SPLIT_TOKENS))


def bits_of(value: float) -> int:
    """A float64's bits as int64, the form in which a kernel takes it."""
    return struct.unpack("=q", struct.pack("=d", value))[0]


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
    item = k_pages.element_size()
    group_heads = num_heads // num_kv_heads
    threads = team.num_threads
    splits = split_count(batch * num_kv_heads, max_pages * page_size, threads)
    thread_bytes = shared.thread_bytes(group_heads, head_dim)
    results = batch * num_kv_heads * splits * shared.item_bytes(item, group_heads, head_dim)
    failure = team.run(
        ("decode_kernel", "decode", team.isa, kv_dtype, *shared.head_tiles(group_heads)),
        threads * thread_bytes + results,
        q.data_ptr(),
        4 * q.stride(0),
        4 * q.stride(1),
        batch,
        num_kv_heads,
        group_heads,
        head_dim,
        k_pages.data_ptr(),
        item * k_pages.stride(0),
        item * k_pages.stride(1),
        v_pages.data_ptr(),
        item * v_pages.stride(0),
        item * v_pages.stride(1),
        num_pages,
        page_size,
        page_table.data_ptr(),
        4 * page_table.stride(0),
        4 * page_table.stride(1),
        max_pages,
        kv_start.data_ptr(),
        kv_stop.data_ptr(),
        bits_of(scale),
        out.data_ptr(),
        4 * out.stride(0),
        4 * out.stride(1),
        lse.data_ptr(),
        4 * lse.stride(0),
        splits,
        threads,
        thread_bytes,
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
    item = k_pages.element_size()
    group_heads = num_heads // num_kv_heads
    thread_bytes = shared.prefill_thread_bytes(item, group_heads, head_dim)
    failure = team.run(
        ("prefill_kernel", "prefill", team.isa, kv_dtype),
        team.num_threads * thread_bytes,
        q.data_ptr(),
        4 * q.stride(0),
        4 * q.stride(1),
        q_len,
        num_kv_heads,
        group_heads,
        head_dim,
        k_pages.data_ptr(),
        item * k_pages.stride(0),
        item * k_pages.stride(1),
        v_pages.data_ptr(),
        item * v_pages.stride(0),
        item * v_pages.stride(1),
        num_pages,
        page_size,
        page_table.data_ptr(),
        0,
        4 * page_table.stride(0),
        max_pages,
        kv_start,
        kv_stop,
        bits_of(scale),
        out.data_ptr(),
        4 * out.stride(0),
        4 * out.stride(1),
        lse.data_ptr(),
        4 * lse.stride(0),
        1,
        team.num_threads,
        thread_bytes,
        q_start,
        window,
    )
    raise_failure(failure, max_pages, page_size, num_pages)
