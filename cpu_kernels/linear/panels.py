"""Ranges of blocks of coded weights times panels of rows: what the kernels of linear and expert_linear repeat."""

from collections.abc import Callable

from cpu_kernels.formats import GROUP_INPUTS, LINE_BYTES, WeightFormat, format_of
from cpu_kernels.linear.forms.spread import block_spreader, spread_format
from cpu_kernels.linear.records import panel_of
from cpu_kernels.linear.sizes import RECORD_BYTES, SPREAD_BYTES, is_spread
from cpu_kernels.team.arguments import LINEAR
from cpu_kernels.team.chunks import parameter
from cpu_kernels.vectors.compiler import helper
from cpu_kernels.vectors.isa import Isa
from cpu_kernels.vectors.scalar import least

PanelFactory = Callable[[Isa, WeightFormat, int], Callable]


@helper
def spread_area(arguments, thread):
    """A thread's working memory for blocks whose codes are spread, SPREAD_BYTES; 0 where the call has too few rows."""
    offset = parameter(arguments, LINEAR.spread)
    return parameter(arguments, LINEAR.scratch) + offset + SPREAD_BYTES * thread if offset else 0


@helper
def place_of(arguments, block):
    """(bytes from the start of the weight to a block, bytes from the start of a row of outputs to its own)."""
    run = parameter(arguments, LINEAR.run)
    unit, inside = block // run, block % run
    weight = unit * parameter(arguments, LINEAR.weight_run) + inside * parameter(arguments, LINEAR.block_bytes)
    return weight, unit * parameter(arguments, LINEAR.out_run) + LINE_BYTES * inside


@helper
def nothing_spread(arguments, records, weight, place, rows, start, stop, area, first, count):
    """Of formats whose codes are never spread."""
    return 0


def spread_panels(isa: Isa, weight_dtype: str, tile: int, panel: PanelFactory, filled: int):
    """Function: as that of `panels_over_range` for the groups [first, first + count), of whole panels alone; returns
    their rows. None where `area` is 0."""
    item = format_of(weight_dtype)
    if not is_spread(isa, item):
        return nothing_spread
    spread, multiply = block_spreader(isa, item), panel(isa, spread_format(item), tile)
    together, superblock_bytes = item.group_inputs // GROUP_INPUTS, item.superblock_bytes
    spread_superblock_bytes = spread_format(item).superblock_bytes

    @helper
    def over_panels(arguments, records, weight, place, rows, start, stop, area, first, count):
        if area == 0 or panel_of(0, rows, tile, filled)[1] < tile:
            return 0
        bias, out, out_stride = (
            parameter(arguments, LINEAR.bias),
            parameter(arguments, LINEAR.out),
            parameter(arguments, LINEAR.out_row),
        )
        groups = (parameter(arguments, LINEAR.in_features) + GROUP_INPUTS - 1) // GROUP_INPUTS
        add_to = 1 if first else parameter(arguments, LINEAR.accumulate)
        block_bytes = (count + together - 1) // together * spread_superblock_bytes
        at_once, done = SPREAD_BYTES // block_bytes, 0
        for begin in range(start, stop, at_once):
            end, done = least(stop, begin + at_once), 0
            for block in range(begin, end):
                source = weight + place_of(arguments, block)[0] + first // together * superblock_bytes
                spread(source, count, area + (block - begin) * block_bytes)
            while done < rows and panel_of(done, rows, tile, filled)[1] == tile:
                record = records + ((place + done) * groups + tile * first) * RECORD_BYTES
                for block in range(begin, end):
                    column = place_of(arguments, block)[1]
                    to = out + (place + done) * out_stride + column
                    offset = bias + column if bias and first == 0 else 0
                    w = area + (block - begin) * block_bytes
                    multiply(w, record, count, offset, to, out_stride, add_to, least(tile, rows - done))
                done += tile
        return done

    return over_panels


def panels_over_range(isa: Isa, weight_dtype: str, tile: int, panel: PanelFactory, filled: int):
    """Function: a range of blocks times rows in panels of up to `tile`, piece after piece of the inputs.

    panel: makes the function (weight, record, groups, bias, out, out_stride, add_to, kept) of so many rows. filled:
    as in `panel_of`. place: of the first row, in the records and in out. start, stop: blocks of `weight`. area: see
    `spread_area`. The call's words are those that both kinds of linear have.
    """
    item = format_of(weight_dtype)
    multiply_8, multiply_4, multiply_2, multiply_1 = (panel(isa, item, min(rows, tile)) for rows in (8, 4, 2, 1))
    over_spread = spread_panels(isa, weight_dtype, tile, panel, filled)
    superblock_bytes, together = item.superblock_bytes, item.group_inputs // GROUP_INPUTS

    @helper
    def multiply(arguments, records, weight, place, rows, start, stop, area):
        bias, out, out_stride = (
            parameter(arguments, LINEAR.bias),
            parameter(arguments, LINEAR.out),
            parameter(arguments, LINEAR.out_row),
        )
        groups = (parameter(arguments, LINEAR.in_features) + GROUP_INPUTS - 1) // GROUP_INPUTS
        piece = (parameter(arguments, LINEAR.piece) + GROUP_INPUTS - 1) // GROUP_INPUTS
        for first in range(0, groups, piece):
            count, add_to = least(piece, groups - first), 1 if first else parameter(arguments, LINEAR.accumulate)
            row = over_spread(arguments, records, weight, place, rows, start, stop, area, first, count)
            while row < rows:
                size = panel_of(row, rows, tile, filled)[1]
                kept = least(size, rows - row)
                record = records + ((place + row) * groups + size * first) * RECORD_BYTES
                for block in range(start, stop):
                    from_weight, column = place_of(arguments, block)
                    w = weight + from_weight + first // together * superblock_bytes
                    to = out + (place + row) * out_stride + column
                    offset = bias + column if bias and first == 0 else 0
                    if size == 8:
                        multiply_8(w, record, count, offset, to, out_stride, add_to, kept)
                    elif size == 4:
                        multiply_4(w, record, count, offset, to, out_stride, add_to, kept)
                    elif size == 2:
                        multiply_2(w, record, count, offset, to, out_stride, add_to, kept)
                    else:
                        multiply_1(w, record, count, offset, to, out_stride, add_to, kept)
                row += size

    return multiply
