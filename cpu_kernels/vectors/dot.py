"""The dot products that instruction sets disagree on; what they compute is said in isa.py."""

from llvmlite import ir

from cpu_kernels.vectors.isa import Isa
from cpu_kernels.vectors.vector import (
    F32,
    I8,
    I16,
    I32,
    VF32,
    VI16,
    VI32,
    call_llvm,
    constant,
    fma_value,
    round_to_bf16,
)

V32I16, V16I16, V8I32 = ir.VectorType(I16, 32), ir.VectorType(I16, 16), ir.VectorType(I32, 8)
V32I8, V16I8, V4I32 = ir.VectorType(I8, 32), ir.VectorType(I8, 16), ir.VectorType(I32, 4)


class _BFloat(ir.types.Type):
    """LLVM's bfloat, which llvmlite has no name for; only the dpbf16ps operands use it."""

    def _to_string(self):
        return "bfloat"

    def __eq__(self, other):
        return isinstance(other, _BFloat)

    def __hash__(self):
        return hash(_BFloat)


def in_parts(builder, vector, part):
    """A vector as several of the type `part`; one of other items has 64 bytes."""
    if vector.type.element != part.element:
        vector = builder.bitcast(vector, ir.VectorType(part.element, 512 // part.element.width))
    lanes, starts = ir.VectorType(I32, part.count), range(0, vector.type.count, part.count)
    picks = (ir.Constant(lanes, list(range(start, start + part.count))) for start in starts)
    return [builder.shuffle_vector(vector, vector, pick) for pick in picks]


def together(builder, parts):
    """Vectors of int32 one behind the other."""
    while len(parts) > 1:
        lanes = list(range(2 * parts[0].type.count))
        both = ir.Constant(ir.VectorType(I32, len(lanes)), lanes)
        parts = [builder.shuffle_vector(*pair, both) for pair in zip(parts[::2], parts[1::2])]
    return parts[0]


def pair_products(builder, unsigned, signed):
    """<16 x i16>: sums of two products of bytes, <32 x i8>, on AVX2; where they exceed int16 it is the nearest."""
    return call_llvm(builder, "llvm.x86.avx2.pmadd.ub.sw", V16I16, unsigned, signed)


def emit_dot4_256(isa: Isa, builder, acc, unsigned, signed):
    """As emit_dot4 on 256 bits, of "avxvnni" and "avx2", there of sums of two products that fit in int16; <8 x i32>."""
    if isa.name == "avxvnni":
        return call_llvm(builder, "llvm.x86.avx512.vpdpbusd.256", V8I32, acc, unsigned, signed)
    pairs = pair_products(builder, builder.bitcast(unsigned, V32I8), builder.bitcast(signed, V32I8))
    return emit_dot2_256(isa, builder, acc, pairs, constant(V16I16, 1))


def emit_sdot(builder, acc, a, b):
    """acc + groups of four signed byte products, by arm64's sdot; LLVM values <16 x i32>."""
    parts = zip(in_parts(builder, acc, V4I32), in_parts(builder, a, V16I8), in_parts(builder, b, V16I8))
    return together(
        builder, [call_llvm(builder, "llvm.aarch64.neon.sdot.v4i32.v16i8", V4I32, *operands) for operands in parts]
    )


def _even_odd(builder, acc, unsigned, signed):
    """Even and odd bytes as int16, multiplied and added in pairs; LLVM matches the pattern to vpmaddwd."""
    eight = constant(V32I16, 8)
    wide_unsigned, wide_signed = builder.bitcast(unsigned, V32I16), builder.bitcast(signed, V32I16)
    pairs = (
        (builder.and_(wide_unsigned, constant(V32I16, 0xFF)), builder.ashr(builder.shl(wide_signed, eight), eight)),
        (builder.lshr(wide_unsigned, eight), builder.ashr(wide_signed, eight)),
    )
    v32i32 = ir.VectorType(I32, 32)
    picks = [ir.Constant(VI32, list(range(start, 32, 2))) for start in (0, 1)]
    for a, b in pairs:
        product = builder.mul(builder.sext(a, v32i32), builder.sext(b, v32i32))
        even, odd = (builder.shuffle_vector(product, product, pick) for pick in picks)
        acc = builder.add(acc, builder.add(even, odd))
    return acc


def emit_dot4(isa: Isa, builder, acc, unsigned, signed):
    """acc + groups of four unsigned-by-signed byte products; LLVM values <16 x i32>."""
    if isa.has_avx512:
        return call_llvm(builder, "llvm.x86.avx512.vpdpbusd.512", VI32, acc, unsigned, signed)
    if isa.name == "avxvnni":
        parts = zip(*(in_parts(builder, value, V8I32) for value in (acc, unsigned, signed)))
        return together(builder, [emit_dot4_256(isa, builder, *operands) for operands in parts])
    return _even_odd(builder, acc, unsigned, signed)


def pair(low: int, high: int) -> int:
    """Two int16 as one int32."""
    return (low & 0xFFFF) | (high & 0xFFFF) << 16


def pairs_of(b, low, high):
    """Two <16 x i32> whose values fit in int16 as one of int16 pairs."""
    low = b.and_(low, constant(VI32, 0xFFFF))
    return b.or_(low, b.shl(high, constant(VI32, 16)))


def emit_dot2_256(isa: Isa, builder, acc, a, b):
    """As emit_dot2 on 256 bits, of "avxvnni" and "avx2"; acc is <8 x i32>, a and b are <16 x i16>."""
    if isa.name == "avxvnni":
        a, b = (builder.bitcast(value, V8I32) for value in (a, b))
        return call_llvm(builder, "llvm.x86.avx512.vpdpwssd.256", V8I32, acc, a, b)
    return builder.add(acc, call_llvm(builder, "llvm.x86.avx2.pmadd.wd", V8I32, a, b))


def emit_dot2(isa: Isa, builder, acc, a, b):
    """acc + pairs of int16 products, exact in int32; LLVM values <16 x i32> holding 32 int16."""
    if isa.has_avx512:
        return call_llvm(builder, "llvm.x86.avx512.vpdpwssd.512", VI32, acc, a, b)
    if isa.has_avx2:
        parts = zip(in_parts(builder, acc, V8I32), in_parts(builder, a, V16I16), in_parts(builder, b, V16I16))
        return together(builder, [emit_dot2_256(isa, builder, *operands) for operands in parts])
    wide = ir.VectorType(I32, 32)
    a, b = (builder.sext(builder.bitcast(value, V32I16), wide) for value in (a, b))
    product = builder.mul(a, b)
    picks = [ir.Constant(VI32, list(range(start, 32, 2))) for start in (0, 1)]
    even, odd = (builder.shuffle_vector(product, product, pick) for pick in picks)
    return builder.add(acc, builder.add(even, odd))


def emit_dot_bf16(isa: Isa, builder, acc, a, b):
    """acc + pairs of bf16 products; a, b are LLVM values <16 x i32> holding 32 bf16."""
    if isa.has_bf16:
        pairs = ir.VectorType(_BFloat(), 32)
        a, b = builder.bitcast(a, pairs), builder.bitcast(b, pairs)
        return call_llvm(builder, "llvm.x86.avx512bf16.dpbf16ps.512", VF32, acc, a, b)
    for widen in (low_halves, high_halves):
        acc = fma_value(builder, widen(builder, a), widen(builder, b), acc)
    return acc


def line_products(isa: Isa, dtype: str):
    """How words of fp32 or bf16, or halves of fp16, meet inputs: [(what becomes of them, acc + their products)].

    Where the CPU cannot multiply bf16 there are two: the even numbers and the odd ones are widened, and the other
    operand lies in memory as two registers of float32.
    """
    if dtype == "fp32":
        return [(as_floats, _widened_product)]
    if dtype == "fp16":
        return [(lambda b, line: b.fpext(line, ir.VectorType(F32, line.type.count)), _widened_product)]
    if isa.has_bf16:
        return [(lambda b, line: line, lambda b, acc, line, x: emit_dot_bf16(isa, b, acc, line, x))]
    return [(low_halves, _widened_product), (high_halves, _widened_product)]


def _widened_product(b, acc, line, x):
    """acc + line * x in float32; x: words of the same number."""
    return fma_value(b, line, as_floats(b, x), acc)


def as_floats(builder, words):
    """The same bits as float32."""
    return builder.bitcast(words, ir.VectorType(F32, words.type.count))


def low_halves(builder, pairs):
    """The even bf16 of each pair, widened."""
    return as_floats(builder, builder.shl(pairs, constant(pairs.type, 16)))


def high_halves(builder, pairs):
    """The odd bf16 of each pair, widened."""
    return as_floats(builder, builder.and_(pairs, constant(pairs.type, 0xFFFF0000)))


def emit_round_bf16(isa: Isa, builder, vector):
    """<16 x float> -> <16 x i16>, bf16 rounded to nearest even; denormal numbers may become 0."""
    if not isa.has_bf16:
        return round_to_bf16(builder, vector)
    rounded = call_llvm(builder, "llvm.x86.avx512bf16.cvtneps2bf16.512", ir.VectorType(_BFloat(), 16), vector)
    return builder.bitcast(rounded, VI16)
