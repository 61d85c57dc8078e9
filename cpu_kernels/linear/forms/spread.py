"""Codes of less than a byte as bytes, which panels of many rows multiply in their place on 256 bits.

Each panel of four rows puts the planes of a word together again, with registers that its sums need. Codes are spread
once for all panels, a few blocks at a time, which stay in the second level of the cache; headers go with them. The
sums, and their bits, are the same.
"""

from dataclasses import replace

from numba import types

from cpu_kernels.formats import GROUP_INPUTS, LINE_BYTES, WeightFormat
from cpu_kernels.linear.forms.codes import code_words
from cpu_kernels.linear.sizes import SPREAD_PLANES
from cpu_kernels.vectors.code_sums import CodeSums
from cpu_kernels.vectors.compiler import helper
from cpu_kernels.vectors.isa import Isa
from cpu_kernels.vectors.vector import emits, intp, load_line, store_as, store_line

WORDS = GROUP_INPUTS // 4


def spread_format(item: WeightFormat) -> WeightFormat:
    """The format whose codes are bytes; of a table its entries, as sums take them."""
    return replace(item, plane=SPREAD_PLANES[item.plane])


def block_spreader(isa: Isa, item: WeightFormat):
    """Function (weight, groups, to): so many groups of 64 inputs of a block, from the start of a superblock on."""
    table = CodeSums(isa, item.largest_code).table(item.table)
    header_lines, together = item.header_lines, item.group_inputs // GROUP_INPUTS
    group_bytes, spread_bytes = item.code_lines * LINE_BYTES, WORDS * LINE_BYTES

    @emits(types.void, intp, intp)
    def spread_group(b, lines, to):
        word = code_words(isa, item, b, lines, table)
        for k in range(WORDS):
            store_as(b, word(k), to, LINE_BYTES * k)

    @helper
    def spread_block(weight, groups, to):
        group = 0
        while group < groups:
            for _ in range(header_lines):
                store_line(load_line(weight), to)
                weight, to = weight + LINE_BYTES, to + LINE_BYTES
            for inside in range(together):
                if group + inside < groups:
                    spread_group(weight, to)
                weight, to = weight + group_bytes, to + spread_bytes
            group += together

    return spread_block
