"""Many rows times row-major bf16 where the CPU cannot multiply it: a block's weights are turned first (turning.py).

Along the inputs every panel of rows widens the weights anew and adds up lanes for every output. Turned, TURNED_INPUTS
of a block at a time, they are widened once for all rows, and a tile of 16 features by six rows multiplies them with
inputs spread from memory, as numbers of codes are (forms/number_tiles.py). Sums of NUMBER_BLOCKS blocks grow in the
thread's own memory and go to the outputs once: rows of outputs are often a power of two apart, so that few of their
lines fit in a cache.
"""

from llvmlite import ir
from numba import types

from cpu_kernels.formats import LINE_BYTES, format_of
from cpu_kernels.linear.forms.number_tiles import ROWS, STEP, products_of_rows
from cpu_kernels.linear.panels.places import block_of, outputs_of
from cpu_kernels.linear.panels.turning import GROUP, turn_group
from cpu_kernels.linear.sizes import NUMBER_BLOCKS, SPREAD_BYTES, TURNED_INPUTS, spread_rows
from cpu_kernels.team.arguments import LINEAR
from cpu_kernels.team.chunks import parameter
from cpu_kernels.vectors.compiler import helper
from cpu_kernels.vectors.isa import Isa
from cpu_kernels.vectors.scalar import least
from cpu_kernels.vectors.tiles import add_where, zeros
from cpu_kernels.vectors.vector import (
    I64,
    LANES,
    VF32,
    F32x16,
    emits,
    float_vector,
    intp,
    picked,
    store_as,
)

TURNED_BYTES = LINE_BYTES * TURNED_INPUTS
# At once; their inputs stay in the second level while blocks pass, and their sums beside the turned weights.
MOST_ROWS = (SPREAD_BYTES - TURNED_BYTES) // (LINE_BYTES * NUMBER_BLOCKS) // ROWS * ROWS


def whole_registers(lanes: int, rows: int):
    """Intrinsic (sums) -> sums: those of a row in one vector of 16 lanes, where they are two of 8."""
    parts = LANES // lanes

    @emits(types.UniTuple(F32x16, rows), types.UniTuple(float_vector(lanes), parts * rows))
    def together(b, sums):
        value = ir.Constant(ir.ArrayType(VF32, rows), ir.Undefined)
        for row in range(rows):
            halves = [b.extract_value(sums, parts * row + part) for part in range(parts)]
            value = b.insert_value(value, picked(b, halves[0], halves[-1], list(range(LANES))), row)
        return value

    return together


def finish_between(rows: int):
    """Intrinsic (tile, bias, before, before_stride, to, to_stride): row r's features, with those of the bias and of
    `before`, go to to + r * to_stride; 0 means none."""

    @emits(types.void, types.UniTuple(F32x16, rows), intp, intp, intp, intp, intp)
    def store_features(b, sums, bias, before, before_stride, to, to_stride):
        for row in range(rows):
            value = add_where(b, b.extract_value(sums, row), bias, bias)
            value = add_where(b, value, b.add(before, b.mul(before_stride, I64(row))), before)
            store_as(b, value, b.add(to, b.mul(to_stride, I64(row))))

    return store_features


def tile_of(lanes: int, rows: int):
    """Function (weights, x, x_stride, inputs, and the places of `finish_between`): 16 turned features times `rows`
    rows."""
    start, add_products = zeros(LANES // lanes * rows, lanes), products_of_rows(lanes, rows)
    together, store = whole_registers(lanes, rows), finish_between(rows)

    @helper
    def multiply(weights, x, x_stride, inputs, bias, before, before_stride, to, to_stride):
        sums = start()
        for _ in range(0, inputs, STEP):
            sums = add_products(sums, weights, x, x_stride)
            weights, x = weights + LINE_BYTES * STEP, x + 4 * STEP
        store(together(sums), bias, before, before_stride, to, to_stride)

    return multiply


def turned_rows(isa: Isa):
    """Function: as that of `rows_over_range`, with a thread's working memory; returns how many rows it did: none where
    they are few or `area` is 0, else all but the last three at most."""
    multiply_6, multiply_4, turn = tile_of(isa.lanes, ROWS), tile_of(isa.lanes, 4), turn_group(isa)
    least_rows = spread_rows(isa, format_of("bf16"))

    @helper
    def over_rows(arguments, x, x_stride, block, row, last, first, count, area, kept):
        out_stride, in_features = parameter(arguments, LINEAR.out_row), parameter(arguments, LINEAR.in_features)
        while last - row >= 4:
            out, bias = outputs_of(arguments, block, row, first)
            before, before_stride = (kept, LINE_BYTES) if first else (out, out_stride)
            if first == 0 and parameter(arguments, LINEAR.accumulate) == 0:
                before = 0
            to, to_stride = (out, out_stride) if first + count == in_features else (kept, LINE_BYTES)
            left, from_x = last - row, x + row * x_stride + 4 * first
            size = ROWS if left >= ROWS and left != 8 else 4
            if size == ROWS:
                multiply_6(area, from_x, x_stride, count, bias, before, before_stride, to, to_stride)
            else:
                multiply_4(area, from_x, x_stride, count, bias, before, before_stride, to, to_stride)
            row, kept = row + size, kept + size * LINE_BYTES
        return row

    @helper
    def over_blocks(arguments, x, x_stride, weight, row, last, start, stop, area):
        in_features, sums, done = parameter(arguments, LINEAR.in_features), area + TURNED_BYTES, 0
        for first in range(0, in_features, TURNED_INPUTS):
            count = least(TURNED_INPUTS, in_features - first)
            for block in range(start, stop):
                w = block_of(arguments, weight, block) + 2 * first
                following = block_of(arguments, weight, block + 1) + 2 * first
                if block + 1 == stop and first + count < in_features:
                    following = block_of(arguments, weight, start) + 2 * (first + count)
                elif block + 1 == stop:
                    following -= 2 * first
                for at in range(0, count, GROUP):
                    turn(w + 2 * at, 2 * in_features, area + LINE_BYTES * at, following - w)
                kept = sums + (block - start) * MOST_ROWS * LINE_BYTES
                done = over_rows(arguments, x, x_stride, block, row, last, first, count, area, kept)
        return done

    @helper
    def multiply(arguments, x, x_stride, weight, place, rows, start, stop, area):
        if area == 0 or rows < least_rows or parameter(arguments, LINEAR.in_features) % GROUP:
            return 0
        turns, row = (rows + MOST_ROWS - 1) // MOST_ROWS, 0
        together = ((rows + turns - 1) // turns + ROWS - 1) // ROWS * ROWS
        while rows - row >= 4:
            first, last, done = place + row, place + least(rows, row + together), 0
            for block in range(start, stop, NUMBER_BLOCKS):
                end = least(stop, block + NUMBER_BLOCKS)
                done = over_blocks(arguments, x, x_stride, weight, first, last, block, end, area)
            row = done - place
        return row

    return multiply
