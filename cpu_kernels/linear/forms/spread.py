"""Codes of less than a byte as bytes, which panels of many rows multiply in their place on 256 bits.

Each panel of four rows puts the planes of a word together again, with registers that its sums need. Codes are spread
once for all panels, a few blocks at a time, which stay in the second level of the cache; headers go with them, ready
where that can be (ready.py). The sums, and their bits, are the same.
"""

from dataclasses import replace

from numba import types

from cpu_kernels.formats import GROUP_INPUTS, LINE_BYTES, WeightFormat
from cpu_kernels.linear.forms.codes import code_words
from cpu_kernels.linear.forms.ready import ready_format, store_ready_header
from cpu_kernels.linear.sizes import SPREAD_PLANES
from cpu_kernels.vectors.code_sums import CodeSums
from cpu_kernels.vectors.compiler import helper
from cpu_kernels.vectors.isa import Isa
from cpu_kernels.vectors.vector import emits, intp, load_line, store_as, store_line

WORDS = GROUP_INPUTS // 4


def spread_format(item: WeightFormat) -> WeightFormat:
    """The format whose codes are bytes; of a table its entries, as sums take them."""
    return replace(ready_format(item), plane=SPREAD_PLANES[item.plane])


def group_spreader(isa: Isa, item: WeightFormat, lines_before: int):
    """Intrinsic (superblock, group, code lines, to): 64 inputs of a superblock; behind so many lines of a header."""
    sums = CodeSums(isa, item.largest_code)

    @emits(types.void, intp, intp, intp, intp)
    def spread_group(b, superblock, group, lines, to):
        if lines_before:
            store_ready_header(item, sums.takes_scales, b, superblock, group, to)
        word = code_words(isa, item, b, lines, sums.table(item.table))
        for k in range(WORDS):
            store_as(b, word(k), to, LINE_BYTES * (lines_before + k))

    return spread_group


def block_spreader(isa: Isa, item: WeightFormat):
    """Function (weight, groups, to): so many groups of 64 inputs of a block, from the start of a superblock on."""
    spread, together = spread_format(item), item.group_inputs // GROUP_INPUTS
    header_bytes, group_bytes = LINE_BYTES * item.header_lines, LINE_BYTES * item.code_lines
    is_copied = spread.header == item.header
    lines_before, copied_bytes = (0, header_bytes) if is_copied else (spread.header_lines, 0)
    spread_group, spread_bytes = group_spreader(isa, item, lines_before), LINE_BYTES * (lines_before + WORDS)

    @helper
    def spread_block(weight, groups, to):
        group = 0
        while group < groups:
            for line in range(0, copied_bytes, LINE_BYTES):
                store_line(load_line(weight + line), to + line)
            lines, to = weight + header_bytes, to + copied_bytes
            for inside in range(together):
                if group + inside < groups:
                    spread_group(weight, inside, lines, to)
                lines, to = lines + group_bytes, to + spread_bytes
            weight, group = lines, group + together

    return spread_block
