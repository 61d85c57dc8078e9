"""A table of 16 numbers as whole numbers in planes of seven bits, which one row of activations multiplies.

The numbers of NF4, float32 of at most 1 that are whole multiples of 2**-27, plus 1, are 29 bits: the digits of a number
to base 128. A plane of digits is looked up for a register of codes in one instruction and multiplied by int8
activations as codes are, four inputs at a time; a pair's sum fits in 16 bits, and every sum is exact until the planes
are added up. To make float32 of the codes takes eight interleavings for 32 numbers on AVX2, on the ports that look up
as well, and with AVX-512 a lookup for every 16 instead of every 64.
"""

from llvmlite import ir

from cpu_kernels.linear.forms.codes import look_up
from cpu_kernels.vectors.dot import V8I32, V32I8, emit_dot4, emit_dot4_256, in_parts, together
from cpu_kernels.vectors.isa import Isa
from cpu_kernels.vectors.vector import VF32, VI32, call_llvm, constant, fma_value, in_order

DIGIT_BITS, PLANES, FRACTION_BITS = 7, 4, 27
# What the digits of the highest plane are above the number's own: 1, in units of that plane.
ONE = 1 << (FRACTION_BITS - DIGIT_BITS * (PLANES - 1))


def fits_planes(values: tuple[float, ...]) -> bool:
    """Whether the numbers of a table are whole multiples of 2**-27 of at most 1."""
    return bool(values) and all(abs(v) <= 1 and (v * 2**FRACTION_BITS).is_integer() for v in values)


def digit_planes(values: tuple[float, ...]) -> list[list[int]]:
    """The digits of every number plus 1, lowest plane first; the last plane's go up to 128."""
    whole = [int(value * 2**FRACTION_BITS) + (1 << FRACTION_BITS) for value in values]
    lower = [[number >> DIGIT_BITS * plane & 127 for number in whole] for plane in range(PLANES - 1)]
    return [*lower, [number >> DIGIT_BITS * (PLANES - 1) for number in whole]]


def planes_dot(isa: Isa, b, values: tuple[float, ...], half_word, record, places: range, taken):
    """<16 x float>: sums of number * input of 16 features and one row, over the words at `places`.

    half_word: see codes.half_words. taken: minus ONE times the sum of the inputs. Eight features are finished before
    the next eight begin, which read the inputs anew: the sums of both, the tables and what is between do not fit in 16
    registers.
    """
    tables = [ir.Constant(V32I8, digits * 2) for digits in digit_planes(values)]
    halves = []
    for half, (source, start) in enumerate(zip((record, record.read_again()), in_parts(b, taken, V8I32))):
        sums = [constant(V8I32, 0)] * (PLANES - 1) + [start]
        for k in places:
            x, codes = in_parts(b, source.inputs(0, k), V8I32)[0], b.bitcast(half_word(k, half), V32I8)
            for plane, table in enumerate(tables):
                digits = call_llvm(b, "llvm.x86.avx2.pshuf.b", V32I8, table, codes)
                sums[plane] = emit_dot4_256(isa, b, sums[plane], b.bitcast(digits, V8I32), x)
            sums = in_order(b, sums)
        halves.append(sums)
    return _as_float(b, [together(b, list(both)) for both in zip(*halves)])


def wide_planes_dot(isa: Isa, b, values: tuple[float, ...], word, record, places: range, taken):
    """As `planes_dot` with AVX-512, all features at once; word: see codes.code_words."""
    sums = [constant(VI32, 0)] * (PLANES - 1) + [taken]
    for k in places:
        x, codes = record.inputs(0, k), word(k)
        for plane, digits in enumerate(digit_planes(values)):
            sums[plane] = emit_dot4(isa, b, sums[plane], look_up(isa, b, tuple(digits), codes), x)
        sums = in_order(b, sums)
    return _as_float(b, sums)


def _as_float(b, planes):
    """<16 x float> of the sums of all planes, <16 x i32>."""
    low, high = (b.add(b.shl(planes[at + 1], constant(VI32, DIGIT_BITS)), planes[at]) for at in (0, 2))
    low = b.fmul(b.sitofp(low, VF32), constant(VF32, 2.0**-FRACTION_BITS))
    return fma_value(b, b.sitofp(high, VF32), constant(VF32, 2.0 ** (2 * DIGIT_BITS - FRACTION_BITS)), low)
