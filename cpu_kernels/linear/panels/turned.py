"""Many rows times row-major bf16 on 256 bits: a block's weights are turned first, so that its features are the lanes.

Along the inputs every panel of rows widens the weights anew and adds up lanes for every output. Turned, TURNED_INPUTS
of a block at a time, they are widened once for all rows, and a tile of 16 features by six rows multiplies them with
inputs spread from memory, as numbers of codes are (forms/number_tiles.py).

  turned weights   of every 32 inputs a line with the 16 features of each even one, then of each odd one: the order in
                   which inputs are kept where the CPU cannot multiply bf16
"""

from llvmlite import ir
from numba import types

from cpu_kernels.formats import BLOCK_FEATURES, LINE_BYTES
from cpu_kernels.linear.forms.number_tiles import ROWS, STEP, products_of_rows
from cpu_kernels.linear.panels.places import block_of, outputs_of
from cpu_kernels.linear.sizes import TURNED_INPUTS, TURNED_ROWS
from cpu_kernels.team.arguments import LINEAR
from cpu_kernels.team.chunks import parameter
from cpu_kernels.vectors.compiler import helper
from cpu_kernels.vectors.dot import high_halves, low_halves
from cpu_kernels.vectors.scalar import least
from cpu_kernels.vectors.tiles import finish_features, zeros
from cpu_kernels.vectors.vector import (
    I32,
    I64,
    VF32,
    F32x8,
    F32x16,
    emits,
    intp,
    load_as,
    picked,
    prefetch_value,
    store_as,
)

LANES, GROUP = 8, 32  # features of a register, inputs turned together
MOST_ROWS = 384  # whose inputs stay in the second level while blocks pass
PAIR_BYTES = 4  # of an even input and the odd one behind it


def _four_pairs(b, rows):
    """Four pairs of inputs of eight features: a register a pair; rows: those of one feature each, <4 x i32>."""
    both = [picked(b, rows[f], rows[f + 4], list(range(8))) for f in range(4)]
    low = [picked(b, *both[at : at + 2], [0, 8, 1, 9, 4, 12, 5, 13]) for at in (0, 2)]
    high = [picked(b, *both[at : at + 2], [2, 10, 3, 11, 6, 14, 7, 15]) for at in (0, 2)]
    lanes = [0, 1, 8, 9, 4, 5, 12, 13], [2, 3, 10, 11, 6, 7, 14, 15]
    return [picked(b, *halves, each) for halves in (low, high) for each in lanes]


@emits(types.void, intp, intp, intp, intp)
def turn_group(b, weight, w_stride, to, ahead):
    """32 inputs of 16 features, as float32; asks for those `ahead` bytes on."""
    features = [b.add(weight, b.mul(w_stride, I64(f))) for f in range(BLOCK_FEATURES)]
    for address in features:
        prefetch_value(b, b.add(address, ahead))
    four = ir.VectorType(I32, 4)
    for first in range(0, BLOCK_FEATURES, LANES):
        for pair in range(0, GROUP // 2, 4):
            rows = [load_as(b, address, four, PAIR_BYTES * pair) for address in features[first : first + LANES]]
            for place, lanes in enumerate(_four_pairs(b, rows), pair):
                store_as(b, low_halves(b, lanes), to, LINE_BYTES * place + 4 * first)
                store_as(b, high_halves(b, lanes), to, LINE_BYTES * (GROUP // 2 + place) + 4 * first)


def tile_of(rows: int):
    """Function (weights, x, x_stride, inputs, bias, out, out_stride, add_to): 16 turned features times `rows` rows."""
    halves, whole = types.UniTuple(F32x8, 2 * rows), types.UniTuple(F32x16, rows)
    start, add_products, store = zeros(2 * rows, LANES), products_of_rows(LANES, rows), finish_features(rows)

    @emits(whole, halves)
    def together(b, sums):
        value = ir.Constant(ir.ArrayType(VF32, rows), ir.Undefined)
        for row in range(rows):
            parts = (b.extract_value(sums, 2 * row + part) for part in range(2))
            value = b.insert_value(value, picked(b, *parts, list(range(2 * LANES))), row)
        return value

    @helper
    def multiply(weights, x, x_stride, inputs, bias, out, out_stride, add_to):
        sums = start()
        for _ in range(0, inputs, STEP):
            sums = add_products(sums, weights, x, x_stride)
            weights, x = weights + LINE_BYTES * STEP, x + 4 * STEP
        store(together(sums), bias, out, out_stride, add_to, rows)

    return multiply


def turned_rows():
    """Function: as that of `rows_over_range`, with a thread's working memory; returns how many rows it did: none where
    they are few or `area` is 0, else all but the last three at most."""
    multiply_6, multiply_4 = tile_of(ROWS), tile_of(4)

    @helper
    def over_rows(arguments, x, x_stride, block, row, last, first, count, area):
        out_stride = parameter(arguments, LINEAR.out_row)
        add_to = 1 if first else parameter(arguments, LINEAR.accumulate)
        while last - row >= 4:
            out, bias = outputs_of(arguments, block, row, first)
            from_x = x + row * x_stride + 4 * first
            if last - row >= ROWS and last - row != 8:
                multiply_6(area, from_x, x_stride, count, bias, out, out_stride, add_to)
                row += ROWS
            else:
                multiply_4(area, from_x, x_stride, count, bias, out, out_stride, add_to)
                row += 4
        return row

    @helper
    def over_blocks(arguments, x, x_stride, weight, row, last, start, stop, area):
        in_features, done = parameter(arguments, LINEAR.in_features), 0
        for first in range(0, in_features, TURNED_INPUTS):
            count = least(TURNED_INPUTS, in_features - first)
            for block in range(start, stop):
                w = block_of(arguments, weight, block) + 2 * first
                following = block_of(arguments, weight, block + 1) + 2 * first
                if block + 1 == stop:
                    following = block_of(arguments, weight, start) + 2 * (first + count)
                for at in range(0, count, GROUP):
                    turn_group(w + 2 * at, 2 * in_features, area + LINE_BYTES * at, following - w)
                done = over_rows(arguments, x, x_stride, block, row, last, first, count, area)
        return done

    @helper
    def multiply(arguments, x, x_stride, weight, place, rows, start, stop, area):
        if area == 0 or rows < TURNED_ROWS or parameter(arguments, LINEAR.in_features) % GROUP:
            return 0
        turns, row = (rows + MOST_ROWS - 1) // MOST_ROWS, 0
        together = ((rows + turns - 1) // turns + ROWS - 1) // ROWS * ROWS
        while rows - row >= 4:
            last = least(rows, row + together)
            row = over_blocks(arguments, x, x_stride, weight, place + row, place + last, start, stop, area) - place
        return row

    return multiply
