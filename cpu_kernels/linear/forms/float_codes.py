"""Codes that are numbers, planes f8 and v4, as registers of float32, four inputs of 16 features at a time.

With AVX-512 and elsewhere each of a word's four codes is taken by itself: a table of 16 numbers is one instruction
there, and a code E4M3, shifted by 7, is a float16 that is 256 times smaller, subnormal ones too. With AVX2 a table of
16 has only bytes, so the four bytes of the numbers are looked up apart and put together: four lookups and eight
interleavings make 32 numbers, where comparing with every index would take sixteen instructions for eight. For several
rows bytes are sorted by input first. For one row, with AVX-512 too, those of E4M3 stay where they are (`row_dot` and
`wide_row_dot`; where the CPU multiplies bf16 see bf16_codes.py), and a table's numbers are not put together at all
(number_planes.py).
"""

import struct
from functools import reduce

from llvmlite import ir

from cpu_kernels.formats import WeightFormat
from cpu_kernels.vectors.dot import V16I16, V32I8, in_parts
from cpu_kernels.vectors.isa import Isa
from cpu_kernels.vectors.vector import (
    HALF,
    I8,
    I16,
    I32,
    VF32,
    VHALF,
    VI16,
    VI32,
    call_llvm,
    constant,
    fma_value,
    in_order,
    picked,
)

