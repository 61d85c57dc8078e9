"""Codes that are numbers as float32, made once for many rows, and the register tile that multiplies them.

A panel of four rows makes float32 of a word's codes anew, which takes longer than its products. Here numbers of a few
groups of 64 inputs are made once for all rows and stay in the first level of the cache while panels of six rows pass:
every input's 16 numbers times six inputs spread from memory, six registers of sums or, of 256 bits, 12. The sums, and
their bits, are those of a panel of four rows.

  numbers of a group   the scales of its runs of inputs, a line each; then 64 lines, an input's number of 16 features
  inputs of a group    a line with the scales of six rows; then the 64 inputs of each row, float32
"""

from llvmlite import ir
from numba import types

from cpu_kernels.formats import BLOCK_FEATURES, GROUP_INPUTS, LINE_BYTES, WeightFormat
from cpu_kernels.linear.forms.codes import code_words
from cpu_kernels.linear.forms.float_codes import numbers_of_word, unit_of
from cpu_kernels.vectors.compiler import helper, inlined
from cpu_kernels.vectors.isa import Isa
from cpu_kernels.vectors.tiles import zeros
from cpu_kernels.vectors.vector import (
    F32,
    I64,
    VF32,
    VI8,
    constant,
    emits,
    float_vector,
    fma_value,
    intp,
    load_as,
    splat_value,
    store_as,
)

ROWS = 6  # of a tile; a second one has four
ROW_BYTES = 4 * GROUP_INPUTS  # of a row of inputs
INPUT_BYTES = LINE_BYTES + ROWS * ROW_BYTES  # of a group of inputs
STEP = 8  # inputs of one turn of the loop


def runs_of(item: WeightFormat) -> int:
    """Runs of a group's inputs that have a scale of their own."""
    return 2 if item.header == "F32" else 1


def number_bytes(item: WeightFormat) -> int:
    """Bytes of the numbers of a group."""
    return (runs_of(item) + GROUP_INPUTS) * LINE_BYTES


@helper
def tile_rows(rows):
    """Rows of the next tile of so many: 6, or 4 where those leave fewer rows of the last tile without work."""
    return 4 if rows <= 4 or rows == 7 or rows == 8 else ROWS


