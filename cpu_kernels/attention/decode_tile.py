"""One tile of keys in decode: the scores of all query heads of a KV head, their softmax, and the weighted sum of V.

All heads share one pass over the tile's K (scores.py) and one over its V (values.py). Meanwhile the tile after the next
is asked for, a few lines at a time; other distances and bursts were slower (docs/log.md).
"""

import numpy as np
from numba import types

from cpu_kernels.attention.codes import add_minima, code_weights, widen_numbers
from cpu_kernels.attention.parameters import (
    HEAD_SCALARS,
    HEAD_SCORES,
    HEAD_WEIGHTS,
    KEY_TILE,
    LINE_BYTES,
    SCALE_OF_Q,
    RowShape,
    q_line_bytes,
)
from cpu_kernels.attention.quantised_softmax import code_softmax
from cpu_kernels.attention.row_vectors import fetch
from cpu_kernels.attention.scores import code_dots, part_block, plain_dots, whole_block
from cpu_kernels.attention.soft_cap import cap_scores
from cpu_kernels.attention.tiles import LOG2_E, raise_maximum, softmax_tile, tile_rows
from cpu_kernels.attention.values import value_strip
from cpu_kernels.team.arguments import ATTENTION
from cpu_kernels.team.chunks import parameter, real_parameter
from cpu_kernels.vectors.compiler import helper, inlined
from cpu_kernels.vectors.isa import Isa
from cpu_kernels.vectors.scalar import load_scalar
from cpu_kernels.vectors.vector import LANES, splat, store_f32

ZERO = np.float32(0.0)


def tile_scores(isa: Isa, kv_dtype: str, score_heads: int, words: int):
    """Function: scores[head][key] of a tile, in units of the head's scale where there are codes."""
    shape = RowShape.of(kv_dtype)
    has_codes, has_minimum, groups_at_once = shape.has_codes, shape.numbers == 2, words // shape.group_words
    q_line, block_bytes, line_items = q_line_bytes(kv_dtype, isa.has_bf16), 4 * words, shape.line_items
    q_block, line_bytes, numbers_of_group = q_line * block_bytes // shape.line_bytes, shape.line_bytes, shape.numbers
    load = whole_block(words)
    load_part = load if has_codes else part_block(kv_dtype)
    dots = code_dots(isa, kv_dtype, score_heads, words) if has_codes else plain_dots(isa, kv_dtype, score_heads)

    @inlined
    def block_of(base, row_bytes, last, ahead, left):
        """A block of 16 keys; `left`: numbers from it to the end of a plain row."""
        if has_codes or left >= line_items:
            return load(base, row_bytes, last, ahead)
        return load_part(base, row_bytes, last, left)

    @inlined
    def code_block(block, q, q_bytes, sums, groups, scales, heads, to):
        for head in range(0, heads, score_heads):
            head_sums, head_to = sums + 4 * groups * head, to + HEAD_SCORES * head
            dots(block, q + head * q_bytes, q_bytes, head_sums, 4 * groups, scales, 4 * KEY_TILE, head_to)

    @inlined
    def plain_block(block, q, q_bytes, heads, to):
        for head in range(0, heads, score_heads):
            dots(block, q + head * q_bytes, q_bytes, to + HEAD_SCORES * head)

    @helper
    def scores(arguments, rows, numbers, keys, ahead, places, heads, lines):
        work, q, scales, sums = places
        head_dim, row_bytes = parameter(arguments, ATTENTION.head_dim), parameter(arguments, ATTENTION.k_row)
        q_bytes = q_line * lines
        for i in range(0, HEAD_SCORES * heads, 64):
            store_f32(splat(ZERO), work + i)
        if has_codes:
            widen_numbers(
                numbers, lines * numbers_of_group, 2 * parameter(arguments, ATTENTION.page_size), keys, scales
            )
        blocks = (line_bytes * lines + block_bytes - 1) // block_bytes
        for key in range(0, keys, LANES):
            row = rows + key * row_bytes
            for index in range(blocks):
                left = head_dim - line_items * index
                block = block_of(row + block_bytes * index, row_bytes, keys - 1 - key, ahead, left)
                ahead, at, to = ahead + LINE_BYTES * words, q + q_block * index, work + 4 * key
                if has_codes:
                    group = groups_at_once * index
                    block_scales = scales + 4 * (KEY_TILE * group + key)
                    code_block(block, at, q_bytes, sums + 4 * group, lines, block_scales, heads, to)
                else:
                    plain_block(block, at, q_bytes, heads, to)
        if has_minimum:
            for head in range(heads):
                add_minima(work + HEAD_SCORES * head, scales + 4 * KEY_TILE * lines, sums + 4 * lines * head, lines)

    return scores


def attend_tile(isa: Isa, kv_dtype: str, score_heads: int, value_heads: int, words: int, capped: bool):
    """Function: take one tile of keys into acc and (m, l) of the item's heads; memory as decode_thread_bytes says."""
    scores_of, strip_of = tile_scores(isa, kv_dtype, score_heads, words), value_strip(isa, kv_dtype, value_heads)
    shape = RowShape.of(kv_dtype)
    has_codes, numbers, q_line = shape.has_codes, shape.numbers, q_line_bytes(kv_dtype, isa.has_bf16)
    line_items, line_bytes, acc_line = shape.line_items, shape.line_bytes, shape.acc_bytes
    soften = code_softmax(score_heads) if has_codes else softmax_tile(isa, kv_dtype)
    weigh = code_weights(isa, kv_dtype) if has_codes else None

    @helper
    def ask_numbers(arguments, ahead, lines):
        """Fetch the numbers of a tile's codes: they lie behind the page's rows, where no stream leads."""
        for i in range(lines * numbers):
            for at in range(0, 2 * KEY_TILE, LINE_BYTES):
                fetch(ahead + 2 * parameter(arguments, ATTENTION.page_size) * i + at)

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
        """Scores -> weights of every head."""
        scale = types.float32(real_parameter(arguments, ATTENTION.scale) * LOG2_E)
        if capped:
            cap_heads(arguments, work, heads, scalars)
            scale = types.float32(LOG2_E)
        if has_codes:
            for head in range(0, heads, score_heads):
                at = scalars + HEAD_SCALARS * head
                soften(work + HEAD_SCORES * head, keys, scale, running + 8 * head, at)
        else:
            for head in range(heads):
                at = scalars + HEAD_SCALARS * head
                raise_maximum(work + HEAD_SCORES * head, 0, keys, splat(scale), running + 8 * head, at)
            for head in range(heads):
                at = scalars + HEAD_SCALARS * head
                soften(work + HEAD_SCORES * head, 0, keys, splat(scale), running + 8 * head, at)

    @helper
    def add_values(arguments, rows, v_numbers, keys, ahead, work, heads, lines, scalars, acc):
        """acc of every head, one strip of V after another."""
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
