"""One tile of keys in decode: the scores of all query heads of a KV head, their softmax, and the weighted sum of V.

All heads share one pass over the tile's K (products/row_scores.py, of codes scores.py) and one over its V (values.py).
Meanwhile the tile after the next is asked for, a few lines at a time; other distances and bursts were slower
(docs/log.md).
"""

import numpy as np
from numba import types

from cpu_kernels.attention.codes import add_minima, code_weights, widen_numbers
from cpu_kernels.attention.decode_softmax import tile_softmax
from cpu_kernels.attention.parameters import (
    HEAD_SCALARS,
    HEAD_SCORES,
    HEAD_WEIGHTS,
    KEY_TILE,
    LINE_BYTES,
    SCALE_OF_Q,
    SOFTMAX_HEADS,
    RowShape,
    q_line_bytes,
)
from cpu_kernels.attention.products.row_scores import row_scores
from cpu_kernels.attention.products.row_vectors import fetch
from cpu_kernels.attention.products.scores import code_dots, part_block, plain_dots, whole_block
from cpu_kernels.attention.products.values import value_strip
from cpu_kernels.attention.soft_cap import cap_scores
from cpu_kernels.attention.tiles import LOG2_E, tile_rows
from cpu_kernels.team.arguments import ATTENTION
from cpu_kernels.team.chunks import parameter, real_parameter
from cpu_kernels.vectors.compiler import helper, inlined
from cpu_kernels.vectors.isa import Isa
from cpu_kernels.vectors.scalar import load_scalar
from cpu_kernels.vectors.vector import LANES, splat, store_f32

ZERO = np.float32(0.0)


def tile_scores(isa: Isa, kv_dtype: str, score_heads: int, words: int):
    """Function: scores[head][key] of a tile, in units of the head's scale where there are codes."""
    if RowShape.of(kv_dtype).has_codes:
        return code_scores(isa, kv_dtype, score_heads, words)
    make = block_scores if words else plain_scores
    return make(isa, kv_dtype, score_heads)


def plain_scores(isa: Isa, kv_dtype: str, score_heads: int):
    """As `tile_scores`, of rows of numbers as they lie in memory."""
    scores_of = row_scores(isa, kv_dtype, score_heads)

    @helper
    def scores(arguments, rows, numbers, keys, ahead, places, heads, lines):
        work, q, _, _ = places
        head_dim, row_bytes = parameter(arguments, ATTENTION.head_dim), parameter(arguments, ATTENTION.k_row)
        scores_of(rows, row_bytes, keys, ahead, q, lines, head_dim, heads, work)

    return scores


def block_scores(isa: Isa, kv_dtype: str, score_heads: int):
    """As `tile_scores`, of rows of numbers, transposed in blocks of 16 keys."""
    load, load_part, dots = whole_block(LANES), part_block(kv_dtype), plain_dots(isa, kv_dtype, score_heads)
    line_items, q_line = RowShape.of(kv_dtype).line_items, q_line_bytes(kv_dtype, isa.has_bf16)

    @inlined
    def block_of(base, row_bytes, last, ahead, left):
        """A block of 16 keys; `left`: numbers from it to the end of a row."""
        if left >= line_items:
            return load(base, row_bytes, last, ahead)
        return load_part(base, row_bytes, last, left)

    @inlined
    def block_dots(block, q, q_bytes, heads, to):
        for head in range(0, heads, score_heads):
            dots(block, q + head * q_bytes, q_bytes, to + HEAD_SCORES * head)

    @helper
    def scores(arguments, rows, numbers, keys, ahead, places, heads, lines):
        work, q, _, _ = places
        head_dim, row_bytes = parameter(arguments, ATTENTION.head_dim), parameter(arguments, ATTENTION.k_row)
        for i in range(0, HEAD_SCORES * heads, 64):
            store_f32(splat(ZERO), work + i)
        for key in range(0, keys, LANES):
            row = rows + key * row_bytes
            for line in range(lines):
                left = head_dim - line_items * line
                block = block_of(row + LINE_BYTES * line, row_bytes, keys - 1 - key, ahead, left)
                ahead += LINE_BYTES * LANES
                block_dots(block, q + q_line * line, q_line * lines, heads, work + 4 * key)

    return scores


