"""Rows of K and V in Triton: read from pages and written to them, in the format that kv_pages describes.

FORMAT is "plain" (float32 or bfloat16 rows), "q8" or "q4". Codes become bf16 as they are read, code * scale (+ minimum)
rounded once, so that tensor cores multiply them like the rows of a bf16 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from cpu_kernels.contract import Pages
from gpu_kernels.kv_pages import row_items

FORMATS = {torch.float32: "plain", torch.bfloat16: "plain", torch.int8: "q8", torch.uint8: "q4"}
ROUNDING = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and subtracting it rounds a small float32 half to even


@triton.jit
def load_page_ids(table, start, low, high, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Page ids of the positions from start, a multiple of BLOCK_N, on; only those of positions in [low, high) are read.

    One scalar where such a block lies in one page, so that its rows are one tile."""
    if PAGE_SIZE % BLOCK_N == 0:
        ids = tl.load(table + start // PAGE_SIZE, mask=tl.maximum(start, low) < high, other=0)
    else:
        positions = start + tl.arange(0, BLOCK_N)
        ids = tl.load(table + positions // PAGE_SIZE, mask=(positions >= low) & (positions < high), other=0)
    return ids


@triton.jit
def load_block(
    k_pages,
    v_pages,
    page_ids,
    start,
    stored,
    dims,
    page_stride,
    row_stride,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """Keys and values [BLOCK_N, HEAD_PAD] of the block at start, 0 where not `stored`; page_ids from load_page_ids."""
    if PAGE_SIZE % BLOCK_N == 0:
        token = start % PAGE_SIZE + tl.arange(0, BLOCK_N)
    else:
        token = (start + tl.arange(0, BLOCK_N)) % PAGE_SIZE
    page = page_ids.to(tl.int64) * page_stride
    keys = load_rows(k_pages, page, token, stored, dims, row_stride, HEAD_DIM, HEAD_PAD, PAGE_SIZE, FORMAT)
    values = load_rows(v_pages, page, token, stored, dims, row_stride, HEAD_DIM, HEAD_PAD, PAGE_SIZE, FORMAT)
    return keys, values


@triton.jit
def load_rows(
    pages,
    page,
    token,
    stored,
    dims,
    row_stride,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """Rows [len(token), HEAD_PAD], 0 where not `stored`. page: where the page of each token begins, in items, or of all
    of them; token: offset in it. row_stride in items; the bytes of a page of codes are contiguous."""
    mask = stored[:, None] & (dims < HEAD_DIM)[None, :]
    if FORMAT == "plain":
        rows = tl.load(pages + (page + token * row_stride)[:, None] + dims[None, :], mask=mask, other=0.0)
    else:
        GROUP: tl.constexpr = 64 if FORMAT == "q8" else 32
        GROUPS: tl.constexpr = (HEAD_DIM + GROUP - 1) // GROUP
        ROW: tl.constexpr = GROUPS * GROUP if FORMAT == "q8" else GROUPS * GROUP // 2
        WIDTH: tl.constexpr = min(GROUP, HEAD_PAD)  # a head may be shorter than a group
        COLUMNS: tl.constexpr = HEAD_PAD // WIDTH
        at = (page + token * ROW)[:, None]
        if FORMAT == "q8":
            codes = tl.load(pages + at + dims[None, :], mask=mask, other=0).to(tl.float32)
        else:
            byte = tl.arange(0, HEAD_PAD // 2)
            held = stored[:, None] & (byte < ROW)[None, :]
            both = tl.load(pages + at + byte[None, :], mask=held, other=0).to(tl.int32)
            codes = tl.interleave(both & 15, both >> 4).to(tl.float32)
        columns = tl.arange(0, COLUMNS)
        numbers = pages.to(tl.pointer_type(tl.bfloat16), bitcast=True)
        numbers += ((page + PAGE_SIZE * ROW) // 2 + token)[:, None] + columns[None, :] * PAGE_SIZE
        present = stored[:, None] & (columns < GROUPS)[None, :]
        scale = tl.load(numbers, mask=present, other=0.0).to(tl.float32)
        values = tl.reshape(codes, [codes.shape[0], COLUMNS, WIDTH]) * scale[:, :, None]
        if FORMAT == "q4":
            minimum = tl.load(numbers + GROUPS * PAGE_SIZE, mask=present, other=0.0).to(tl.float32)
            values += minimum[:, :, None]
        values = tl.reshape(values, [codes.shape[0], HEAD_PAD])
        rows = tl.where(mask, values, 0.0).to(tl.bfloat16)
    return rows


@triton.jit
def _round(x):
    return (x + ROUNDING) - ROUNDING


@triton.jit
def store_row(
    pages,
    slot,
    row,
    dims,
    page_stride,
    row_stride,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """Write a float32 row [HEAD_PAD], 0 from HEAD_DIM on and of whole groups, to slot = page * PAGE_SIZE + offset."""
    page, token = slot // PAGE_SIZE * page_stride, slot % PAGE_SIZE
    if FORMAT == "plain":
        tl.store(pages + page + token * row_stride + dims, row.to(pages.dtype.element_ty), mask=dims < HEAD_DIM)
    else:
        GROUP: tl.constexpr = 64 if FORMAT == "q8" else 32
        GROUPS: tl.constexpr = (HEAD_DIM + GROUP - 1) // GROUP
        ROW: tl.constexpr = GROUPS * GROUP if FORMAT == "q8" else GROUPS * GROUP // 2
        COLUMNS: tl.constexpr = HEAD_PAD // GROUP
        columns = tl.arange(0, COLUMNS)
        numbers = pages.to(tl.pointer_type(tl.bfloat16), bitcast=True) + (page + PAGE_SIZE * ROW) // 2
        numbers += columns * PAGE_SIZE + token
        grouped = tl.reshape(row, [COLUMNS, GROUP])
        if FORMAT == "q8":
            scale = tl.div_rn(tl.max(tl.abs(grouped), axis=1), 127.0).to(tl.bfloat16)
            divisor = tl.where(scale.to(tl.float32) == 0.0, 1.0, scale.to(tl.float32))
            codes = _round(tl.div_rn(grouped, tl.broadcast_to(divisor[:, None], [COLUMNS, GROUP])))
            codes = tl.minimum(tl.maximum(codes, -127.0), 127.0).to(tl.int8)
            tl.store(pages + page + token * ROW + dims, tl.reshape(codes, [HEAD_PAD]), mask=dims < ROW)
        else:
            inside = tl.reshape(dims, [COLUMNS, GROUP]) < HEAD_DIM
            minimum = tl.min(tl.where(inside, grouped, float("inf")), axis=1).to(tl.bfloat16)
            low = minimum.to(tl.float32)
            spread = tl.max(tl.where(inside, grouped, float("-inf")), axis=1) - low
            scale = tl.div_rn(spread, 15.0).to(tl.bfloat16)
            divisor = tl.where(scale.to(tl.float32) == 0.0, 1.0, scale.to(tl.float32))
            steps = tl.div_rn(grouped - low[:, None], tl.broadcast_to(divisor[:, None], [COLUMNS, GROUP]))
            steps = tl.where(scale.to(tl.float32)[:, None] == 0.0, 0.0, steps)
            codes = tl.where(inside, tl.minimum(tl.maximum(_round(steps), 0.0), 15.0), 0.0).to(tl.int32)
            even, odd = tl.split(tl.reshape(codes, [HEAD_PAD // 2, 2]))
            pairs = tl.arange(0, HEAD_PAD // 2)
            tl.store(pages + page + token * ROW + pairs, (even | (odd << 4)).to(tl.uint8), mask=pairs < ROW)
            tl.store(numbers + GROUPS * PAGE_SIZE, minimum, mask=columns < GROUPS)
        tl.store(numbers, scale, mask=columns < GROUPS)


def check_pages(pages: Pages, head_dim: int) -> str:
    """The FORMAT of pages; asserts that K and V are pages of one shape, strides and known dtype."""
    k_pages, v_pages = pages
    assert k_pages.shape == v_pages.shape and k_pages.stride() == v_pages.stride(), (k_pages.stride(), v_pages.stride())
    assert k_pages.dtype == v_pages.dtype and k_pages.dtype in FORMATS, (k_pages.dtype, v_pages.dtype)
    assert k_pages.shape[2] == row_items(k_pages.dtype, head_dim) and k_pages.stride(2) == 1, (k_pages.shape, head_dim)
    if FORMATS[k_pages.dtype] != "plain":
        assert k_pages.shape[1] == 1 or k_pages.stride(1) == k_pages.shape[2], "the bytes of a page must be contiguous"
    return FORMATS[k_pages.dtype]
