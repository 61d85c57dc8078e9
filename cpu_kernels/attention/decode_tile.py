"""One tile of keys in decode: the scores of query vectors of a KV head, their softmax, and the weighted sum of V.

The vectors are the heads of one row, or of several that see the same keys (decode_item.py). All of them share one pass
over the tile's K (products/row_scores.py, of codes scores.py) and one over its V (values.py). Meanwhile the tile after
the next is asked for, a few lines at a time; other distances and bursts were slower (docs/log.md).
"""

import numpy as np
from numba import types

from cpu_kernels.attention.codes import add_minima, code_weights, widen_numbers
from cpu_kernels.attention.decode_softmax import tile_softmax
from cpu_kernels.attention.parameters import (
    BOUNDS_BYTES,
    HEAD_SCALARS,
    HEAD_SCORES,
    HEAD_STATE,
    HEAD_WEIGHTS,
    JOINED_SCORES,
    KEY_TILE,
    LINE_BYTES,
    ROWS_TOGETHER,
    SCALE_OF_Q,
    RowShape,
    joined_values,
    q_line_bytes,
    vectors_at_once,
)
from cpu_kernels.attention.products.row_scores import is_woven, row_scores
from cpu_kernels.attention.products.row_vectors import fetch
from cpu_kernels.attention.products.scores import code_dots, part_block, plain_dots, whole_block
from cpu_kernels.attention.products.values import value_strip
from cpu_kernels.attention.soft_cap import cap_scores
from cpu_kernels.attention.tiles import LOG2_E, tile_rows
from cpu_kernels.team.arguments import ATTENTION
from cpu_kernels.team.chunks import parameter, real_parameter
from cpu_kernels.vectors.compiler import helper, inlined
from cpu_kernels.vectors.isa import Isa
from cpu_kernels.vectors.scalar import load_scalar, most
from cpu_kernels.vectors.vector import LANES, splat, store_f32

ZERO = np.float32(0.0)


def tile_scores(isa: Isa, kv_dtype: str, score_heads: int, words: int):
    """Function: scores[vector][key] of a tile, in units of the vector's scale where there are codes."""
    if RowShape.of(kv_dtype).has_codes:
        return code_scores(isa, kv_dtype, score_heads, words)
    make = block_scores if words else plain_scores
    return make(isa, kv_dtype, score_heads)


def plain_scores(isa: Isa, kv_dtype: str, score_heads: int):
    """As `tile_scores`, of rows of numbers as they lie in memory."""
    at_once, has_woven = max(score_heads, JOINED_SCORES), is_woven(score_heads)
    scores_of = row_scores(isa, kv_dtype, score_heads, has_woven)
    joined_scores, q_line = row_scores(isa, kv_dtype, at_once, has_woven), q_line_bytes(kv_dtype, isa.has_bf16)

    @helper
    def scores(arguments, rows, numbers, keys, ahead, places, vectors, lines):
        work, q, _, _ = places
        head_dim, row_bytes = parameter(arguments, ATTENTION.head_dim), parameter(arguments, ATTENTION.k_row)
        joined = vectors // at_once * at_once
        if joined > 0:
            joined_scores(rows, row_bytes, keys, ahead, q, lines, head_dim, joined, work)
        if at_once > score_heads and joined < vectors:
            own_q, to = q + q_line * lines * joined, work + HEAD_SCORES * joined
            scores_of(rows, row_bytes, keys, rows if joined else ahead, own_q, lines, head_dim, vectors - joined, to)

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
    def block_dots(block, q, q_bytes, vectors, to):
        for vector in range(0, vectors, score_heads):
            dots(block, q + vector * q_bytes, q_bytes, to + HEAD_SCORES * vector)

    @helper
    def scores(arguments, rows, numbers, keys, ahead, places, vectors, lines):
        work, q, _, _ = places
        head_dim, row_bytes = parameter(arguments, ATTENTION.head_dim), parameter(arguments, ATTENTION.k_row)
        for i in range(0, HEAD_SCORES * vectors, 64):
            store_f32(splat(ZERO), work + i)
        for key in range(0, keys, LANES):
            row = rows + key * row_bytes
            for line in range(lines):
                left = head_dim - line_items * line
                block = block_of(row + LINE_BYTES * line, row_bytes, keys - 1 - key, ahead, left)
                ahead += LINE_BYTES * LANES
                block_dots(block, q + q_line * line, q_line * lines, vectors, work + 4 * key)

    return scores


