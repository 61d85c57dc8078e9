"""Ranges of blocks of coded weights times panels of rows: what the kernels of linear and expert_linear repeat."""

from collections.abc import Callable

from cpu_kernels.formats import GROUP_INPUTS, WeightFormat, format_of
from cpu_kernels.linear.panels.numbers import number_panels
from cpu_kernels.linear.panels.places import block_of, groups_of, outputs_of, record_of
from cpu_kernels.linear.panels.spread import spread_panels
from cpu_kernels.linear.records import panel_of
from cpu_kernels.linear.sizes import record_bytes, spread_rows
from cpu_kernels.team.arguments import LINEAR
from cpu_kernels.team.chunks import parameter
from cpu_kernels.vectors.compiler import helper
from cpu_kernels.vectors.isa import Isa
from cpu_kernels.vectors.scalar import least

PanelFactory = Callable[[Isa, WeightFormat, int], Callable]


@helper
def nothing_done(arguments, records, weight, place, rows, start, stop, area, first, count):
    """Of formats that are multiplied as they lie, however many rows there are."""
    return 0


def many_rows(isa: Isa, item: WeightFormat, tile: int, panel: PanelFactory, filled: int, goes_on: bool):
    """Function: rows that are done by what is made of codes once for all of them; it returns how many."""
    if tile == 1 or not spread_rows(isa, item):  # a kernel of one row meets no more
        return nothing_done
    if item.has_float_codes:
        return number_panels(isa, item, tile, filled, goes_on)
    return spread_panels(isa, item, tile, panel, filled)


def panels_over_range(isa: Isa, weight_dtype: str, tile: int, panel: PanelFactory, filled: int, goes_on: bool = False):
    """Function: a range of blocks times rows in panels of up to `tile`, piece after piece of the inputs.

    panel: makes the function (weight, record, groups, bias, out, out_stride, add_to, kept) of so many rows; goes_on:
    whether it begins with what is in `out` where add_to is 1, and does not add to it in the end. filled: as in
    `panel_of`. place: of the first row, in the records and in out. start, stop: blocks of `weight`. area: see
    `spread_area`. The call's words are those that both kinds of linear have.
    """
    item = format_of(weight_dtype)
    multiply_8, multiply_4, multiply_2, multiply_1 = (panel(isa, item, min(rows, tile)) for rows in (8, 4, 2, 1))
    over_many = many_rows(isa, item, tile, panel, filled, goes_on)
    superblock_bytes, together = item.superblock_bytes, item.group_inputs // GROUP_INPUTS
    row_bytes = record_bytes(item)

    @helper
    def multiply(arguments, records, weight, place, rows, start, stop, area):
        groups, out_stride = groups_of(arguments), parameter(arguments, LINEAR.out_row)
        piece = (parameter(arguments, LINEAR.piece) + GROUP_INPUTS - 1) // GROUP_INPUTS
        for first in range(0, groups, piece):
            count, add_to = least(piece, groups - first), 1 if first else parameter(arguments, LINEAR.accumulate)
            row = over_many(arguments, records, weight, place, rows, start, stop, area, first, count)
            while row < rows:
                size = panel_of(row, rows, tile, filled)[1]
                kept = least(size, rows - row)
                record = record_of(arguments, records, row_bytes, place + row, size, first)
                for block in range(start, stop):
                    w = block_of(arguments, weight, block) + first // together * superblock_bytes
                    to, bias = outputs_of(arguments, block, place + row, first)
                    if size == 8:
                        multiply_8(w, record, count, bias, to, out_stride, add_to, kept)
                    elif size == 4:
                        multiply_4(w, record, count, bias, to, out_stride, add_to, kept)
                    elif size == 2:
                        multiply_2(w, record, count, bias, to, out_stride, add_to, kept)
                    else:
                        multiply_1(w, record, count, bias, to, out_stride, add_to, kept)
                row += size

    return multiply
