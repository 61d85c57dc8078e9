"""KV rows and probabilities as vector registers: what formats/pages.py describes, and the conversions that it asks
for."""

from llvmlite import ir
from numba import types

from cpu_kernels.vectors.dot import V32I16
from cpu_kernels.vectors.vector import (
    F32,
    I8,
    I16,
    I32,
    I64,
    LANES,
    VF32,
    VI8,
    VI32,
    F32x16,
    call_llvm,
    constant,
    emits,
    float32,
    fma_value,
    intp,
    load_as,
    pointer,
    round_to_bf16,
    splat_value,
    store_as,
    widen_halves,
)

V32I8 = ir.VectorType(I8, 32)


def key_rows(b, base, row_bytes, last, count):
    """Addresses of so many rows; those beyond `last`, which is not negative, repeat it."""
    yield base
    for key in range(1, count):
        number = ir.Constant(I64, key)
        number = b.select(b.icmp_signed("<", number, last), number, last)
        yield b.add(base, b.mul(number, row_bytes))


def load_codes(b, kv_dtype, address):
    """<16 x i32>: the codes of 32 dims as pairs of int16."""
    if kv_dtype == "q8":
        return b.bitcast(b.sext(load_as(b, address, V32I8), V32I16), VI32)
    both = b.zext(load_as(b, address, VI8), VI32)
    return b.and_(b.or_(both, b.shl(both, constant(VI32, 12))), constant(VI32, 0x000F000F))


def interleave(b, first, second):
    """Two lines -> (pairs of their even items, pairs of their odd items), each pair one item of either line."""
    first, second = b.bitcast(first, V32I16), b.bitcast(second, V32I16)
    v32i32 = ir.VectorType(I32, 32)
    pairs = []
    for odd in (0, 1):
        lanes = [2 * (lane // 2) + odd + (32 if lane % 2 else 0) for lane in range(32)]
        pairs.append(b.bitcast(b.shuffle_vector(first, second, ir.Constant(v32i32, lanes)), VI32))
    return pairs


@emits(F32x16, F32x16)
def as_bf16(b, vector):
    """Each lane rounded to bf16 and widened again."""
    return widen_halves(b, round_to_bf16(b, vector), 1)


@emits(float32, float32)
def bf16_scalar(b, value):
    """A float32 rounded to bf16."""
    return b.extract_element(widen_halves(b, round_to_bf16(b, splat_value(b, value)), 1), ir.Constant(I32, 0))


@emits(types.void, float32, intp)
def store_bf16_scalar(b, value, address):
    """A float32 that bf16 holds, as two bytes."""
    bits = b.lshr(b.bitcast(value, I32), ir.Constant(I32, 16))
    b.store(b.trunc(bits, I16), pointer(b, address, I16), align=1)


@emits(float32, intp)
def load_bf16_scalar(b, address):
    """One bf16 at an address, as float32."""
    bits = b.zext(b.load(pointer(b, address, I16), align=1), I32)
    return b.bitcast(b.shl(bits, ir.Constant(I32, 16)), F32)


@emits(F32x16, intp, intp)
def load_every_second(b, address, odd):
    """Of 32 float32, the 16 even ones, or the odd ones."""
    at = b.add(address, b.mul(odd, ir.Constant(I64, 4)))
    first, second = load_as(b, at, VF32), load_as(b, at, VF32, 60)
    lanes = [2 * lane for lane in range(8)] + [LANES + 1 + 2 * lane for lane in range(8)]
    return b.shuffle_vector(first, second, ir.Constant(VI32, lanes))


@emits(types.void, F32x16, intp)
def store_int8(b, vector, address):
    """Whole numbers within int8."""
    store_as(b, b.trunc(b.fptosi(vector, VI32), VI8), address)


@emits(types.void, F32x16, F32x16, intp)
def store_nibbles(b, low, high, address):
    """Codes 0..15 of 32 dims in 16 bytes, even dims in the low nibbles."""
    words = [b.fptosi(vector, VI32) for vector in (low, high)]
    even, odd = (
        b.shuffle_vector(*words, ir.Constant(VI32, [2 * lane + start for lane in range(LANES)])) for start in (0, 1)
    )
    store_as(b, b.trunc(b.or_(even, b.shl(odd, constant(VI32, 4))), VI8), address)


def widen_line(kv_dtype: str):
    """Intrinsic (codes, scale, minimum, to): a line of codes as 32 bf16."""

    @emits(types.void, intp, float32, float32, intp)
    def widen(b, codes, scale, minimum, to):
        words = load_codes(b, kv_dtype, codes)
        sixteen = constant(VI32, 16)
        halves = []
        for half in (b.ashr(b.shl(words, sixteen), sixteen), b.ashr(words, sixteen)):
            value = fma_value(b, b.sitofp(half, VF32), splat_value(b, scale), splat_value(b, minimum))
            halves.append(b.zext(round_to_bf16(b, value), VI32))
        store_as(b, b.or_(halves[0], b.shl(halves[1], sixteen)), to)

    return widen


@emits(types.void, intp)
def fetch(b, address):
    """Ask for a line; it goes to the second level, because a tile of rows may be larger than the first."""
    where = b.inttoptr(address, I8.as_pointer())
    call_llvm(b, "llvm.prefetch.p0", ir.VoidType(), where, *(ir.Constant(I32, value) for value in (0, 2, 1)))