def code_scores(isa: Isa, kv_dtype: str, score_heads: int, words: int):
    """As `tile_scores`, of codes."""
    shape = RowShape.of(kv_dtype)
    has_minimum, groups_at_once, numbers_of_group = shape.numbers == 2, words // shape.group_words, shape.numbers
    q_line, block_bytes, line_bytes = q_line_bytes(kv_dtype, isa.has_bf16), 4 * words, shape.line_bytes
    q_block = q_line * block_bytes // line_bytes
    load, dots = whole_block(words), code_dots(isa, kv_dtype, score_heads, words)

    @inlined
    def block_dots(block, q, q_bytes, sums, groups, scales, heads, to):
        for head in range(0, heads, score_heads):
            head_sums, head_to = sums + 4 * groups * head, to + HEAD_SCORES * head
            dots(block, q + head * q_bytes, q_bytes, head_sums, 4 * groups, scales, 4 * KEY_TILE, head_to)

    @helper
    def scores(arguments, rows, numbers, keys, ahead, places, heads, lines):
        work, q, scales, sums = places
        row_bytes, q_bytes = parameter(arguments, ATTENTION.k_row), q_line * lines
        for i in range(0, HEAD_SCORES * heads, 64):
            store_f32(splat(ZERO), work + i)
        widen_numbers(numbers, lines * numbers_of_group, 2 * parameter(arguments, ATTENTION.page_size), keys, scales)
        for key in range(0, keys, LANES):
            row = rows + key * row_bytes
            for index in range(line_bytes * lines // block_bytes):
                block = load(row + block_bytes * index, row_bytes, keys - 1 - key, ahead)
                ahead, group = ahead + LINE_BYTES * words, groups_at_once * index
                at, block_scales = q + q_block * index, scales + 4 * (KEY_TILE * group + key)
                block_dots(block, at, q_bytes, sums + 4 * group, lines, block_scales, heads, work + 4 * key)
        if has_minimum:
            for head in range(heads):
                add_minima(work + HEAD_SCORES * head, scales + 4 * KEY_TILE * lines, sums + 4 * lines * head, lines)

    return scores


def tile_weights(isa: Isa, kv_dtype: str, softmax_heads: int, capped: bool):
    """Function: scores of every head -> weights, in place, and (m, l)."""
    has_codes, soften = RowShape.of(kv_dtype).has_codes, tile_softmax(isa, kv_dtype, softmax_heads)

    @helper
    def cap_heads(arguments, work, heads, scalars):
        """Scores of every head -> capped ones; of codes in units of the scale of q, as they were."""
        cap = real_parameter(arguments, ATTENTION.cap)
        factor = real_parameter(arguments, ATTENTION.scale) / cap
        for head in range(heads):
            unit = types.float64(load_scalar(scalars + HEAD_SCALARS * head + SCALE_OF_Q)) if has_codes else 1.0
            to = types.float32(cap / unit) if unit != 0.0 else ZERO
            cap_scores(work + HEAD_SCORES * head, types.float32(factor * unit), to)

    @helper
    def soften_heads(arguments, work, heads, keys, scalars, running):
        scale = types.float32(real_parameter(arguments, ATTENTION.scale) * LOG2_E)
        if capped:
            cap_heads(arguments, work, heads, scalars)
            scale = types.float32(LOG2_E)
        for head in range(0, heads, softmax_heads):
            soften(work + HEAD_SCORES * head, keys, scale, running + 8 * head, scalars + HEAD_SCALARS * head)

    return soften_heads


def tile_values(isa: Isa, kv_dtype: str, value_heads: int):
    """Function: acc of every head, one strip of V after another."""
    strip_of, shape = value_strip(isa, kv_dtype, value_heads), RowShape.of(kv_dtype)
    has_codes, line_items, line_bytes, acc_line = shape.has_codes, shape.line_items, shape.line_bytes, shape.acc_bytes
    weigh = code_weights(isa, kv_dtype) if has_codes else None

    @helper
    def add_values(arguments, rows, v_numbers, keys, ahead, work, heads, lines, scalars, acc):
        head_dim, row_bytes = parameter(arguments, ATTENTION.head_dim), parameter(arguments, ATTENTION.v_row)
        acc_bytes, stride = acc_line * lines, 2 * parameter(arguments, ATTENTION.page_size)
        weights, weight_bytes = work, HEAD_SCORES
        if has_codes:
            weights, weight_bytes = work + HEAD_SCORES * heads, HEAD_WEIGHTS
        for line in range(lines):
            if has_codes:
                at = v_numbers + stride * line
                weigh(work, heads, at, at + stride * lines, keys, weights, scalars)
            for head in range(0, heads, value_heads):
                to, head_scalars = acc + head * acc_bytes + acc_line * line, scalars + HEAD_SCALARS * head
                left, at = head_dim - line_items * line, rows + line_bytes * line
                p = weights + weight_bytes * head
                strip_of(to, acc_bytes, head_scalars, at, row_bytes, keys, p, left, ahead)
            ahead += line_bytes * keys

    return add_values


def attend_tile(isa: Isa, kv_dtype: str, score_heads: int, value_heads: int, words: int, capped: bool):
    """Function: take one tile of keys into acc and (m, l) of the item's heads; memory as decode_thread_bytes says."""
    scores_of, add_values = tile_scores(isa, kv_dtype, score_heads, words), tile_values(isa, kv_dtype, value_heads)
    soften_heads = tile_weights(isa, kv_dtype, min(score_heads, SOFTMAX_HEADS), capped)
    shape, q_line = RowShape.of(kv_dtype), q_line_bytes(kv_dtype, isa.has_bf16)
    has_codes, numbers, line_bytes = shape.has_codes, shape.numbers, shape.line_bytes

    @helper
    def ask_numbers(arguments, ahead, lines):
        """Fetch the numbers of a tile's codes: they lie behind the page's rows, where no stream leads."""
        for i in range(lines * numbers):
            for at in range(0, 2 * KEY_TILE, LINE_BYTES):
                fetch(ahead + 2 * parameter(arguments, ATTENTION.page_size) * i + at)

    @helper
    def places_of(work, kv_head, heads, lines):
        """(scores, scales of K, q, scalars, sums of q) in the thread's memory; from q on each KV head has its own."""
        scales = work + (HEAD_SCORES + HEAD_WEIGHTS) * heads
        query_bytes = (q_line * lines + HEAD_SCALARS + 4 * lines) * heads
        q = (
            scales
            + 4 * KEY_TILE * lines * numbers
            + (query_bytes + LINE_BYTES - 1) // LINE_BYTES * LINE_BYTES * kv_head
        )
        scalars = q + q_line * lines * heads
        return work, scales, q, scalars, scalars + HEAD_SCALARS * heads

    @helper
    def ask_tile(arguments, tile, lines):
        """Ask for a whole tile."""
        k_page, v_page, offset, keys, _ = tile
        k_rows, k_numbers, v_rows, v_numbers = tile_rows(arguments, k_page, v_page, offset)
        for i in range(0, line_bytes * lines * keys, LINE_BYTES):
            fetch(k_rows + i)
            fetch(v_rows + i)
        if has_codes:
            ask_numbers(arguments, k_numbers, lines)
            ask_numbers(arguments, v_numbers, lines)

    @helper
    def take_tile(arguments, tile, ahead, places, heads, lines, acc, running):
        """tile: (K page, V page, offset in them, keys, kv_head); ahead: the one to ask for meanwhile."""
        k_page, v_page, offset, keys, _ = tile
        work, scales, q, scalars, sums = places
        k_rows, k_numbers, v_rows, v_numbers = tile_rows(arguments, k_page, v_page, offset)
        k_ahead, k_numbers_ahead, v_ahead, v_numbers_ahead = tile_rows(arguments, ahead[0], ahead[1], ahead[2])
        if has_codes:
            ask_numbers(arguments, k_numbers_ahead, lines)
        scores_of(arguments, k_rows, k_numbers, keys, k_ahead, (work, q, scales, sums), heads, lines)
        if has_codes:
            ask_numbers(arguments, v_numbers_ahead, lines)
        soften_heads(arguments, work, heads, keys, scalars, running)
        add_values(arguments, v_rows, v_numbers, keys, v_ahead, work, heads, lines, scalars, acc)

    return take_tile, ask_tile, places_of
