"""Rows of K and V in Triton: read from pages and written to them, in the format that kv_pages describes.

FORMAT is "plain" (float32 or bfloat16 rows), "q8" or "q4". Codes become bf16 as they are read, code * scale (+ minimum)
rounded once, so that tensor cores multiply them like the rows of a bf16 cache.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from cpu_kernels.contract import Pages
from gpu_kernels.kv_pages import row_items

FORMATS = {torch.float32: "plain", torch.bfloat16: "plain", torch.int8: "q8", torch.uint8: "q4"}
ROUNDING = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and subtracting it rounds a small float32 half to even


class PageRows(NamedTuple):
    """How rows lie in the pages of K and V, inside a kernel: strides in items, and constants. The bytes of a page of
    codes are contiguous.

    Like every value with constants it is made where it is passed: a name would turn them into tensors."""

    page_stride: Any
    row_stride: Any
    HEAD_DIM: Any
    HEAD_PAD: Any
    PAGE_SIZE: Any
    FORMAT: Any


@triton.jit
def load_rows(pages, rows, page, token, stored):
    """Rows [len(token), HEAD_PAD], 0 where not `stored`.

    page: where the page of each token begins, in items, or of all of them; token: offset in it."""
    dims = tl.arange(0, rows.HEAD_PAD)
    mask = stored[:, None] & (dims < rows.HEAD_DIM)[None, :]
    if rows.FORMAT == "plain":
        loaded = tl.load(pages + (page + token * rows.row_stride)[:, None] + dims[None, :], mask=mask, other=0.0)
    else:
        loaded = tl.where(mask, _unpacked_rows(pages, rows, page, token, stored, mask), 0.0).to(tl.bfloat16)
    return loaded


@triton.jit
def _unpacked_rows(pages, rows, page, token, stored, mask):
    """float32 of codes."""
    HEAD_PAD: tl.constexpr = rows.HEAD_PAD
    PAGE_SIZE: tl.constexpr = rows.PAGE_SIZE
    GROUP: tl.constexpr = 64 if rows.FORMAT == "q8" else 32
    GROUPS: tl.constexpr = (rows.HEAD_DIM + GROUP - 1) // GROUP
    ROW: tl.constexpr = GROUPS * GROUP if rows.FORMAT == "q8" else GROUPS * GROUP // 2
    WIDTH: tl.constexpr = min(GROUP, HEAD_PAD)  # a head may be shorter than a group
    COLUMNS: tl.constexpr = HEAD_PAD // WIDTH
    at = (page + token * ROW)[:, None]
    if rows.FORMAT == "q8":
        codes = tl.load(pages + at + tl.arange(0, HEAD_PAD)[None, :], mask=mask, other=0).to(tl.float32)
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
    if rows.FORMAT == "q4":
        minimum = tl.load(numbers + GROUPS * PAGE_SIZE, mask=present, other=0.0).to(tl.float32)
        values += minimum[:, :, None]
    return tl.reshape(values, [codes.shape[0], HEAD_PAD])


@triton.jit
def _round(x):
    return (x + ROUNDING) - ROUNDING


@triton.jit
def store_row(pages, rows, slot, row):
    """Write a float32 row [HEAD_PAD], 0 from HEAD_DIM on and of whole groups, to slot = page * PAGE_SIZE + offset."""
    page, token = slot // rows.PAGE_SIZE * rows.page_stride, slot % rows.PAGE_SIZE
    dims = tl.arange(0, rows.HEAD_PAD)
    if rows.FORMAT == "plain":
        target = pages + page + token * rows.row_stride + dims
        tl.store(target, row.to(pages.dtype.element_ty), mask=dims < rows.HEAD_DIM)
    elif rows.FORMAT == "q8":
        _store_q8(pages, rows, page, token, row)
    else:
        _store_q4(pages, rows, page, token, row)


@triton.jit
def _store_q8(pages, rows, page, token, row):
    PAGE_SIZE: tl.constexpr = rows.PAGE_SIZE
    HEAD_PAD: tl.constexpr = rows.HEAD_PAD
    GROUPS: tl.constexpr = (rows.HEAD_DIM + 63) // 64
    ROW: tl.constexpr = GROUPS * 64
    COLUMNS: tl.constexpr = HEAD_PAD // 64
    columns = tl.arange(0, COLUMNS)
    numbers = pages.to(tl.pointer_type(tl.bfloat16), bitcast=True) + (page + PAGE_SIZE * ROW) // 2
    numbers += columns * PAGE_SIZE + token
    grouped = tl.reshape(row, [COLUMNS, 64])
    scale = tl.div_rn(tl.max(tl.abs(grouped), axis=1), 127.0).to(tl.bfloat16)
    divisor = tl.where(scale.to(tl.float32) == 0.0, 1.0, scale.to(tl.float32))
    codes = _round(tl.div_rn(grouped, tl.broadcast_to(divisor[:, None], [COLUMNS, 64])))
    codes = tl.minimum(tl.maximum(codes, -127.0), 127.0).to(tl.int8)
    dims = tl.arange(0, HEAD_PAD)
    tl.store(pages + page + token * ROW + dims, tl.reshape(codes, [HEAD_PAD]), mask=dims < ROW)
    tl.store(numbers, scale, mask=columns < GROUPS)


@triton.jit
def _store_q4(pages, rows, page, token, row):
    PAGE_SIZE: tl.constexpr = rows.PAGE_SIZE
    HEAD_PAD: tl.constexpr = rows.HEAD_PAD
    GROUPS: tl.constexpr = (rows.HEAD_DIM + 31) // 32
    ROW: tl.constexpr = GROUPS * 16
    COLUMNS: tl.constexpr = HEAD_PAD // 32
    columns = tl.arange(0, COLUMNS)
    numbers = pages.to(tl.pointer_type(tl.bfloat16), bitcast=True) + (page + PAGE_SIZE * ROW) // 2
    numbers += columns * PAGE_SIZE + token
    grouped = tl.reshape(row, [COLUMNS, 32])
    inside = tl.reshape(tl.arange(0, HEAD_PAD), [COLUMNS, 32]) < rows.HEAD_DIM
    minimum = tl.min(tl.where(inside, grouped, float("inf")), axis=1).to(tl.bfloat16)
    low = minimum.to(tl.float32)
    spread = tl.max(tl.where(inside, grouped, float("-inf")), axis=1) - low
    scale = tl.div_rn(spread, 15.0).to(tl.bfloat16)
    divisor = tl.where(scale.to(tl.float32) == 0.0, 1.0, scale.to(tl.float32))
    steps = tl.div_rn(grouped - low[:, None], tl.broadcast_to(divisor[:, None], [COLUMNS, 32]))
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
