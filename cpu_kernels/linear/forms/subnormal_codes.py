"""One row of FP8 on 256 bits, where an FMA of a subnormal number takes no longer than another: codes E4M3 as float32.

Moved to the places of a float32's, the bits of a code are its number times 2**-120, subnormal ones too: nine shifts and
masks make four numbers of each of eight features, where by way of float16 conversions come beside and codes move to
other lanes. A register holds one input of eight features; the input itself, times 2**120, is spread from memory. Sums,
and their bits, are those of float_codes.py: a product is the same whichever factor has the power of two.
"""

from collections.abc import Callable
from functools import reduce

from llvmlite import ir
from numba.core import cgutils

from cpu_kernels.formats import GROUP_INPUTS, WeightFormat
from cpu_kernels.vectors.compiler import helper
from cpu_kernels.vectors.dot import V8I32, V16I16, high_halves, low_halves
from cpu_kernels.vectors.isa import Isa
from cpu_kernels.vectors.scalar import keep_subnormals, restore_arithmetic
from cpu_kernels.vectors.vector import (
    F32,
    I64,
    constant,
    fma_value,
    in_order,
    load_as,
    picked,
    splat_value,
    store_as,
    unknown,
)

UNIT = 2.0**120  # what the numbers have to be multiplied by
BITS = 0x87F0 - (1 << 16)  # sign, exponent and mantissa of a code, in the upper half of a float32
HALF = 8  # features of a register


def _numbers(b, word):
    """Four <8 x float> of the bytes of every lane of <8 x i32>."""
    pairs = b.bitcast(word, V16I16)
    odd, even = (b.ashr(each, constant(V16I16, 4)) for each in (pairs, b.shl(pairs, constant(V16I16, 8))))
    halves = [b.bitcast(b.and_(each, constant(V16I16, BITS)), V8I32) for each in (even, odd)]
    return [widen(b, half) for widen in (low_halves, high_halves) for half in halves]


def _kept(b, inputs):
    """Address of 16 inputs behind each other on the stack, as LLVM does not see through, that each may be spread from
    memory, which takes no port of arithmetic."""
    space = cgutils.alloca_once(b, ir.ArrayType(F32, GROUP_INPUTS))
    address = b.ptrtoint(space, I64)
    for place, numbers in enumerate(inputs):
        store_as(b, numbers, address, 4 * numbers.type.count * place)
    return unknown(b, address)


def subnormal_row_dot(b, half_word, record, quarters: range):
    """<16 x float>: sums of code * input of 16 features and one row, over the quarters of 16 inputs.

    half_word: see codes.half_words; record: the activations. Eight features are finished before the next eight begin,
    so that sums stay in the registers.
    """
    x, halves = _kept(b, [record.numbers(0, quarter, UNIT) for quarter in quarters]), []
    for half in range(2):
        sums = [constant(ir.VectorType(F32, HALF), 0.0)] * 4
        for at in range(4 * len(quarters)):
            for place, number in enumerate(_numbers(b, half_word(4 * quarters.start + at, half))):
                spread = splat_value(b, load_as(b, x, F32, 4 * (4 * at + place)), HALF)
                sums[place] = fma_value(b, number, spread, sums[place])
            sums = in_order(b, sums)
        halves.append(reduce(b.fadd, sums))
    return picked(b, *halves, list(range(2 * HALF)))


def takes_subnormals(isa: Isa, item: WeightFormat) -> bool:
    """Whether one row of a format is multiplied so."""
    return item.plane == "f8" and isa.has_free_subnormals


def keeping_subnormals(isa: Isa, item: WeightFormat, kernel: Callable) -> Callable:
    """A kernel (arguments, thread) that computes the same whether or not its thread flushes subnormal numbers."""
    if not takes_subnormals(isa, item):
        return kernel
    work = helper(kernel)

    def kept(arguments, thread):
        before = keep_subnormals()
        work(arguments, thread)
        restore_arithmetic(before)

    return kept