def number_spreader(isa: Isa, item: WeightFormat):
    """Function (weight, group, groups, to): the numbers of so many groups of a block, from `group` on."""
    together, group_bytes, runs = item.group_inputs // GROUP_INPUTS, item.code_lines * LINE_BYTES, runs_of(item)
    superblock_bytes, header_bytes, to_bytes = item.superblock_bytes, item.header_lines * LINE_BYTES, number_bytes(item)

    @emits(types.void, intp, intp, intp)
    def spread_group(b, superblock, lines, to):
        for run in range(runs):
            store_as(b, load_as(b, superblock, VF32, LINE_BYTES * run), to, LINE_BYTES * run)
        word = code_words(isa, item, b, lines, ())
        for k in range(GROUP_INPUTS // 4):
            for place, number in enumerate(numbers_of_word(isa, item, b, word(k))):
                store_as(b, number, to, LINE_BYTES * (runs + 4 * k + place))

    @helper
    def spread(weight, group, groups, to):
        for each in range(group, group + groups):
            superblock = weight + each // together * superblock_bytes
            spread_group(superblock, superblock + header_bytes + each % together * group_bytes, to)
            to += to_bytes

    return spread


def input_spreader(item: WeightFormat):
    """Intrinsic (codes, scale, row, to_scale): 64 int8 of a record as a row of inputs, and their scale to its place."""
    unit = unit_of(item)

    @emits(types.void, intp, intp, intp, intp)
    def spread_row(b, codes, scale, row, to_scale):
        store_as(b, load_as(b, scale, F32), to_scale)
        for at in range(0, GROUP_INPUTS, 16):
            inputs = b.fmul(b.sitofp(load_as(b, codes, VI8, at), VF32), constant(VF32, unit))
            store_as(b, inputs, row, 4 * at)

    return spread_row


def _with_products(b, dots, numbers, rows_at, lanes: int):
    """dots + numbers * inputs, STEP of them; rows_at: where each row's inputs are."""
    parts, rows, vector = BLOCK_FEATURES // lanes, len(rows_at), ir.VectorType(F32, lanes)
    sums = [b.extract_value(dots, index) for index in range(parts * rows)]
    for at in range(STEP):
        line = [load_as(b, numbers, vector, LINE_BYTES * at + 4 * lanes * part) for part in range(parts)]
        for row, (address, offset) in enumerate(rows_at):
            x = splat_value(b, load_as(b, address, F32, offset + 4 * at), lanes)
            for index, number in enumerate(line, parts * row):
                sums[index] = fma_value(b, number, x, sums[index])
    for index, value in enumerate(sums):
        dots = b.insert_value(dots, value, index)
    return dots


def products_of(lanes: int, rows: int):
    """Intrinsic (dots, numbers, inputs) -> dots: STEP inputs; a row has one register or two in turn."""
    tile = types.UniTuple(float_vector(lanes), BLOCK_FEATURES // lanes * rows)

    @emits(tile, tile, intp, intp)
    def add_products(b, dots, numbers, inputs):
        return _with_products(b, dots, numbers, [(inputs, ROW_BYTES * row) for row in range(rows)], lanes)

    return add_products


def products_of_rows(lanes: int, rows: int):
    """Intrinsic (dots, numbers, inputs, stride) -> dots: as `products_of`, of rows that lie `stride` bytes apart."""
    tile = types.UniTuple(float_vector(lanes), BLOCK_FEATURES // lanes * rows)

    @emits(tile, tile, intp, intp, intp)
    def add_products(b, dots, numbers, inputs, stride):
        addresses = [b.add(inputs, b.mul(stride, ir.Constant(I64, row))) for row in range(rows)]
        return _with_products(b, dots, numbers, [(address, 0) for address in addresses], lanes)

    return add_products


def scaled_sums(lanes: int, rows: int):
    """Intrinsics: (dots, scales) -> dots * scales; (dots, scales, totals) -> totals + that; (totals, factors, sums),
    which adds totals, each row times its factor, to the rows of `sums`."""
    parts, vector = BLOCK_FEATURES // lanes, float_vector(lanes)
    tile = types.UniTuple(vector, parts * rows)

    @emits(tile, tile, intp)
    def scaled(b, dots, scales):
        for index in range(parts * rows):
            scale = load_as(b, scales, vector.be_type, 4 * lanes * (index % parts))
            dots = b.insert_value(dots, b.fmul(b.extract_value(dots, index), scale), index)
        return dots

    @emits(tile, tile, intp, tile)
    def with_scaled(b, dots, scales, totals):
        for index in range(parts * rows):
            scale = load_as(b, scales, vector.be_type, 4 * lanes * (index % parts))
            value = fma_value(b, b.extract_value(dots, index), scale, b.extract_value(totals, index))
            totals = b.insert_value(totals, value, index)
        return totals

    @emits(types.void, tile, intp, intp)
    def add_to_sums(b, totals, factors, sums):
        for index in range(parts * rows):
            row, at = index // parts, 4 * lanes * index
            factor = splat_value(b, load_as(b, factors, F32, 4 * row), lanes)
            total, so_far = b.extract_value(totals, index), load_as(b, sums, vector.be_type, at)
            store_as(b, fma_value(b, total, factor, so_far), sums, at)

    return scaled, with_scaled, add_to_sums


def number_tile(isa: Isa, item: WeightFormat, rows: int):
    """Function (numbers, inputs, groups, sums): adds so many groups of 16 features times `rows` rows to their sums."""
    lanes = isa.lanes
    start, add_products = zeros(BLOCK_FEATURES // lanes * rows, lanes), products_of(lanes, rows)
    scaled, with_scaled, add_to_sums = scaled_sums(lanes, rows)
    runs, run, to_next = runs_of(item), GROUP_INPUTS // runs_of(item), number_bytes(item)

    @inlined
    def dots_of(numbers, inputs):
        dots = start()
        for at in range(0, run, STEP):
            dots = add_products(dots, numbers + LINE_BYTES * at, inputs + 4 * at)
        return dots

    @helper
    def multiply(numbers, inputs, groups, sums):
        for _ in range(groups):
            first, rows_at = numbers + LINE_BYTES * runs, inputs + LINE_BYTES
            totals = scaled(dots_of(first, rows_at), numbers)
            if runs == 2:
                dots = dots_of(first + LINE_BYTES * run, rows_at + 4 * run)
                totals = with_scaled(dots, numbers + LINE_BYTES, totals)
            add_to_sums(totals, inputs, sums)
            numbers, inputs = numbers + to_next, inputs + INPUT_BYTES

    return multiply
