"""The lines of a coded weight before they are used: asked for ahead, or read in the order in which they lie."""

from numba import types

from cpu_kernels.formats import LINE_BYTES, WeightFormat
from cpu_kernels.vectors.isa import Isa
from cpu_kernels.vectors.scalar import read_and_drop
from cpu_kernels.vectors.vector import emits, intp, prefetch_value

SPLIT_PLANES = ("u5", "u6")  # whose upper bits lie behind the nibbles and are used beside them


def line_leader(isa: Isa, rows: int, ahead_bytes: int):
    """Function (b, address, lines): ask for the lines `ahead_bytes` behind those at an address, or, on x86, where one
    row asks for none, read these in order.

    The CPU's own streams go ahead of lines that are met in the order of memory: where a word takes a line of nibbles
    and then one of upper bits, a Zen 4 reads q6_k at 67 % of a sweep, in order at 87 %.
    """
    reads = rows == 1 and (isa.has_avx2 or isa.has_avx512)

    def lead(b, address, lines: int) -> None:
        for line in range(lines):
            if ahead_bytes:
                prefetch_value(b, address, ahead_bytes + LINE_BYTES * line)
            elif reads:
                read_and_drop(b, address, LINE_BYTES * line)

    return lead


def code_leader(isa: Isa, item: WeightFormat, rows: int, ahead_bytes: int):
    """Function (b, code lines): `line_leader` of 64 inputs; planes that are not split are read in order anyway."""
    lead, lines = line_leader(isa, rows, ahead_bytes), item.code_lines
    return lambda b, address: lead(b, address, lines if ahead_bytes or item.plane in SPLIT_PLANES else 0)


def header_leader(isa: Isa, item: WeightFormat, rows: int, ahead_bytes: int):
    """Intrinsic (superblock): `line_leader` of its header, whose scales are used group by group."""
    lead = line_leader(isa, rows, ahead_bytes)

    @emits(types.void, intp)
    def lead_header(b, superblock):
        lead(b, superblock, item.header_lines)

    return lead_header
