"""Coded rows of a file into the blocks of formats/base.py, exactly: codes move, scales are copied, nothing is rounded.

A kernel is made of two small functions for its source type: `word(source, k)`, the codes of the four inputs from 4k on
of a source block as the bytes of one number, and `header(source, blocks, to, feature)`, which writes a superblock's
header for one feature and says whether its numbers are finite. `source` is the address of the row's bytes from which
the superblock comes. The layouts are those of ggml's block structures.
"""

from cpu_kernels.formats import (
    BLOCK_FEATURES,
    E2M1_HEADER_BYTES,
    E2M1_TYPE,
    GROUP_INPUTS,
    INT4_HEADER_BYTES,
    INT4_TYPES,
    LINE_BYTES,
    SCALE_BYTES,
    SCALED_TYPES,
    SOURCE_TYPES,
    UINT8_TYPES,
    GgufType,
    format_of,
)
from cpu_kernels.team.arguments import REPACK
from cpu_kernels.team.chunks import fail, parameter, take
from cpu_kernels.vectors.compiler import helper
from cpu_kernels.vectors.scalar import least, load_byte, load_short, load_word, store_byte, store_short, store_word

NIBBLES, BITS, PAIRS = 0x0F0F0F0F, 0x01010101, 0x03030303
SPREAD = 0x00204081  # times four bits: bit i is the lowest of byte i
GROUP_WORDS = GROUP_INPUTS // 4
HALF_INFINITY, FLOAT_INFINITY, NO_E4M3 = 0x7C00, 0x7F800000, 0x7F


@helper
def is_finite(half):
    """Whether a float16, as its bits, is."""
    return half & HALF_INFINITY != HALF_INFINITY


def words_of_32(block_bytes: int, codes_at: int, bits_at: int):
    """`word` of the types of 32 inputs with 4-bit codes; bits_at: where the fifth bits are, 0 for none."""

    @helper
    def word(source, k):
        block, inside = source + (k >> 3) * block_bytes, k & 7
        return (load_word(block + codes_at + 4 * (inside & 3)) >> (4 * (inside >> 2))) & NIBBLES

    @helper
    def word_of_5(source, k):
        fifth = (load_word(source + (k >> 3) * block_bytes + bits_at) >> (4 * (k & 7))) & 15
        return word(source, k) | ((fifth * SPREAD) & BITS) << 4

    return word_of_5 if bits_at else word


@helper
def word_q8_0(source, k):
    """Signed bytes with 128 added."""
    return load_word(source + (k >> 3) * 34 + 2 + 4 * (k & 7)) ^ 0x80808080


@helper
def word_q4_k(source, k):
    """Runs of 64 inputs in 32 bytes: low nibbles first."""
    return (load_word(source + 16 + 32 * (k >> 4) + 4 * (k & 7)) >> (4 * (k >> 3 & 1))) & NIBBLES


@helper
def word_q5_k(source, k):
    """As q4_k, and bit n of byte l of the 32 at 16 is the fifth of input 32n + l."""
    low = (load_word(source + 48 + 32 * (k >> 4) + 4 * (k & 7)) >> (4 * (k >> 3 & 1))) & NIBBLES
    return low | ((load_word(source + 16 + 4 * (k & 7)) >> (k >> 3)) & BITS) << 4


@helper
def word_q6_k(source, k):
    """Halves of 128 inputs: 64 bytes of low nibbles, then in 32 bytes at 128 the two upper bits."""
    half, inside = k >> 5, k & 31
    low = (load_word(source + 64 * half + 4 * (inside & 15)) >> (4 * (inside >> 4))) & NIBBLES
    high = (load_word(source + 128 + 32 * half + 4 * (inside & 7)) >> (2 * (inside >> 3))) & PAIRS
    return low | high << 4


@helper
def word_iq4_xs(source, k):
    """Groups of 32 inputs in 16 bytes: low nibbles are the first 16."""
    return (load_word(source + 8 + 16 * (k >> 3) + 4 * (k & 3)) >> (4 * (k >> 2 & 1))) & NIBBLES


def header_of_32(block_bytes: int, numbers: int):
    """`header` of float16 scales (and minima) for every 32 inputs, two blocks a superblock."""

    @helper
    def header(source, blocks, to, feature):
        good = True
        for number in range(numbers):
            for block in range(2):
                value = load_short(source + block * block_bytes + 2 * number) if block < blocks else 0
                good = good and is_finite(value)
                store_short(value, to + LINE_BYTES * number + 32 * block + 2 * feature)
        return good

    return header


