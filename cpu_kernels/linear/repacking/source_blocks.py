"""Where the source types have their codes and scales: ggml's block structures, and those of formats/source_types.py.

`word(stage, k)` of a type gives the codes of the four inputs from 4k on of a superblock as the bytes of one number,
`header(stage, out)` writes the superblock's header and refuses numbers that are not finite. Both are Python that runs
while a kernel is compiled: `k` and all offsets are constants, what they compute with are the numbers of 16 features at
once (lanes.py). Blocks that a row does not have are zeros.
"""

from cpu_kernels.formats import (
    E2M1_HEADER_BYTES,
    E2M1_TYPE,
    INT4_HEADER_BYTES,
    INT4_TYPES,
    LINE_BYTES,
    SCALE_BYTES,
    SCALED_TYPES,
    UINT8_TYPES,
    GgufType,
    format_of,
)
from cpu_kernels.linear.repacking.lanes import Lanes, Stage, Superblock

NIBBLES, BITS, PAIRS = 0x0F0F0F0F, 0x01010101, 0x03030303
SPREAD = 0x00204081  # times four bits: bit i is the lowest of byte i
HALF_INFINITY, FLOAT_INFINITY, NO_E4M3, NO_E8M0 = 0x7C00, 0x7F800000, 0x7F, 0xFF


def write_half(out: Superblock, half: Lanes, at: int) -> None:
    """A float16 of each feature, which must be finite."""
    out.halves(half, at)
    out.refuse(half & HALF_INFINITY, HALF_INFINITY)


def words_of_32(block_bytes: int, codes_at: int, bits_at: int):
    """`word` of the types of 32 inputs with 4-bit codes; bits_at: where the fifth bits are, 0 for none."""

    def word(stage: Stage, k: int) -> Lanes:
        block, inside = (k >> 3) * block_bytes, k & 7
        low = stage.word(block + codes_at + 4 * (inside & 3)) >> 4 * (inside >> 2) & NIBBLES
        if not bits_at:
            return low
        fifth = stage.word(block + bits_at) >> 4 * inside & 15
        return low | (fifth * SPREAD & BITS) << 4

    return word


def word_q8_0(stage: Stage, k: int) -> Lanes:
    """Signed bytes with 128 added."""
    return stage.word((k >> 3) * 34 + 2 + 4 * (k & 7)) ^ 0x80808080


def word_q4_k(stage: Stage, k: int) -> Lanes:
    """Runs of 64 inputs in 32 bytes: low nibbles first."""
    return stage.word(16 + 32 * (k >> 4) + 4 * (k & 7)) >> 4 * (k >> 3 & 1) & NIBBLES


def word_q5_k(stage: Stage, k: int) -> Lanes:
    """As q4_k, and bit n of byte l of the 32 at 16 is the fifth of input 32n + l."""
    low = stage.word(48 + 32 * (k >> 4) + 4 * (k & 7)) >> 4 * (k >> 3 & 1) & NIBBLES
    return low | (stage.word(16 + 4 * (k & 7)) >> (k >> 3) & BITS) << 4


def word_q6_k(stage: Stage, k: int) -> Lanes:
    """Halves of 128 inputs: 64 bytes of low nibbles, then in 32 bytes at 128 the two upper bits."""
    half, inside = k >> 5, k & 31
    low = stage.word(64 * half + 4 * (inside & 15)) >> 4 * (inside >> 4) & NIBBLES
    high = stage.word(128 + 32 * half + 4 * (inside & 7)) >> 2 * (inside >> 3) & PAIRS
    return low | high << 4


def word_iq4_xs(stage: Stage, k: int) -> Lanes:
    """Groups of 32 inputs in 16 bytes: low nibbles are the first 16."""
    return stage.word(8 + 16 * (k >> 3) + 4 * (k & 3)) >> 4 * (k >> 2 & 1) & NIBBLES


def header_of_32(block_bytes: int, numbers: int):
    """`header` of float16 scales (and minima) for every 32 inputs, two blocks a superblock."""

    def header(stage: Stage, out: Superblock) -> None:
        for number in range(numbers):
            for block in range(2):
                write_half(out, stage.short(block * block_bytes + 2 * number), LINE_BYTES * number + 32 * block)

    return header


