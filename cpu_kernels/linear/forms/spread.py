"""Codes as bytes, or as magnitudes and flips, which panels of many rows multiply in their place on 256 bits.

Each panel of four rows puts the planes of a word together again, with registers that its sums need. Codes are spread
once for all panels, a few blocks at a time, which stay in the second level of the cache; headers go with them, ready
where that can be (ready.py). The sums, and their bits, are the same.
"""

from dataclasses import replace

from numba import types

from cpu_kernels.formats import GROUP_INPUTS, LINE_BYTES, WeightFormat
from cpu_kernels.linear.forms.codes import code_words
from cpu_kernels.linear.forms.flips import WORDS, store_flips
from cpu_kernels.linear.forms.ready import ready_format, store_ready_header
from cpu_kernels.linear.sizes import FLIPPED_PLANES, spread_plane
from cpu_kernels.vectors.code_sums import CodeSums
from cpu_kernels.vectors.compiler import helper
from cpu_kernels.vectors.isa import Isa
from cpu_kernels.vectors.vector import I64, emits, intp, load_line, store_as, store_line


def spread_format(isa: Isa, item: WeightFormat) -> WeightFormat:
    """The format whose codes are bytes, of a table its entries, as sums take them; or what flips.py makes of them."""
    return replace(ready_format(item), plane=spread_plane(isa, item))


def group_spreader(isa: Isa, item: WeightFormat, lines_before: int):
    """Intrinsic (superblock, group, code lines, to): 64 inputs of a superblock; behind so many lines of a header."""
    sums, are_flips = CodeSums(isa, item.largest_code), spread_plane(isa, item) in FLIPPED_PLANES.values()
    are_pairs = CodeSums(isa, item.largest_code, are_flips).takes_scales

    @emits(types.void, intp, intp, intp, intp)
    def spread_group(b, superblock, group, lines, to):
        if lines_before:
            store_ready_header(item, are_pairs, b, superblock, group, to)
        word = code_words(isa, item, b, lines, sums.table(item.table))
        if are_flips:
            store_flips(isa, item, b, word, b.add(to, I64(LINE_BYTES * lines_before)))
        else:
            for k in range(WORDS):
                store_as(b, word(k), to, LINE_BYTES * (lines_before + k))

    return spread_group


def block_spreader(isa: Isa, item: WeightFormat):
    """Function (weight, groups, to): so many groups of 64 inputs of a block, from the start of a superblock on."""
    spread, together = spread_format(isa, item), item.group_inputs // GROUP_INPUTS
    header_bytes, group_bytes = LINE_BYTES * item.header_lines, LINE_BYTES * item.code_lines
    is_copied = spread.header == item.header
    lines_before, copied_bytes = (0, header_bytes) if is_copied else (spread.header_lines, 0)
    spread_group = group_spreader(isa, item, lines_before)
    spread_bytes = LINE_BYTES * (lines_before + spread.code_lines)

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