@helper
def header_k2m32(source, blocks, to, feature):
    """d, dmin, and 6-bit scales and minima unpacked from 12 bytes."""
    d, dmin = load_short(source), load_short(source + 2)
    store_short(d, to + 2 * feature)
    store_short(dmin, to + 32 + 2 * feature)
    for k in range(8):
        if k < 4:
            scale, minimum = load_byte(source + 4 + k) & 63, load_byte(source + 8 + k) & 63
        else:
            both = load_byte(source + 8 + k)
            scale = (both & 15) | (load_byte(source + k) >> 6) << 4
            minimum = (both >> 4) | (load_byte(source + 4 + k) >> 6) << 4
        store_byte(scale, to + 64 + 16 * k + feature)
        store_byte(minimum, to + 192 + 16 * k + feature)
    return is_finite(d) and is_finite(dmin)


@helper
def header_q6_k(source, blocks, to, feature):
    """d is the last of the block; 16 signed scales before it."""
    d = load_short(source + 208)
    store_short(d, to + 2 * feature)
    store_short(0, to + 32 + 2 * feature)
    for k in range(16):
        store_byte(load_byte(source + 192 + k), to + 64 + 16 * k + feature)
    return is_finite(d)


@helper
def header_iq4_xs(source, blocks, to, feature):
    """d, and scales of 6 bits less 32: two bits each in a word, four in bytes."""
    d, high = load_short(source), load_short(source + 2)
    store_short(d, to + 2 * feature)
    store_short(0, to + 32 + 2 * feature)
    for k in range(8):
        low = (load_byte(source + 4 + (k >> 1)) >> (4 * (k & 1))) & 15
        store_byte((low | (high >> (2 * k) & 3) << 4) - 32, to + 64 + 16 * k + feature)
    return is_finite(d)


@helper
def header_mxfp4(source, blocks, to, feature):
    """One exponent a block, four a superblock."""
    good = True
    for block in range(4):
        exponent = load_byte(source + 17 * block) if block < blocks else 0
        good = good and exponent != 255
        store_byte(exponent, to + 16 * block + feature)
    return good


