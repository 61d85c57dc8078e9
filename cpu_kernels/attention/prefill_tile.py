"""One tile of keys in prefill, K transposed: the scores of an item's query vectors, their softmax, and the sum of V."""

from llvmlite import ir
from numba import types

from cpu_kernels.attention.codes import tile_widener
from cpu_kernels.attention.parameters import (
    HEAD_SCALARS,
    HEAD_SCORES,
    KEY_TILE,
    LINE_BYTES,
    NARROW_VALUES,
    PREFILL_SCORES,
    PREFILL_VALUES,
    RowShape,
    q_line_bytes,
)
from cpu_kernels.attention.products.values import value_strip
from cpu_kernels.attention.soft_cap import cap_scores
from cpu_kernels.attention.tiles import LOG2_E, raise_maximum, softmax_tile, tile_rows
from cpu_kernels.team.arguments import PREFILL
from cpu_kernels.team.chunks import parameter, real_parameter
from cpu_kernels.vectors.compiler import helper
from cpu_kernels.vectors.dot import line_products
from cpu_kernels.vectors.isa import Isa
from cpu_kernels.vectors.scalar import least, most
from cpu_kernels.vectors.tiles import zeros
from cpu_kernels.vectors.vector import I32, I64, LANES, VI32, F32x16, emits, intp, load_as, splat, splat_value, store_as

KEY_VECTORS = KEY_TILE // LANES


def scores_of_tile(isa: Isa, kv_dtype: str):
    """Function: scores[query][64 keys] of PREFILL_SCORES queries and a transposed tile of K of `words` 4-byte rows."""
    tile = types.UniTuple(F32x16, PREFILL_SCORES * KEY_VECTORS)
    products = line_products(isa, kv_dtype)
    word_bytes = 4 * len(products)

    @emits(tile, tile, intp, intp, intp)
    def add_words(b, sums, q, q_bytes, keys):
        rows = [b.add(q, b.mul(q_bytes, ir.Constant(I64, query))) for query in range(PREFILL_SCORES)]
        for half, (select, add_product) in enumerate(products):
            ks = [select(b, load_as(b, keys, VI32, LINE_BYTES * part)) for part in range(KEY_VECTORS)]
            for query, row in enumerate(rows):
                x = splat_value(b, load_as(b, row, I32, 4 * half))
                for part, k in enumerate(ks):
                    index = query * KEY_VECTORS + part
                    sums = b.insert_value(sums, add_product(b, b.extract_value(sums, index), k, x), index)
        return sums

    @emits(types.void, tile, intp)
    def store(b, sums, to):
        for index in range(PREFILL_SCORES * KEY_VECTORS):
            store_as(b, b.extract_value(sums, index), to, LINE_BYTES * index)

    start = zeros(PREFILL_SCORES * KEY_VECTORS)

    @helper
    def scores(q, q_bytes, keys, words, to):
        sums = start()
        for word in range(words):
            sums = add_words(sums, q + word_bytes * word, q_bytes, keys + 4 * KEY_TILE * word)
        store(sums, to)

    return scores


@helper
def visible(arguments, row, position, keys):
    """Visible keys [first, last) of the tile at `position` for this row of q."""
    at = parameter(arguments, PREFILL.q_start) + row
    window = parameter(arguments, PREFILL.window)
    first = most(0, at - window + 1 - position) if window else 0
    return first, least(keys, at + 1 - position)


def rows_of_tile(kv_dtype: str):
    """Function: (K rows, bytes from one to the next, V rows, bytes likewise) of a tile; codes are widened to `work`."""
    has_codes, group_lines = RowShape.of(kv_dtype).has_codes, RowShape.of(kv_dtype).line_items // 32
    widen = tile_widener(kv_dtype) if has_codes else None

    @helper
    def rows(arguments, k_page, v_page, offset, keys, lines, work):
        k_row, v_row = parameter(arguments, PREFILL.k_row), parameter(arguments, PREFILL.v_row)
        k_rows, k_numbers, v_rows, v_numbers = tile_rows(arguments, k_page, v_page, offset)
        if has_codes:
            stride, groups, wide = 2 * parameter(arguments, PREFILL.page_size), lines // group_lines, LINE_BYTES * lines
            widen(k_rows, k_row, k_numbers, stride, keys, groups, work)
            widen(v_rows, v_row, v_numbers, stride, keys, groups, work + KEY_TILE * wide)
            return work, wide, work + KEY_TILE * wide, wide
        return k_rows, k_row, v_rows, v_row

    return rows