def header_k2m32(stage: Stage, out: Superblock) -> None:
    """d, dmin, and 6-bit scales and minima unpacked from 12 bytes."""
    write_half(out, stage.short(0), 0)
    write_half(out, stage.short(2), 32)
    for k in range(8):
        if k < 4:
            scale, minimum = stage.byte(4 + k) & 63, stage.byte(8 + k) & 63
        else:
            both = stage.byte(8 + k)
            scale = both & 15 | stage.byte(k) >> 6 << 4
            minimum = both >> 4 | stage.byte(4 + k) >> 6 << 4
        out.bytes(scale, 64 + 16 * k)
        out.bytes(minimum, 192 + 16 * k)


def header_q6_k(stage: Stage, out: Superblock) -> None:
    """d is the last of the block; 16 signed scales before it."""
    write_half(out, stage.short(208), 0)
    out.halves(stage.short(208) & 0, 32)
    for k in range(16):
        out.bytes(stage.byte(192 + k), 64 + 16 * k)


def header_iq4_xs(stage: Stage, out: Superblock) -> None:
    """d, and scales of 6 bits less 32: two bits each in a word, four in bytes."""
    high = stage.short(2)
    write_half(out, stage.short(0), 0)
    out.halves(high & 0, 32)
    for k in range(8):
        low = stage.byte(4 + (k >> 1)) >> 4 * (k & 1) & 15
        out.bytes((low | (high >> 2 * k & 3) << 4) - 32, 64 + 16 * k)


def header_mxfp4(stage: Stage, out: Superblock) -> None:
    """One exponent a block, four a superblock."""
    for block in range(4):
        exponent = stage.byte(17 * block)
        out.refuse(exponent, NO_E8M0)
        out.bytes(exponent, 16 * block)


def word_nibbles(kind: GgufType, header_bytes: int):
    """`word` of blocks of a group of 4-bit codes: inputs follow each other, two in a byte, low nibble first."""
    words, block_bytes = kind.items // 4, kind.block_bytes

    def word(stage: Stage, k: int) -> Lanes:
        nibbles = stage.short(k // words * block_bytes + header_bytes + 2 * (k % words))
        return nibbles & 0xF | (nibbles & 0xF0) << 4 | (nibbles & 0xF00) << 8 | (nibbles & 0xF000) << 12

    return word


def word_bytes(kind: GgufType, flipped: int):
    """`word` of blocks of a scale and a group of bytes; flipped: their bits that are turned over."""
    words, block_bytes = kind.items // 4, kind.block_bytes
    return lambda stage, k: stage.word(k // words * block_bytes + SCALE_BYTES + 4 * (k % words)) ^ flipped


def blocks_together(kind: GgufType) -> int:
    """Source blocks of a superblock."""
    return max(1, format_of(kind.format).group_inputs // kind.items)


def header_scaled(kind: GgufType):
    """`header` of a float32 scale for every group of a superblock."""

    def header(stage: Stage, out: Superblock) -> None:
        for block in range(blocks_together(kind)):
            scale = stage.word(block * kind.block_bytes)
            out.refuse(scale & FLOAT_INFINITY, FLOAT_INFINITY)
            out.words(scale, LINE_BYTES * block)

    return header


def word_scaled(kind: GgufType):
    """`word` of a kind with a float32 scale."""
    plane = format_of(kind.format).plane
    if plane in ("t4", "v4"):
        return word_nibbles(kind, SCALE_BYTES)
    return word_bytes(kind, 0x80808080 if plane == "i8" else 0)


def header_e2m1(stage: Stage, out: Superblock) -> None:
    """The number of the tensor, and one byte a block, 16 a superblock."""
    factor = stage.word(0)
    out.refuse(factor & FLOAT_INFINITY, FLOAT_INFINITY)
    out.words(factor, 0)
    for block in range(16):
        scale = stage.byte(E2M1_TYPE.block_bytes * block + SCALE_BYTES)
        out.refuse(scale, NO_E4M3)
        out.bytes(scale, LINE_BYTES + 16 * block)


def header_zeros(kind: GgufType):
    """`header` of float16 scales, then zero points, of every group; 128 is taken from those of bytes."""
    together, flipped = blocks_together(kind), 128 if format_of(kind.format).plane == "i8" else 0

    def header(stage: Stage, out: Superblock) -> None:
        for block in range(together):
            write_half(out, stage.short(block * kind.block_bytes), 32 * block)
            out.bytes(stage.byte(block * kind.block_bytes + 2) ^ flipped, 32 * together + 16 * block)

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
