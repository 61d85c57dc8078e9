"""One row of codes E4M3 as bf16, which AVX-512 multiplies in pairs.

Every number of E4M3 is one of bf16, and so is every int8 input. Both bytes of a number are looked up in tables of 128,
subnormal ones too; the code's own top bit is the sign. Each sum of two products is added in float32.
"""

import struct
from functools import reduce

from llvmlite import ir

from cpu_kernels.vectors.dot import emit_dot_bf16, emit_round_bf16
from cpu_kernels.vectors.isa import Isa
from cpu_kernels.vectors.vector import I8, I64, VF32, VI32, call_llvm, constant, picked, splat_value

V64I8, V4I64 = ir.VectorType(I8, 64), ir.VectorType(I64, 4)
LANE_BYTES = 16
CHAINS = 2
CODES = 128  # without the sign


def magnitude(code: int) -> float:
    """The number of an E4M3 without its sign; 127 is what its bits would be as a number, as in float_codes.py."""
    exponent, fraction = code >> 3, code & 7
    return (fraction + 8) * 2.0 ** (exponent - 10) if exponent else fraction * 2.0**-9


def tables() -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The lower and the upper bytes of all magnitudes as bf16."""
    low, high = zip(*(struct.pack("<f", magnitude(code))[2:] for code in range(CODES)))
    return low, high


def row_dot_bf16(isa: Isa, b, words, inputs):
    """<16 x float>, sums of code * input; words: <16 x i32> of codes, four inputs each; inputs: 16 in a float32 vector
    for every four of them."""
    rounded = [b.bitcast(emit_round_bf16(isa, b, vector), V4I64) for vector in inputs]
    sums = [[constant(VF32, 0.0)] * CHAINS for _ in range(2)]
    for k, word in enumerate(words):
        four = splat_value(b, b.extract_element(rounded[k // 4], I64(k % 4)), 8)
        x = b.bitcast(four, VI32)
        for chains, pairs in zip(sums, _pairs(b, word)):
            chains[k % CHAINS] = emit_dot_bf16(isa, b, chains[k % CHAINS], pairs, x)
    return _features(b, *(reduce(b.fadd, chains) for chains in sums))


def _pairs(b, word):
    """Two <16 x i32> of pairs of bf16: of features 0 and 1 of every four, and of the other two."""
    codes = b.bitcast(word, V64I8)
    low, high = (_looked_up(b, table, codes) for table in tables())
    high = b.or_(high, b.and_(codes, constant(V64I8, 0x80)))
    for upper in (0, 8):
        starts = [lane + upper + at for lane in range(0, 64, LANE_BYTES) for at in range(8)]
        yield b.bitcast(picked(b, low, high, [at for place in starts for at in (place, 64 + place)]), VI32)


def _looked_up(b, table: tuple[int, ...], codes):
    """Bytes of a table of 128, by the lower seven bits of 64 codes."""
    halves = [ir.Constant(V64I8, list(table[at : at + 64])) for at in (0, 64)]
    return call_llvm(b, "llvm.x86.avx512.vpermi2var.qi.512", V64I8, halves[0], codes, halves[1])


def _features(b, lower, upper):
    """<16 x float>, a feature in a lane, of sums of two pairs of two features of every four each."""
    ends = [[lane + at + of for lane in (0, 4, 8, 12) for of in (0, 16) for at in (odd, odd + 2)] for odd in (0, 1)]
    even, odd = (picked(b, lower, upper, lanes) for lanes in ends)
    return b.fadd(even, odd)
