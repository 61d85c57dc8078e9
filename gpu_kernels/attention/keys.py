"""Keys and values of one head of one sequence, as the attention kernels walk them: block after block of positions.

Blocks begin at multiples of their length and so lie in one page where pages are no shorter. The page ids of the next
block are asked for before this one's rows, so that no load waits for another.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from cpu_kernels.contract import Pages
from gpu_kernels.kv_rows import check_pages, load_rows


class Keys(NamedTuple):
    """Pages of K and of V, and the ids of those of one head of one sequence, int32."""

    k: Any
    v: Any
    table: Any


@triton.jit
def load_page_ids(table, rows, start, between, BLOCK_N: tl.constexpr):
    """Page ids of the positions from start, a multiple of BLOCK_N, on; only those of positions from between[0] to
    before between[1] are read.

    One scalar where such a block lies in one page, so that its rows are one tile."""
    PAGE_SIZE: tl.constexpr = rows.PAGE_SIZE
    low, high = between
    if PAGE_SIZE % BLOCK_N == 0:
        ids = tl.load(table + start // PAGE_SIZE, mask=tl.maximum(start, low) < high, other=0)
    else:
        positions = start + tl.arange(0, BLOCK_N)
        ids = tl.load(table + positions // PAGE_SIZE, mask=(positions >= low) & (positions < high), other=0)
    return ids


@triton.jit
def load_block(keys, rows, page_ids, start, stored, BLOCK_N: tl.constexpr):
    """Keys and values [BLOCK_N, HEAD_PAD] of the block at start, 0 where not `stored`; page_ids from load_page_ids."""
    PAGE_SIZE: tl.constexpr = rows.PAGE_SIZE
    if PAGE_SIZE % BLOCK_N == 0:
        token = start % PAGE_SIZE + tl.arange(0, BLOCK_N)
    else:
        token = (start + tl.arange(0, BLOCK_N)) % PAGE_SIZE
    page = page_ids.to(tl.int64) * rows.page_stride
    return load_rows(keys.k, rows, page, token, stored), load_rows(keys.v, rows, page, token, stored)


@triton.jit
def load_queries(pointers, live, k_pages, FORMAT: tl.constexpr):
    """Queries in the dtype in which they meet the keys; 0 where not `live`."""
    query = tl.load(pointers, mask=live, other=0.0)
    return query.to(k_pages.dtype.element_ty if FORMAT == "plain" else tl.bfloat16)


def check(pages: Pages, q: Tensor, num_kv_heads: int, scale: float) -> str:
    """The FORMAT of pages; asserts what both attentions ask of their arguments."""
    num_heads, head_dim = q.shape[-2:]
    assert num_heads % num_kv_heads == 0, (num_heads, num_kv_heads)
    assert scale > 0, f"the largest score is looked for before it is multiplied by {scale}"
    return check_pages(pages, head_dim)
