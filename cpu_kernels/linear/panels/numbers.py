"""Many rows times blocks whose codes are numbers, which are made float32 first; see forms/number_tiles.py.

A thread goes through some blocks and at most MOST_ROWS rows together, GROUPS groups of inputs at a time: their inputs
are made float32 once for all blocks, the numbers of one block after another once for all rows. The sums so far lie in
its working memory, behind both.
"""

from cpu_kernels.formats import GROUP_INPUTS, LINE_BYTES, WeightFormat
from cpu_kernels.linear.forms.number_tiles import (
    INPUT_BYTES,
    ROW_BYTES,
    ROWS,
    input_spreader,
    number_bytes,
    number_spreader,
    number_tile,
    tile_rows,
)
from cpu_kernels.linear.panels.places import block_of, outputs_of, record_of
from cpu_kernels.linear.records import panel_of
from cpu_kernels.linear.sizes import NUMBER_BLOCKS, SPREAD_BYTES, record_bytes
from cpu_kernels.team.arguments import LINEAR
from cpu_kernels.team.chunks import parameter
from cpu_kernels.vectors.compiler import helper
from cpu_kernels.vectors.isa import Isa
from cpu_kernels.vectors.scalar import least
from cpu_kernels.vectors.tiles import finish_features, sums_so_far

GROUPS = 2  # of inputs at once: their numbers take a quarter of the first level
MOST_ROWS = 180
TILE_BYTES = GROUPS * INPUT_BYTES  # of the inputs of a tile
SUM_BYTES = LINE_BYTES * MOST_ROWS  # of the sums of a block
INPUTS_AT = SPREAD_BYTES - NUMBER_BLOCKS * SUM_BYTES - MOST_ROWS // ROWS * TILE_BYTES
SUMS_AT = SPREAD_BYTES - NUMBER_BLOCKS * SUM_BYTES


def input_panels(item: WeightFormat, tile: int, filled: int):
    """Function: rows [row, last) as inputs of tiles, of so many groups; a last tile that they do not fill repeats the
    last row. tile, filled: of the panels of records."""
    spread_row, row_bytes = input_spreader(item), record_bytes(item)

    @helper
    def fill_row(record, offset, size, groups, to, row):
        codes, scale = record + GROUP_INPUTS * offset, record + GROUP_INPUTS * size + 4 * offset
        for _ in range(groups):
            to_codes, to_scale = to + LINE_BYTES + ROW_BYTES * row, to + 4 * row
            spread_row(codes, scale, to_codes, to_scale)
            codes, scale, to = codes + size * row_bytes, scale + size * row_bytes, to + INPUT_BYTES

    @helper
    def fill(arguments, records, place, rows, row, last, group, groups, to):
        while row < last:
            count = tile_rows(last - row)
            for each in range(count):
                own = least(row + each, last - 1)
                panel, size = panel_of(own, rows, tile, filled)
                record = record_of(arguments, records, row_bytes, place + panel, size, group)
                fill_row(record, own - panel, size, groups, to, each)
            row, to = row + count, to + TILE_BYTES

    return fill


def sums_of_rows(goes_on: bool):
    """Functions (arguments, block, row, last, first, sums): begin the sums of a block, and bring them to `out`."""
    so_far, store = sums_so_far(1), finish_features(1)

    @helper
    def begin(arguments, block, row, last, first, sums):
        wanted = 1 if goes_on and (first or parameter(arguments, LINEAR.accumulate)) else 0
        for each in range(row, last):
            out, _ = outputs_of(arguments, block, each, first)
            store(so_far(out, 0, wanted), 0, sums, 0, 0, 1)
            sums += LINE_BYTES

    @helper
    def bring(arguments, block, row, last, first, sums):
        add_to = 0 if goes_on else 1 if first else parameter(arguments, LINEAR.accumulate)
        for each in range(row, last):
            out, bias = outputs_of(arguments, block, each, first)
            store(so_far(sums, 0, 1), bias, out, 0, add_to, 1)
            sums += LINE_BYTES

    return begin, bring


def tiles_of(isa: Isa, item: WeightFormat):
    """Function (numbers, inputs, groups, sums, rows): as `number_tile`, of any number of rows."""
    multiply_6, multiply_4 = number_tile(isa, item, ROWS), number_tile(isa, item, 4)

    @helper
    def multiply(numbers, inputs, groups, sums, rows):
        while rows > 0:
            count = tile_rows(rows)
            if count == 4:
                multiply_4(numbers, inputs, groups, sums)
            else:
                multiply_6(numbers, inputs, groups, sums)
            inputs, sums, rows = inputs + TILE_BYTES, sums + LINE_BYTES * count, rows - count

    return multiply


def rows_times_blocks(isa: Isa, item: WeightFormat, tile: int, filled: int, goes_on: bool):
    """Function: rows [row, last) times blocks [begin, end), as many as working memory holds."""
    fill, multiply, spread = input_panels(item, tile, filled), tiles_of(isa, item), number_spreader(isa, item)
    begin_sums, bring = sums_of_rows(goes_on)
    assert GROUPS * number_bytes(item) <= INPUTS_AT

    @helper
    def over_blocks(arguments, records, weight, place, rows, row, last, begin, end, area, first, count):
        inputs, sums = area + INPUTS_AT, area + SUMS_AT
        for block in range(begin, end):
            begin_sums(arguments, block, place + row, place + last, first, sums + (block - begin) * SUM_BYTES)
        for group in range(first, first + count, GROUPS):
            groups = least(GROUPS, first + count - group)
            fill(arguments, records, place, rows, row, last, group, groups, inputs)
            for block in range(begin, end):
                spread(block_of(arguments, weight, block), group, groups, area)
                multiply(area, inputs, groups, sums + (block - begin) * SUM_BYTES, last - row)
        for block in range(begin, end):
            bring(arguments, block, place + row, place + last, first, sums + (block - begin) * SUM_BYTES)

    return over_blocks


def number_panels(isa: Isa, item: WeightFormat, tile: int, filled: int, goes_on: bool):
    """Function: as that of `panels_over_range` for the groups [first, first + count) of all rows, whose number it
    returns; of none where `area` is 0."""
    multiply = rows_times_blocks(isa, item, tile, filled, goes_on)

    @helper
    def over_panels(arguments, records, weight, place, rows, start, stop, area, first, count):
        if area == 0:
            return 0
        turns = (rows + MOST_ROWS - 1) // MOST_ROWS
        together = ((rows + turns - 1) // turns + ROWS - 1) // ROWS * ROWS
        for begin in range(start, stop, NUMBER_BLOCKS):
            end = least(stop, begin + NUMBER_BLOCKS)
            for row in range(0, rows, together):
                last = least(rows, row + together)
                multiply(arguments, records, weight, place, rows, row, last, begin, end, area, first, count)
        return rows

    return over_panels
