"""Products of bytes with 16-bit numbers, which no instruction has: the number is split over two planes of 4-byte words.

A word of codes is four bytes of one lane; four numbers face it, a word in either plane:

  AVX-512 VNNI   high and low bytes of all four, number = 256 high + low: both planes multiply the same bytes
  elsewhere      int16 pairs, of bytes 0 and 2 and of bytes 1 and 3, multiplied and added by vpdpwssd, vpmaddwd or like

Sums are exact in int32. A Split says which, so that kernels read alike on every instruction set.
"""

from dataclasses import dataclass

from llvmlite import ir
from numba import types

from cpu_kernels.vectors.dot import V32I16, emit_dot2, emit_dot4
from cpu_kernels.vectors.isa import Isa
from cpu_kernels.vectors.vector import (
    I8,
    I32,
    LANES,
    VF32,
    VI8,
    VI16,
    VI32,
    F32x16,
    constant,
    emits,
    fma_value,
    intp,
    load_as,
    splat_value,
    store_as,
)

V64I8 = ir.VectorType(I8, 64)


@dataclass(frozen=True, slots=True)
class Split:
    """How an instruction set multiplies bytes with 16-bit numbers."""

    isa: Isa

    @property
    def takes_bytes(self) -> bool:
        """Whether bytes are multiplied as they are, by vpdpbusd on 512 bits."""
        return self.isa.has_avx512

    def keys(self, b, codes):
        """Signed codes of K for `plane_dots` with q: bytes are made unsigned by adding 128."""
        if self.takes_bytes:
            codes = b.xor(codes, constant(VI32, -0x7F7F7F80))
            return codes, codes
        return self.values(b, codes)

    def values(self, b, codes):
        """What either plane multiplies, of codes that are signed bytes."""
        if self.takes_bytes:
            return codes, codes
        codes, eight = b.bitcast(codes, V32I16), constant(V32I16, 8)
        return b.bitcast(b.ashr(b.shl(codes, eight), eight), VI32), b.bitcast(b.ashr(codes, eight), VI32)

    def key_start(self, b, q_sum):
        """Where the second sum begins, so that the 128 more of `keys` vanish; q_sum: float32, of the numbers met."""
        if not self.takes_bytes:
            return ir.Constant(I32, 0)
        return b.fptosi(b.fmul(q_sum, ir.Constant(q_sum.type, -128.0)), I32)

    def key_dot(self, b, total, codes, q):
        """total + products of one plane of q; codes from `keys`, or such as are never negative."""
        return emit_dot4(self.isa, b, total, codes, q) if self.takes_bytes else emit_dot2(self.isa, b, total, codes, q)

    def value_dot(self, b, total, codes, weights):
        """total + products of one plane of weights, which are never negative; codes from `values`."""
        if self.takes_bytes:
            return emit_dot4(self.isa, b, total, weights, codes)
        return emit_dot2(self.isa, b, total, codes, weights)

    def start(self, b, start, apart: bool):
        """Sums of K's products, the last of which begins at `start`: one a plane, or, unless `apart`, one of both where
        they are but added up."""
        return [constant(VI32, 0)] * (self.takes_bytes or apart) + [splat_value(b, start)]

    def whole(self, b, first, second=None):
        """The sum that both planes' sums stand for."""
        if second is None:
            return first
        return b.add(b.shl(first, constant(VI32, 8)) if self.takes_bytes else first, second)

    @property
    def largest_q(self) -> float:
        """The largest number of q: its high byte still fits when the low one is negative."""
        return 127.0 * 256.0

    @property
    def largest_weight(self) -> float:
        """The largest weight."""
        return 65535.0 if self.takes_bytes else 32767.0

    def store_q(self):
        """Intrinsic (numbers, address, plane): 16 whole numbers; the second plane is `plane` bytes behind."""

        @emits(types.void, F32x16, intp, intp)
        def store(b, numbers, address, plane):
            whole = b.fptosi(numbers, VI32)
            if self.takes_bytes:
                high = b.ashr(b.add(whole, constant(VI32, 128)), constant(VI32, 8))
                planes = [b.trunc(high, VI8), b.trunc(whole, VI8)]
            else:
                planes = _even_odd_shorts(b, whole)
            store_as(b, planes[0], address)
            store_as(b, planes[1], b.add(address, plane))

        return store

    def store_weights(self):
        """Intrinsic (p, s0, s1, s2, s3, address): 64 numbers p, in memory, times s, as two planes of 64 bytes.

        1.5 * 2**23 more leaves a product, rounded to whole, in the low bits of its float32.
        """

        @emits(types.void, intp, F32x16, F32x16, F32x16, F32x16, intp)
        def store(b, p, s0, s1, s2, s3, address):
            values = (load_as(b, p, VF32, 64 * part) for part in range(4))
            unit = constant(VF32, 1.5 * 2.0**23)
            whole = [b.bitcast(fma_value(b, value, s, unit), VI32) for value, s in zip(values, (s0, s1, s2, s3))]
            if self.takes_bytes:
                for plane, value in enumerate(_high_low_bytes(b, whole)):
                    store_as(b, value, address, 64 * plane)
                return
            for part, value in enumerate(whole):
                for plane, half in enumerate(_even_odd_shorts(b, value)):
                    store_as(b, half, address, 64 * plane + 16 * part)

        return store


def _even_odd_shorts(b, whole):
    """<16 x i32> -> two <8 x i16>: those at even places, those at odd ones."""
    shorts, lanes = b.trunc(whole, VI16), ir.VectorType(I32, LANES // 2)
    picks = (ir.Constant(lanes, list(range(start, LANES, 2))) for start in (0, 1))
    return [b.shuffle_vector(shorts, shorts, pick) for pick in picks]


def _high_low_bytes(b, whole):
    """The low halves of four <16 x i32> -> (high bytes, low bytes), 64 each, as <16 x i32>."""
    v64i32, pairs = ir.VectorType(I32, 64), []
    lanes = [64 * source + 4 * lane + high for high in (1, 0) for source in (0, 1) for lane in range(LANES)]
    for at in (0, 2):
        left, right = (b.bitcast(value, V64I8) for value in whole[at : at + 2])
        pairs.append(b.shuffle_vector(left, right, ir.Constant(v64i32, lanes)))
    for low in (0, 32):
        lanes = [*range(low, low + 32), *range(64 + low, 96 + low)]
        yield b.bitcast(b.shuffle_vector(*pairs, ir.Constant(v64i32, lanes)), VI32)