def code_scores(isa: Isa, kv_dtype: str, score_heads: int, words: int):
    """As `tile_scores`, of codes."""
    shape = RowShape.of(kv_dtype)
    has_minimum, groups_at_once, numbers_of_group = shape.numbers == 2, words // shape.group_words, shape.numbers
    q_line, block_bytes, line_bytes = q_line_bytes(kv_dtype, isa.has_bf16), 4 * words, shape.line_bytes
    q_block = q_line * block_bytes // line_bytes
    load, dots = whole_block(words), code_dots(isa, kv_dtype, score_heads, words)
    at_once = max(score_heads, JOINED_SCORES)
    joined_dots = code_dots(isa, kv_dtype, at_once, words)

    @inlined
    def block_dots(block, q, q_bytes, sums, groups, scales, vectors, to):
        joined = vectors // at_once * at_once
        for vector in range(0, joined, at_once):
            own_sums, own_to = sums + 4 * groups * vector, to + HEAD_SCORES * vector
            joined_dots(block, q + vector * q_bytes, q_bytes, own_sums, 4 * groups, scales, 4 * KEY_TILE, own_to)
        if at_once > score_heads:
            for vector in range(joined, vectors, score_heads):
                own_sums, own_to = sums + 4 * groups * vector, to + HEAD_SCORES * vector
                dots(block, q + vector * q_bytes, q_bytes, own_sums, 4 * groups, scales, 4 * KEY_TILE, own_to)

    @helper
    def scores(arguments, rows, numbers, keys, ahead, places, vectors, lines):
        work, q, scales, sums = places
        row_bytes, q_bytes = parameter(arguments, ATTENTION.k_row), q_line * lines
        for i in range(0, HEAD_SCORES * vectors, 64):
            store_f32(splat(ZERO), work + i)
        widen_numbers(numbers, lines * numbers_of_group, 2 * parameter(arguments, ATTENTION.page_size), keys, scales)
        for key in range(0, keys, LANES):
            row = rows + key * row_bytes
            for index in range(line_bytes * lines // block_bytes):
                block = load(row + block_bytes * index, row_bytes, keys - 1 - key, ahead)
                ahead, group = ahead + LINE_BYTES * words, groups_at_once * index
                at, block_scales = q + q_block * index, scales + 4 * (KEY_TILE * group + key)
                block_dots(block, at, q_bytes, sums + 4 * group, lines, block_scales, vectors, work + 4 * key)
        if has_minimum:
            for vector in range(vectors):
                minima, own_sums = scales + 4 * KEY_TILE * lines, sums + 4 * lines * vector
                add_minima(work + HEAD_SCORES * vector, minima, own_sums, lines)

    return scores


def tile_weights(isa: Isa, kv_dtype: str, score_heads: int, capped: bool):
    """Function: scores of every vector -> weights, in place, and (m, l)."""
    has_codes, own_heads = RowShape.of(kv_dtype).has_codes, min(score_heads, JOINED_SCORES)
    soften_own, soften_joined = (tile_softmax(isa, kv_dtype, heads) for heads in (own_heads, JOINED_SCORES))

    @helper
    def cap_vectors(arguments, scores, vectors, scalars):
        """Scores of every vector -> capped ones; of codes in units of the scale of q, as they were."""
        cap = real_parameter(arguments, ATTENTION.cap)
        factor = real_parameter(arguments, ATTENTION.scale) / cap
        for vector in range(vectors):
            unit = types.float64(load_scalar(scalars + HEAD_SCALARS * vector + SCALE_OF_Q)) if has_codes else 1.0
            to = types.float32(cap / unit) if unit != 0.0 else ZERO
            cap_scores(scores + HEAD_SCORES * vector, types.float32(factor * unit), to)

    @helper
    def soften(arguments, scores, vectors, keys, scalars, states):
        scale = types.float32(real_parameter(arguments, ATTENTION.scale) * LOG2_E)
        if capped:
            cap_vectors(arguments, scores, vectors, scalars)
            scale = types.float32(LOG2_E)
        joined = vectors // JOINED_SCORES * JOINED_SCORES
        for vector in range(0, joined, JOINED_SCORES):
            at, state, factors = scores + HEAD_SCORES * vector, states + HEAD_STATE * vector, HEAD_SCALARS * vector
            soften_joined(at, keys, scale, state, scalars + factors)
        if own_heads < JOINED_SCORES:
            for vector in range(joined, vectors, own_heads):
                at, state, factors = scores + HEAD_SCORES * vector, states + HEAD_STATE * vector, HEAD_SCALARS * vector
                soften_own(at, keys, scale, state, scalars + factors)

    return soften


def tile_values(isa: Isa, kv_dtype: str, value_heads: int):
    """Function: acc of every vector, one strip of V after another."""
    at_once, shape = max(value_heads, joined_values(kv_dtype, isa)), RowShape.of(kv_dtype)
    own_strip, joined_strip = (value_strip(isa, kv_dtype, heads) for heads in (value_heads, at_once))
    has_codes, line_items, line_bytes, acc_line = shape.has_codes, shape.line_items, shape.line_bytes, shape.acc_bytes
    weigh = code_weights(isa, kv_dtype) if has_codes else None

    @helper
    def add_values(arguments, rows, v_numbers, keys, ahead, scores, vectors, lines, scalars, acc):
        head_dim, row_bytes = parameter(arguments, ATTENTION.head_dim), parameter(arguments, ATTENTION.v_row)
        acc_bytes, stride = acc_line * lines, 2 * parameter(arguments, ATTENTION.page_size)
        weights, weight_bytes, joined = scores, HEAD_SCORES, vectors // at_once * at_once
        if has_codes:
            weights, weight_bytes = scores + HEAD_SCORES * vectors, HEAD_WEIGHTS
        for line in range(lines):
            if has_codes:
                at = v_numbers + stride * line
                weigh(scores, vectors, at, at + stride * lines, keys, weights, scalars)
            left, at = head_dim - line_items * line, rows + line_bytes * line
            for vector in range(0, joined, at_once):
                to, p = acc + vector * acc_bytes + acc_line * line, weights + weight_bytes * vector
                joined_strip(to, acc_bytes, scalars + HEAD_SCALARS * vector, at, row_bytes, keys, p, left, ahead)
            if at_once > value_heads:
                for vector in range(joined, vectors, value_heads):
                    to, p = acc + vector * acc_bytes + acc_line * line, weights + weight_bytes * vector
                    own_strip(to, acc_bytes, scalars + HEAD_SCALARS * vector, at, row_bytes, keys, p, left, ahead)
            ahead += line_bytes * keys

    return add_values


def attend_tile(isa: Isa, kv_dtype: str, score_heads: int, value_heads: int, words: int, capped: bool):
    """Function: take one tile of keys into acc and states (m, l) of some query vectors, heads of one row or of several;
    memory as decode_thread_bytes says."""
    scores_of, add_values = tile_scores(isa, kv_dtype, score_heads, words), tile_values(isa, kv_dtype, value_heads)
    soften = tile_weights(isa, kv_dtype, score_heads, capped)
    shape, q_line = RowShape.of(kv_dtype), q_line_bytes(kv_dtype, isa.has_bf16)
    has_codes, numbers, line_bytes = shape.has_codes, shape.numbers, shape.line_bytes
    most_vectors = vectors_at_once(words)

    @helper
    def ask_numbers(arguments, ahead, lines):
        """Fetch the numbers of a tile's codes: they lie behind the page's rows, where no stream leads."""
        for i in range(lines * numbers):
            for at in range(0, 2 * KEY_TILE, LINE_BYTES):
                fetch(ahead + 2 * parameter(arguments, ATTENTION.page_size) * i + at)

    @helper
    def places_of(work, kv_head, vector, rows, heads, lines):
        """(scores, scales of K, q, scalars, sums of q, states) in the thread's memory; from q on every KV head and
        query vector has its own, and those of the vectors from `vector` on are given."""
        vectors, scores = rows * heads, work + BOUNDS_BYTES * ROWS_TOGETHER
        scales = scores + (HEAD_SCORES + HEAD_WEIGHTS) * most(heads, most_vectors)
        query_bytes = (q_line * lines + HEAD_SCALARS + 4 * lines + HEAD_STATE) * vectors
        q = (
            scales
            + 4 * KEY_TILE * lines * numbers
            + (query_bytes + LINE_BYTES - 1) // LINE_BYTES * LINE_BYTES * kv_head
        )
        scalars = q + q_line * lines * vectors
        sums = scalars + HEAD_SCALARS * vectors
        states = sums + 4 * lines * vectors + HEAD_STATE * vector
        own = q + q_line * lines * vector, scalars + HEAD_SCALARS * vector, sums + 4 * lines * vector
        return scores, scales, own[0], own[1], own[2], states

    @helper
    def ask_tile(arguments, tile, lines):
        """Ask for a whole tile."""
        k_page, v_page, offset, keys = tile
        k_rows, k_numbers, v_rows, v_numbers = tile_rows(arguments, k_page, v_page, offset)
        for i in range(0, line_bytes * lines * keys, LINE_BYTES):
            fetch(k_rows + i)
            fetch(v_rows + i)
        if has_codes:
            ask_numbers(arguments, k_numbers, lines)
            ask_numbers(arguments, v_numbers, lines)

    @helper
    def take_tile(arguments, tile, k_ahead, v_ahead, places, vectors, lines, acc):
        """tile: (K page, V page, offset in them, keys). k_ahead, v_ahead: those whose K and V to ask for meanwhile."""
        k_page, v_page, offset, keys = tile
        scores, scales, q, scalars, sums, states = places
        k_rows, k_numbers, v_rows, v_numbers = tile_rows(arguments, k_page, v_page, offset)
        k_asked, k_numbers_asked, _, _ = tile_rows(arguments, k_ahead[0], k_ahead[1], k_ahead[2])
        _, _, v_asked, v_numbers_asked = tile_rows(arguments, v_ahead[0], v_ahead[1], v_ahead[2])
        if has_codes:
            ask_numbers(arguments, k_numbers_asked, lines)
        scores_of(arguments, k_rows, k_numbers, keys, k_asked, (scores, q, scales, sums), vectors, lines)
        if has_codes:
            ask_numbers(arguments, v_numbers_asked, lines)
        soften(arguments, scores, vectors, keys, scalars, states)
        add_values(arguments, v_rows, v_numbers, keys, v_asked, scores, vectors, lines, scalars, acc)

    return take_tile, ask_tile, places_of