def attend_tile(isa: Isa, kv_dtype: str, capped: bool):
    """Function: one tile of keys, K transposed, for all query vectors of an item. kv_dtype: of the rows multiplied."""
    values = PREFILL_VALUES if isa.has_avx512 else NARROW_VALUES
    scores_of, strip_of = scores_of_tile(isa, kv_dtype), value_strip(isa, kv_dtype, values)
    soften_one, shape = softmax_tile(isa, kv_dtype), RowShape.of(kv_dtype)
    line_items, acc_line, q_line = shape.line_items, shape.acc_bytes, q_line_bytes(kv_dtype, isa.has_bf16)

    @helper
    def soften(arguments, first_row, queries_per_kv, count, vector, position, keys, scores, running):
        """Scores -> weights of one pass of query vectors."""
        scale = splat(types.float32(real_parameter(arguments, PREFILL.scale) * LOG2_E))
        if capped:
            cap = types.float32(real_parameter(arguments, PREFILL.cap))
            factor = types.float32(real_parameter(arguments, PREFILL.scale) / cap)
            for part in range(PREFILL_VALUES):
                cap_scores(scores + HEAD_SCORES * part, factor, cap)
            scale = splat(types.float32(LOG2_E))
        scalars = scores + HEAD_SCORES * PREFILL_VALUES
        for part in range(PREFILL_VALUES):
            row = first_row + least(count - 1, vector + part) // queries_per_kv
            low, high = visible(arguments, row, position, keys)
            at, scalar_at = scores + HEAD_SCORES * part, scalars + HEAD_SCALARS * part
            raise_maximum(at, low, high, scale, running + 8 * (vector + part), scalar_at)
        for part in range(PREFILL_VALUES):
            row = first_row + least(count - 1, vector + part) // queries_per_kv
            low, high = visible(arguments, row, position, keys)
            at, scalar_at = scores + HEAD_SCORES * part, scalars + HEAD_SCALARS * part
            soften_one(at, low, high, scale, running + 8 * (vector + part), scalar_at)

    @helper
    def add_values(head_dim, lines, last, v_rows, v_row, scores, acc):
        scalars, acc_bytes = scores + HEAD_SCORES * PREFILL_VALUES, acc_line * lines
        for line in range(lines):
            at, left = v_rows + LINE_BYTES * line, head_dim - line_items * line
            for part in range(0, PREFILL_VALUES, values):
                to, factors = acc + acc_bytes * part + acc_line * line, scalars + HEAD_SCALARS * part
                strip_of(to, acc_bytes, factors, at, v_row, last, scores + HEAD_SCORES * part, left, at)

    @helper
    def attend(
        arguments, first_row, queries_per_kv, count, position, keys, lines, v_rows, v_row, k_t, scores, q, acc, running
    ):
        q_bytes, acc_bytes = q_line * lines, acc_line * lines
        for vector in range(0, count, PREFILL_VALUES):
            last_row = first_row + least(count - 1, vector + PREFILL_VALUES - 1) // queries_per_kv
            last = visible(arguments, last_row, position, keys)[1]
            if last <= 0 or visible(arguments, first_row + vector // queries_per_kv, position, keys)[0] >= keys:
                continue
            for part in range(0, PREFILL_VALUES, PREFILL_SCORES):
                at = q + (vector + part) * q_bytes
                scores_of(at, q_bytes, k_t, LANES * lines, scores + HEAD_SCORES * part)
            soften(arguments, first_row, queries_per_kv, count, vector, position, keys, scores, running)
            head_dim = parameter(arguments, PREFILL.head_dim)
            add_values(head_dim, lines, last, v_rows, v_row, scores, acc + vector * acc_bytes)

    return attend
