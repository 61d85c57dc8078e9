"""Vector registers for numba: two value types of 16 lanes, F32x16 and I32x16, and the instructions on them.

numba compiles scalars and leaves the vectors to LLVM's guess. Here a kernel says what it means: a value of type F32x16
is one LLVM `<16 x float>` and `fma(a, b, c)` one instruction; LLVM splits it where the machine's registers are
narrower, so the same kernel text serves AVX-512, AVX2 and arm64. Addresses are plain integers (bytes); nothing is
bounds checked. An I32x16 also carries 64 bytes of packed weights or 32 bf16 pairs: only the dot products of isa.py
know which.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.extending import intrinsic, register_model

LANES = 16

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
HALF, F32, F64 = ir.HalfType(), ir.FloatType(), ir.DoubleType()
VF32, VI32 = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)
VI16, VI8, VHALF = (ir.VectorType(scalar, LANES) for scalar in (I16, I8, HALF))

intp, int32, float32, float64 = types.intp, types.int32, types.float32, types.float64


class VectorType(types.Type):
    """numba's view of a 16-lane register; `be_type` is its LLVM type."""

    def __init__(self, name: str, be_type: ir.Type):
        super().__init__(name=name)
        self.be_type = be_type


F32x16 = VectorType("F32x16", VF32)
I32x16 = VectorType("I32x16", VI32)


@register_model(VectorType)
class VectorModel(models.PrimitiveModel):
    """A vector is an LLVM value like any scalar."""

    def __init__(self, manager, numba_type):
        super().__init__(manager, numba_type, numba_type.be_type)


def emits(result, *arguments):
    """Decorator: turn `emit(builder, *llvm_values) -> llvm_value | None` into a numba intrinsic of that signature."""

    def decorate(emit):
        def codegen(context, builder, signature, values):
            value = emit(builder, *values)
            return context.get_dummy_value() if value is None else value

        typed = result(*arguments), codegen
        # numba reads an intrinsic's arity from its Python signature, so there is one lambda per arity.
        arity = (
            lambda context: typed,
            lambda context, a: typed,
            lambda context, a, b: typed,
            lambda context, a, b, c: typed,
            lambda context, a, b, c, d: typed,
            lambda context, a, b, c, d, e: typed,
            lambda context, a, b, c, d, e, f: typed,
            lambda context, a, b, c, d, e, f, g: typed,
            lambda context, a, b, c, d, e, f, g, h: typed,
        )[len(arguments)]
        arity.__name__ = arity.__qualname__ = emit.__name__
        arity.__doc__ = emit.__doc__
        return intrinsic(arity)

    return decorate


def constant(vector_type, value):
    """A splat constant of an LLVM vector type."""
    return ir.Constant(vector_type, [value] * vector_type.count)


def call_llvm(builder, name, result, *values):
    """Call the LLVM intrinsic `name` with these operands."""
    function_type = ir.FunctionType(result, [value.type for value in values])
    return builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), values)


def pointer(builder, address, pointee, offset=0):
    """`address + offset` as a typed pointer; a constant offset folds into the addressing mode."""
    base = builder.inttoptr(address, I8.as_pointer())
    if offset:
        base = builder.gep(base, [ir.Constant(I64, offset)])
    return builder.bitcast(base, pointee.as_pointer())


def load_as(builder, address, pointee, offset=0):
    """Unaligned load of one LLVM value."""
    scalar = pointee.element if isinstance(pointee, ir.VectorType) else pointee
    return builder.load(pointer(builder, address, pointee, offset), align=1 if scalar in (I8,) else 2)


def store_as(builder, value, address, offset=0):
    """Unaligned store of one LLVM value."""
    builder.store(value, pointer(builder, address, value.type, offset), align=1 if value.type in (VI8, I8) else 2)


