"""Coded rows of a file into the blocks of formats/base.py, exactly: codes move, scales are copied, nothing is rounded.

Sixteen rows go side by side, a superblock at a time: its bytes are laid on a stage, where each dword of all features is
a register, and from there every line of the packed block is made and stored whole.
"""

from numba import types

from cpu_kernels.formats import GROUP_INPUTS, LINE_BYTES, SOURCE_TYPES, format_of
from cpu_kernels.linear.repacking.lanes import (
    DWORD_BYTES,
    QUAD,
    Lanes,
    Stage,
    Superblock,
    stage_dword,
    stage_last,
    stage_memory,
    stage_quad,
)
from cpu_kernels.linear.repacking.source_blocks import BITS, KERNEL_SOURCES, NIBBLES, PAIRS, blocks_together
from cpu_kernels.linear.row_blocks import over_blocks
from cpu_kernels.vectors.compiler import helper
from cpu_kernels.vectors.scalar import least, store_i64
from cpu_kernels.vectors.vector import emits, intp

GROUP_WORDS = GROUP_INPUTS // 4
QUAD_BYTES = QUAD * DWORD_BYTES


def nibble_lines(words: list[Lanes], out: Superblock, at: int) -> None:
    """Eight lines of the low four bits of 16 words, which are the codes of 64 inputs."""
    for line in range(8):
        low, high = words[2 * line], words[2 * line + 1]
        out.words(low & NIBBLES | (high & NIBBLES) << 4, at + LINE_BYTES * line)


def fifth_bits(words: list[Lanes], out: Superblock, at: int) -> None:
    """Two lines of the fifth bits of 16 words."""
    for half in range(2):
        bits = words[0] & 0
        for place in range(8):
            bits = bits | (words[8 * half + place] >> 4 & BITS) << place
        out.words(bits, at + LINE_BYTES * half)


def upper_pairs(words: list[Lanes], out: Superblock, at: int) -> None:
    """Four lines of bits 4 and 5 of 16 words."""
    for quarter in range(4):
        bits = words[0] & 0
        for place in range(4):
            bits = bits | (words[4 * quarter + place] >> 4 & PAIRS) << 2 * place
        out.words(bits, at + LINE_BYTES * quarter)


def whole_bytes(words: list[Lanes], out: Superblock, at: int) -> None:
    """A line for each word."""
    for k, word in enumerate(words):
        out.words(word, at + LINE_BYTES * k)


NIBBLE_BYTES = 8 * LINE_BYTES
# What is written of the words of 64 inputs, and where behind the first of their lines.
PLANES = {
    "u4": ((nibble_lines, 0),),
    "t4": ((nibble_lines, 0),),
    "v4": ((nibble_lines, 0),),
    "u5": ((nibble_lines, 0), (fifth_bits, NIBBLE_BYTES)),
    "u6": ((nibble_lines, 0), (upper_pairs, NIBBLE_BYTES)),
    "i8": ((whole_bytes, 0),),
    "f8": ((whole_bytes, 0),),
}


def superblock_writer(source_type: str):
    """Function (address of a stage, address of a superblock): writes it; 0 where a number in it is not finite."""
    target = format_of(SOURCE_TYPES[source_type].format)
    word, header = KERNEL_SOURCES[source_type]

    @emits(types.int64, intp, intp)
    def write(b, source, to):
        stage, out = Stage(b, source), Superblock(b, to)
        header(stage, out)
        for group in range(target.group_inputs // GROUP_INPUTS):
            words = [word(stage, group * GROUP_WORDS + k) for k in range(GROUP_WORDS)]
            first = (target.header_lines + group * target.code_lines) * LINE_BYTES
            for lines, at in PLANES[target.plane]:
                lines(words, out, first + at)
        return out.is_good()

    return write


def repack(source_type: str):
    """Kernel; row_items: blocks of the source."""
    source = SOURCE_TYPES[source_type]
    together, source_bytes = blocks_together(source), source.block_bytes
    dwords, superblock_bytes = -(-together * source_bytes // DWORD_BYTES), format_of(source.format).superblock_bytes
    memory, write = stage_memory(dwords * LINE_BYTES), superblock_writer(source_type)

    @helper
    def lay(rows, stride, count, stage):
        """The first `count` bytes of each row on the stage, zeros behind them."""
        quads, whole, rest = count // QUAD_BYTES, count // DWORD_BYTES, count % DWORD_BYTES
        for index in range(quads):
            stage_quad(rows + QUAD_BYTES * index, stride, stage + QUAD * LINE_BYTES * index)
        for index in range(QUAD * quads, whole):
            stage_dword(rows + DWORD_BYTES * index, stride, stage + LINE_BYTES * index)
        for at in range(stage + LINE_BYTES * whole, stage + LINE_BYTES * dwords, 8):
            store_i64(0, at)
        if rest:
            stage_last(rows + count - DWORD_BYTES, stride, stage + LINE_BYTES * whole, rest)

    @helper
    def repack_block(rows, stride, blocks, to, stage):
        """Sixteen features; False if a scale is not finite."""
        good = True
        for first in range(0, blocks, together):
            here = least(together, blocks - first)
            lay(rows + first * source_bytes, stride, here * source_bytes, stage)
            good = write(stage, to + first // together * superblock_bytes) != 0 and good
        return good

    return over_blocks(repack_block, memory)
