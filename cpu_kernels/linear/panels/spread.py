"""Whole panels of many rows times blocks whose codes are spread to bytes first; see forms/spread.py."""

from collections.abc import Callable

from cpu_kernels.formats import GROUP_INPUTS, WeightFormat
from cpu_kernels.linear.forms.spread import block_spreader, spread_format
from cpu_kernels.linear.panels.places import block_of, outputs_of, record_of
from cpu_kernels.linear.records import panel_of
from cpu_kernels.linear.sizes import SPREAD_BYTES, record_bytes
from cpu_kernels.team.arguments import LINEAR
from cpu_kernels.team.chunks import parameter
from cpu_kernels.vectors.compiler import helper
from cpu_kernels.vectors.isa import Isa
from cpu_kernels.vectors.scalar import least


def spread_panels(isa: Isa, item: WeightFormat, tile: int, panel: Callable, filled: int):
    """Function: as that of `panels_over_range` for the groups [first, first + count), of whole panels alone; returns
    their rows. None where `area` is 0."""
    spread, multiply = block_spreader(isa, item), panel(isa, spread_format(isa, item), tile)
    together, superblock_bytes = item.group_inputs // GROUP_INPUTS, item.superblock_bytes
    spread_superblock_bytes, row_bytes = spread_format(isa, item).superblock_bytes, record_bytes(item)
    spread_together = spread_format(isa, item).group_inputs // GROUP_INPUTS

    @helper
    def over_panels(arguments, records, weight, place, rows, start, stop, area, first, count):
        if area == 0 or panel_of(0, rows, tile, filled)[1] < tile:
            return 0
        add_to = 1 if first else parameter(arguments, LINEAR.accumulate)
        block_bytes = (count + spread_together - 1) // spread_together * spread_superblock_bytes
        at_once, done, out_stride = SPREAD_BYTES // block_bytes, 0, parameter(arguments, LINEAR.out_row)
        for begin in range(start, stop, at_once):
            end, done = least(stop, begin + at_once), 0
            for block in range(begin, end):
                source = block_of(arguments, weight, block) + first // together * superblock_bytes
                spread(source, count, area + (block - begin) * block_bytes)
            while done < rows and panel_of(done, rows, tile, filled)[1] == tile:
                record = record_of(arguments, records, row_bytes, place + done, tile, first)
                for block in range(begin, end):
                    to, bias = outputs_of(arguments, block, place + done, first)
                    w = area + (block - begin) * block_bytes
                    multiply(w, record, count, bias, to, out_stride, add_to, least(tile, rows - done))
                done += tile
        return done

    return over_panels