HALF_SHIFT = 256.0  # what a float16 of the bits of an E4M3 has to be multiplied by
V64I8, V32I16 = ir.VectorType(I8, 64), ir.VectorType(I16, 32)
V8HALF, V8F32 = ir.VectorType(HALF, 8), ir.VectorType(VF32.element, 8)
LANE_BYTES = 16
# In 16 bytes, four inputs of four features each: those of the first input, then of the second one.
BY_INPUT = [lane + 4 * (at % 4) + at // 4 for lane in (0, LANE_BYTES) for at in range(LANE_BYTES)]


def unit_of(item: WeightFormat) -> float:
    """What `numbers_of_word` must be multiplied by, a power of two; inputs are multiplied by it in their place."""
    return HALF_SHIFT if item.plane == "f8" else 1.0


def numbers_of_word(isa: Isa, item: WeightFormat, b, codes) -> list:
    """Four <16 x float>, of the bytes of every lane of <16 x i32>, in units of `unit_of`; of v4 a byte is below 16."""
    if isa.has_avx2:
        halves = [picked(b, part, part, BY_INPUT) for part in in_parts(b, codes, V32I8)]
        convert = _halves_by_input if item.plane == "f8" else _looked_up_by_bytes
        return [picked(b, *pair, list(range(16))) for pair in zip(*(convert(b, item, half) for half in halves))]
    shifted = [b.lshr(codes, constant(VI32, 8 * place)) if place else codes for place in range(4)]
    if item.plane == "f8":
        return [_widened(b, code) for code in shifted]
    return [_looked_up(isa, b, item.values, b.and_(code, constant(VI32, 15))) for code in shifted]


def _widened(b, code):
    """The low byte of every lane, E4M3, as the float16 of its bits."""
    sign = b.shl(b.and_(code, constant(VI32, 0x80)), constant(VI32, 8))
    half = b.or_(sign, b.shl(b.and_(code, constant(VI32, 0x7F)), constant(VI32, 7)))
    return b.fpext(b.bitcast(b.trunc(half, VI16), VHALF), VF32)


def _looked_up(isa: Isa, b, values: tuple[float, ...], indexes):
    """Numbers of a table of 16, by an <16 x i32> of indexes."""
    if isa.has_avx512:
        return call_llvm(b, "llvm.x86.avx512.permvar.sf.512", VF32, ir.Constant(VF32, list(values)), indexes)
    found = constant(VF32, values[0])
    for index, entry in enumerate(values[1:], 1):
        found = b.select(b.icmp_unsigned("==", indexes, constant(VI32, index)), constant(VF32, entry), found)
    return found


def _interleaved(b, first, second):
    """Items of two registers of 32 bytes in turn, from the lower and from the upper halves of their 16 bytes."""
    count = first.type.count
    for upper in (0, count // 4):
        ends = [(lane + upper + at, count + lane + upper + at) for lane in (0, count // 2) for at in range(count // 4)]
        yield picked(b, first, second, [at for pair in ends for at in pair])


def _looked_up_by_bytes(b, item: WeightFormat, indexes):
    """Four <8 x float> of <32 x i8>, sorted by input, whose bytes are indexes into `values`."""
    planes = []
    for entries in zip(*(struct.pack("<f", value) for value in item.values)):
        table = ir.Constant(V32I8, list(entries) * 2)
        planes.append(call_llvm(b, "llvm.x86.avx2.pshuf.b", V32I8, table, indexes))
    low, high = (_interleaved(b, *planes[at : at + 2]) for at in (0, 2))
    numbers = []
    for pair in zip(low, high):
        numbers += _interleaved(b, *(b.bitcast(half, V16I16) for half in pair))
    return [b.bitcast(number, V8F32) for number in numbers]


def _halves_by_input(b, item: WeightFormat, codes):
    """Four <8 x float> of <32 x i8>, sorted by input, as the float16 of their bits."""
    words = b.bitcast(codes, ir.VectorType(I32, 8))
    return _halves_of_bytes(b, b.bitcast(picked(b, words, words, [0, 4, 1, 5, 2, 6, 3, 7]), V32I8))


def _halves_of_bytes(b, codes):
    """Four <8 x float> of <32 x i8>: of the bytes 0 to 7, 8 to 15 and so on."""
    numbers = [None] * 4
    for odd, bytes_ in enumerate(_interleaved(b, constant(V32I8, 0), codes)):
        # The sign stays where it is, the other bits move down by one.
        halves = b.ashr(b.bitcast(bytes_, V16I16), constant(V16I16, 1))
        halves = b.and_(halves, constant(V16I16, 0xBF80))
        for upper in (0, 1):
            eight = picked(b, halves, halves, list(range(8 * upper, 8 * upper + 8)))
            numbers[2 * upper + odd] = b.fpext(b.bitcast(eight, V8HALF), V8F32)
    return numbers


def row_dot(b, words, inputs):
    """As `FormSums.float_dots` of one row of E4M3 with AVX2, <16 x float>; words: of codes; inputs: 16 for
    every four of them.

    A register holds four inputs of two features, so that no code is moved to another lane and four inputs are spread
    at once; the four sums of a feature are what elsewhere are the four chains.
    """
    sums = [[constant(V8F32, 0.0)] * 4 for _ in range(2)]
    for k, word in enumerate(words):
        x = picked(b, inputs[k // 4], inputs[k // 4], [*range(4 * (k % 4), 4 * (k % 4) + 4)] * 2)
        for half, part in enumerate(in_parts(b, word, V32I8)):
            numbers = _halves_of_bytes(b, part)
            sums[half] = [fma_value(b, number, x, total) for number, total in zip(numbers, sums[half])]
    lower, upper = (_features(b, half) for half in sums)
    return picked(b, lower, upper, list(range(16)))


def _features(b, sums):
    """<8 x float>, a feature in a lane, of four registers of four sums of two features each."""
    ends = [[4 * lane + 2 * high + at + of for lane in (0, 1) for at in (0, 1) for of in (0, 8)] for high in (0, 1)]
    pairs = [[picked(b, *sums[at : at + 2], lanes) for at in (0, 2)] for lanes in ends]
    chains = []
    for pair in pairs:
        for high in (0, 1):
            lanes = [4 * lane + 2 * high + at + of for lane in (0, 1) for of in (0, 8) for at in (0, 1)]
            chains.append(picked(b, *pair, lanes))
    total = reduce(b.fadd, chains)
    return picked(b, total, total, [0, 4, 1, 5, 2, 6, 3, 7])


def wide_row_dot(b, words, inputs):
    """As `row_dot`, with AVX-512: a register holds four inputs of four features."""
    sums = [constant(VF32, 0.0)] * 4
    for k, word in enumerate(words):
        x = picked(b, inputs[k // 4], inputs[k // 4], [*range(4 * (k % 4), 4 * (k % 4) + 4)] * 4)
        sums = [fma_value(b, number, x, total) for number, total in zip(_wide_halves(b, word), sums)]
        sums = in_order(b, sums)
    return _wide_features(b, sums)


def _wide_halves(b, word):
    """Four <16 x float> of <16 x i32>, as the float16 of their bits: the bytes of half of every 16, two each."""
    codes, numbers = b.bitcast(word, V64I8), []
    for upper in (0, 8):
        starts = [lane + upper + at for lane in range(0, 64, LANE_BYTES) for at in range(8)]
        bytes_ = picked(b, constant(V64I8, 0), codes, [at for place in starts for at in (place, 64 + place)])
        # The sign stays where it is, the other bits move down by one.
        halves = b.and_(b.ashr(b.bitcast(bytes_, V32I16), constant(V32I16, 1)), constant(V32I16, 0xBF80))
        for lower in (0, 16):
            sixteen = picked(b, halves, halves, list(range(lower, lower + 16)))
            numbers.append(b.fpext(b.bitcast(sixteen, VHALF), VF32))
    return numbers


def _wide_features(b, sums):
    """<16 x float>, a feature in a lane, of `_wide_halves`' four registers of four sums of four features each."""
    pairs, chains = [], []
    for high in (0, 2):
        ends = [lane + high + at + of for lane in (0, 4, 8, 12) for of in (0, 16) for at in (0, 1)]
        pairs.append([picked(b, sums[half], sums[half + 2], ends) for half in (0, 1)])
    for pair in pairs:
        for at in (0, 1):
            ends = [lane + at + which + of for lane in (0, 4, 8, 12) for of in (0, 16) for which in (0, 2)]
            chains.append(picked(b, *pair, ends))
    total = reduce(b.fadd, chains)
    lanes = [8 * (f // 4 % 2) + 4 * (f % 2) + 2 * (f // 8) + f // 2 % 2 for f in range(16)]
    return picked(b, total, total, lanes)