def word_nibbles(kind: GgufType, header_bytes: int):
    """`word` of blocks of a group of 4-bit codes: inputs follow each other, two in a byte, low nibble first."""
    words, block_bytes = kind.items // 4, kind.block_bytes

    @helper
    def word(source, k):
        nibbles = load_short(source + k // words * block_bytes + header_bytes + 2 * (k % words))
        spread = (nibbles & 0xF) | (nibbles & 0xF0) << 4
        return spread | (nibbles & 0xF00) << 8 | (nibbles & 0xF000) << 12

    return word


def word_bytes(kind: GgufType, flipped: int):
    """`word` of blocks of a scale and a group of bytes; flipped: their bits that are turned over."""
    words, block_bytes = kind.items // 4, kind.block_bytes

    @helper
    def word(source, k):
        return load_word(source + k // words * block_bytes + SCALE_BYTES + 4 * (k % words)) ^ flipped

    return word


def header_scaled(kind: GgufType):
    """`header` of a float32 scale for every group of a superblock."""
    block_bytes, together = kind.block_bytes, max(1, format_of(kind.format).group_inputs // kind.items)

    @helper
    def header(source, blocks, to, feature):
        good = True
        for block in range(together):
            scale = load_word(source + block * block_bytes) if block < blocks else 0
            good = good and scale & FLOAT_INFINITY != FLOAT_INFINITY
            store_word(scale, to + LINE_BYTES * block + 4 * feature)
        return good

    return header


def word_scaled(kind: GgufType):
    """`word` of a kind with a float32 scale."""
    plane = format_of(kind.format).plane
    if plane in ("t4", "v4"):
        return word_nibbles(kind, SCALE_BYTES)
    return word_bytes(kind, 0x80808080 if plane == "i8" else 0)


@helper
def header_e2m1(source, blocks, to, feature):
    """The number of the tensor, and one byte a block, 16 a superblock."""
    factor = load_word(source)
    store_word(factor, to + 4 * feature)
    good = factor & FLOAT_INFINITY != FLOAT_INFINITY
    for block in range(16):
        scale = load_byte(source + 16 * block + SCALE_BYTES) if block < blocks else 0
        good = good and scale < NO_E4M3
        store_byte(scale, to + LINE_BYTES + 16 * block + feature)
    return good


def header_zeros(kind: GgufType):
    """`header` of float16 scales, then zero points, of every group; 128 is taken from those of bytes."""
    block_bytes, item = kind.block_bytes, format_of(kind.format)
    together, flipped = item.group_inputs // kind.items, 128 if item.plane == "i8" else 0

    @helper
    def header(source, blocks, to, feature):
        good = True
        for block in range(together):
            at = source + block * block_bytes
            scale = load_short(at) if block < blocks else 0
            good = good and is_finite(scale)
            store_short(scale, to + 32 * block + 2 * feature)
            zero = load_byte(at + 2) ^ flipped if block < blocks else 0
            store_byte(zero, to + 32 * together + 16 * block + feature)
        return good

    return header


KERNEL_SOURCES = {
    "Q4_0": (words_of_32(18, 2, 0), header_of_32(18, 1)),
    "Q4_1": (words_of_32(20, 4, 0), header_of_32(20, 2)),
    "Q5_0": (words_of_32(22, 6, 2), header_of_32(22, 1)),
    "Q5_1": (words_of_32(24, 8, 4), header_of_32(24, 2)),
    "Q8_0": (word_q8_0, header_of_32(34, 1)),
    "Q4_K": (word_q4_k, header_k2m32),
    "Q5_K": (word_q5_k, header_k2m32),
    "Q6_K": (word_q6_k, header_q6_k),
    "IQ4_NL": (words_of_32(18, 2, 0), header_of_32(18, 1)),
    "IQ4_XS": (word_iq4_xs, header_iq4_xs),
    "MXFP4": (words_of_32(17, 1, 0), header_mxfp4),
}
KERNEL_SOURCES |= {
    kind.name: (word_nibbles(kind, INT4_HEADER_BYTES), header_zeros(kind)) for kind in INT4_TYPES.values()
}
KERNEL_SOURCES |= {kind.name: (word_bytes(kind, 0), header_zeros(kind)) for kind in UINT8_TYPES.values()}
KERNEL_SOURCES[E2M1_TYPE.name] = word_nibbles(E2M1_TYPE, E2M1_HEADER_BYTES), header_e2m1
KERNEL_SOURCES |= {name: (word_scaled(kind), header_scaled(kind)) for name, kind in SCALED_TYPES.items()}


def planes_of(plane: str, word):
    """Function (source, first word, words left, to): the code lines of 64 inputs of one feature."""

    @helper
    def code(source, k, stop):
        return word(source, k) if k < stop else 0

    @helper
    def nibble_lines(source, first, stop, to):
        for line in range(8):
            low, high = code(source, first + 2 * line, stop), code(source, first + 2 * line + 1, stop)
            store_word((low & NIBBLES) | (high & NIBBLES) << 4, to + LINE_BYTES * line)

    @helper
    def five_bits(source, first, stop, to):
        nibble_lines(source, first, stop, to)
        for half in range(2):
            bits = 0
            for line in range(4):
                k = first + 8 * half + 2 * line
                bits |= (code(source, k, stop) >> 4 & BITS) << (2 * line)
                bits |= (code(source, k + 1, stop) >> 4 & BITS) << (2 * line + 1)
            store_word(bits, to + LINE_BYTES * (8 + half))

    @helper
    def six_bits(source, first, stop, to):
        nibble_lines(source, first, stop, to)
        for quarter in range(4):
            bits = 0
            for part in range(4):
                bits |= (code(source, first + 4 * quarter + part, stop) >> 4 & PAIRS) << (2 * part)
            store_word(bits, to + LINE_BYTES * (8 + quarter))

    @helper
    def whole_bytes(source, first, stop, to):
        for k in range(16):
            store_word(code(source, first + k, stop), to + LINE_BYTES * k)

    four = {"u4": nibble_lines, "t4": nibble_lines, "v4": nibble_lines}
    return (four | {"u5": five_bits, "u6": six_bits, "i8": whole_bytes, "f8": whole_bytes})[plane]


def repack(source_type: str):
    """Kernel; blocks: of the source in a row."""
    source = SOURCE_TYPES[source_type]
    target = format_of(source.format)
    word, header = KERNEL_SOURCES[source_type]
    lay_group = planes_of(target.plane, word)
    together = max(1, target.group_inputs // source.items)  # source blocks of a superblock
    source_bytes, source_words = source.block_bytes, source.items // 4
    superblock_bytes, header_bytes = target.superblock_bytes, target.header_lines * LINE_BYTES
    groups, group_bytes = target.group_inputs // GROUP_INPUTS, target.code_lines * LINE_BYTES

    @helper
    def repack_row(row, blocks, to, feature):
        """One feature into its block; False if a scale is not finite."""
        good = True
        for first in range(0, blocks, together):
            here, at = least(together, blocks - first), row + first * source_bytes
            superblock = to + first // together * superblock_bytes
            good = header(at, here, superblock, feature) and good
            for group in range(groups):
                lines = superblock + header_bytes + group * group_bytes + 4 * feature
                lay_group(at, group * GROUP_WORDS, here * source_words, lines)
        return good

    def kernel(arguments, thread):
        rows, stride, num_blocks = (
            parameter(arguments, REPACK.rows),
            parameter(arguments, REPACK.row_bytes),
            parameter(arguments, REPACK.num_blocks),
        )
        blocks, out, block_bytes = (
            parameter(arguments, REPACK.blocks),
            parameter(arguments, REPACK.out),
            parameter(arguments, REPACK.block_bytes),
        )
        block = take(arguments, 0)
        while block < num_blocks:
            for feature in range(BLOCK_FEATURES):
                row = rows + (block * BLOCK_FEATURES + feature) * stride
                if not repack_row(row, blocks, out + block * block_bytes, feature):
                    fail(arguments, 1)
            block = take(arguments, 0)

    return kernel