def splat_value(builder, scalar):
    """The scalar in all 16 lanes."""
    vector_type = ir.VectorType(scalar.type, LANES)
    undefined = ir.Constant(vector_type, ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(I32, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(VI32, [0] * LANES))


def fma_value(builder, a, b, c):
    """a * b + c in one rounding."""
    return call_llvm(builder, "llvm.fma.v16f32", VF32, a, b, c)


def lanes_below(builder, count):
    """Mask of the first `count` lanes; count is an i64, any value."""
    clamped = builder.select(builder.icmp_signed(">", count, ir.Constant(I64, LANES)), ir.Constant(I64, LANES), count)
    lanes, limit = ir.Constant(VI32, list(range(LANES))), splat_value(builder, builder.trunc(clamped, I32))
    return builder.icmp_signed("<", lanes, limit)


def masked_load(builder, address, vector_type, mask, suffix):
    """Lanes outside the mask read 0 and touch no memory."""
    where = pointer(builder, address, vector_type)
    arguments = [where, ir.Constant(I32, 2), mask, constant(vector_type, 0)]
    function_type = ir.FunctionType(vector_type, [value.type for value in arguments])
    return builder.call(
        cgutils.get_or_insert_function(builder.module, function_type, f"llvm.masked.load.{suffix}.p0"), arguments
    )


def masked_store(builder, value, address, mask, suffix):
    """Lanes outside the mask are not written."""
    where = pointer(builder, address, value.type)
    arguments = [value, where, ir.Constant(I32, 2), mask]
    function_type = ir.FunctionType(ir.VoidType(), [item.type for item in arguments])
    builder.call(
        cgutils.get_or_insert_function(builder.module, function_type, f"llvm.masked.store.{suffix}.p0"), arguments
    )


def picked(b, left, right, lanes):
    """These lanes of two vectors."""
    return b.shuffle_vector(left, right, ir.Constant(ir.VectorType(I32, len(lanes)), lanes))


def prefetch_value(b, address, offset=0):
    """Ask for the line at `address + offset` in the second cache level; any address is allowed.

    A request for the first level holds one of its few miss buffers until the line has come from DRAM, and the loads
    behind it stall: on Zen 4 one core then streams weights 10 to 15 % slower.
    """
    where = b.gep(b.inttoptr(address, I8.as_pointer()), [ir.Constant(I64, offset)])
    call_llvm(b, "llvm.prefetch.p0", ir.VoidType(), where, *(ir.Constant(I32, value) for value in (0, 2, 1)))


@emits(F32x16, float32)
def splat(b, scalar):
    """float32 -> F32x16."""
    return splat_value(b, scalar)


@emits(F32x16, intp)
def load_f32(b, address):
    """16 float32 at an address."""
    return load_as(b, address, VF32)


@emits(F32x16, intp, intp)
def load_f32_tail(b, address, count):
    """The first `count` float32, 0 in the other lanes, which touch no memory."""
    return masked_load(b, address, VF32, lanes_below(b, count), "v16f32")


@emits(types.void, F32x16, intp)
def store_f32(b, vector, address):
    """16 float32 at an address."""
    store_as(b, vector, address)


@emits(types.void, F32x16, intp, intp)
def store_f32_tail(b, vector, address, count):
    """The first `count` lanes only."""
    masked_store(b, vector, address, lanes_below(b, count), "v16f32")


@emits(I32x16, intp)
def load_line(b, address):
    """64 bytes at an address."""
    return load_as(b, address, VI32)


@emits(types.void, I32x16, intp)
def store_line(b, vector, address):
    """64 bytes at an address."""
    store_as(b, vector, address)


@emits(I32x16, I32x16, I32x16)
def exclusive_or(b, x, y):
    """x ^ y."""
    return b.xor(x, y)


def widen_halves(b, halves, kind):
    """<16 x i16> holding bf16 (kind 1) or float16 (kind 2) -> <16 x float>."""
    if kind == 1:
        return b.bitcast(b.shl(b.zext(halves, VI32), constant(VI32, 16)), VF32)
    return b.fpext(b.bitcast(halves, VHALF), VF32)


@emits(F32x16, intp, intp)
def load_bf16_tail(b, address, count):
    """The first `count` bf16, 0 in the other lanes."""
    return widen_halves(b, masked_load(b, address, VI16, lanes_below(b, count), "v16i16"), 1)


@emits(F32x16, intp, intp)
def load_half_tail(b, address, count):
    """The first `count` float16, 0 in the other lanes."""
    return widen_halves(b, masked_load(b, address, VI16, lanes_below(b, count), "v16i16"), 2)


def round_to_bf16(b, vector):
    """<16 x float> -> <16 x i16>: round to nearest even; a NaN keeps its sign and stays a NaN."""
    bits = b.bitcast(vector, VI32)
    odd = b.and_(b.lshr(bits, constant(VI32, 16)), constant(VI32, 1))
    rounded = b.add(bits, b.add(odd, constant(VI32, 0x7FFF)))
    quiet = b.or_(bits, constant(VI32, 0x400000))
    is_nan = b.icmp_unsigned(">", b.and_(bits, constant(VI32, 0x7FFFFFFF)), constant(VI32, 0x7F800000))
    return b.trunc(b.lshr(b.select(is_nan, quiet, rounded), constant(VI32, 16)), VI16)


@emits(types.void, F32x16, intp)
def store_bf16(b, vector, address):
    """16 lanes rounded to bf16."""
    store_as(b, round_to_bf16(b, vector), address)


@emits(types.void, F32x16, intp, intp)
def store_bf16_tail(b, vector, address, count):
    """The first `count` lanes rounded to bf16."""
    masked_store(b, round_to_bf16(b, vector), address, lanes_below(b, count), "v16i16")


@emits(F32x16, F32x16)
def as_half(b, vector):
    """Each lane rounded to float16 and widened again."""
    return b.fpext(b.fptrunc(vector, VHALF), VF32)


@emits(F32x16, F32x16, F32x16, F32x16)
def fma(b, x, y, z):
    """x * y + z."""
    return fma_value(b, x, y, z)


@emits(F32x16, F32x16, F32x16)
def add(b, x, y):
    """x + y."""
    return b.fadd(x, y)


@emits(F32x16, F32x16, F32x16)
def sub(b, x, y):
    """x - y."""
    return b.fsub(x, y)


@emits(F32x16, F32x16, F32x16)
def mul(b, x, y):
    """x * y."""
    return b.fmul(x, y)


@emits(F32x16, F32x16, F32x16)
def div(b, x, y):
    """x / y, correctly rounded."""
    return b.fdiv(x, y)


@emits(F32x16, F32x16, F32x16)
def vmax(b, x, y):
    """Lane-wise maximum; a NaN in x loses."""
    return b.select(b.fcmp_ordered(">", x, y), x, y)


@emits(F32x16, F32x16, F32x16)
def vmin(b, x, y):
    """Lane-wise minimum; a NaN in x loses."""
    return b.select(b.fcmp_ordered("<", x, y), x, y)


@emits(F32x16, F32x16)
def vabs(b, x):
    """Every lane without its sign."""
    return b.bitcast(b.and_(b.bitcast(x, VI32), constant(VI32, 0x7FFFFFFF)), VF32)


@emits(F32x16, F32x16)
def round_even(b, x):
    """Nearest integer, halves to even."""
    return call_llvm(b, "llvm.rint.v16f32", VF32, x)


def butterfly(stride: int):
    """Intrinsic x: every pair of lanes (i, i + stride), a power of two below 16, becomes (sum, difference)."""

    @emits(F32x16, F32x16)
    def add_and_subtract(b, x):
        partner = b.shuffle_vector(x, x, ir.Constant(VI32, [lane ^ stride for lane in range(LANES)]))
        signs = ir.Constant(VF32, [-1.0 if lane & stride else 1.0 for lane in range(LANES)])
        return fma_value(b, x, signs, partner)  # rounds once, as the sum and the difference do

    return add_and_subtract


@emits(F32x16, F32x16, intp, float32)
def keep_below(b, x, count, other):
    """Lanes at or above `count` become `other`."""
    return b.select(lanes_below(b, count), x, splat_value(b, other))


@emits(F32x16, F32x16, intp, float32)
def keep_from(b, x, first, other):
    """Lanes below `first` become `other`."""
    return b.select(lanes_below(b, first), splat_value(b, other), x)


@emits(float32, F32x16)
def sum_lanes(b, x):
    """Sum of the lanes as a tree."""
    name = "llvm.vector.reduce.fadd.v16f32"
    function_type = ir.FunctionType(F32, [F32, VF32])
    function = cgutils.get_or_insert_function(b.module, function_type, name)
    return b.call(function, [ir.Constant(F32, -0.0), x], fastmath=("reassoc",))


@emits(float32, F32x16)
def max_lanes(b, x):
    """The largest of the lanes."""
    return call_llvm(b, "llvm.vector.reduce.fmax.v16f32", F32, x)


@emits(float32, F32x16)
def min_lanes(b, x):
    """The smallest of the lanes."""
    return call_llvm(b, "llvm.vector.reduce.fmin.v16f32", F32, x)


def exp_value(b, x):
    """e**x to 1e-7 relative: 2**k * p(r), r = x - k ln2; x below -87.3 (also -inf) gives 0, NaN stays NaN."""
    low = constant(VF32, -87.33654)
    clamped = b.select(b.fcmp_unordered(">", x, low), x, low)
    clamped = b.select(b.fcmp_unordered("<", clamped, constant(VF32, 88.72283)), clamped, constant(VF32, 88.72283))
    k = call_llvm(b, "llvm.rint.v16f32", VF32, b.fmul(clamped, constant(VF32, 1.4426950408889634)))
    r = fma_value(b, k, constant(VF32, -0.693145751953125), clamped)
    r = fma_value(b, k, constant(VF32, -1.4286068203094173e-06), r)
    p = constant(VF32, 1.9875691500e-4)
    for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = fma_value(b, p, r, constant(VF32, coefficient))
    p = b.fadd(fma_value(b, p, b.fmul(r, r), r), constant(VF32, 1.0))
    # Two halves of the exponent, because k may reach 128, which one float32 exponent does not hold.
    half = b.ashr(b.fptosi(b.select(b.fcmp_ordered("ord", k, k), k, constant(VF32, 0.0)), VI32), constant(VI32, 1))
    rest = b.sub(b.fptosi(b.select(b.fcmp_ordered("ord", k, k), k, constant(VF32, 0.0)), VI32), half)
    for exponent in (half, rest):
        p = b.fmul(p, b.bitcast(b.shl(b.add(exponent, constant(VI32, 127)), constant(VI32, 23)), VF32))
    return b.select(b.fcmp_ordered("<", x, low), constant(VF32, 0.0), p)


@emits(F32x16, F32x16)
def exp(b, x):
    """e**x per lane; exp(-inf) is 0."""
    return exp_value(b, x)


EXP2_COEFFICIENTS = (1.322590391e-3, 9.675672976e-3, 5.550861728e-2, 2.402213057e-1, 6.931469254e-1, 1.0)


@emits(F32x16, F32x16)
def exp2_not_positive(b, x):
    """2**x for x <= 0 to 2.2e-7 relative: below -126 it is 0, NaN stays NaN. The inner loop of softmax.

    2**r for |r| <= 1/2 is a minimax polynomial; the integer part is added to the exponent bits. It is had without
    conversions: x + 1.5 * 2**23 has it in its low bits.
    """
    low, magic = constant(VF32, -126.0), constant(VF32, 12582912.0)
    clamped = b.select(b.fcmp_unordered(">", x, low), x, low)
    shifted = b.fadd(clamped, magic)
    r = b.fsub(clamped, b.fsub(shifted, magic))
    p = constant(VF32, EXP2_COEFFICIENTS[0])
    for coefficient in EXP2_COEFFICIENTS[1:]:
        p = fma_value(b, p, r, constant(VF32, coefficient))
    scaled = b.bitcast(b.add(b.bitcast(p, VI32), b.shl(b.bitcast(shifted, VI32), constant(VI32, 23))), VF32)
    scaled = b.select(b.fcmp_ordered("<", x, low), constant(VF32, 0.0), scaled)
    return b.select(b.fcmp_unordered("uno", x, x), x, scaled)


@emits(types.void, intp, intp)
def prefetch(b, address, offset):
    """Ask for the line at address + offset; see `prefetch_value`."""
    prefetch_value(b, b.add(address, offset))
