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
F32x8 = VectorType("F32x8", ir.VectorType(F32, 8))
I32x16 = VectorType("I32x16", VI32)


def float_vector(lanes: int) -> VectorType:
    """numba's type of 8 or 16 float32."""
    return {8: F32x8, 16: F32x16}[lanes]


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


def unknown(builder, address):
    """The same address by a way that LLVM does not see through: what lies there is loaded once more, not kept."""
    return builder.asm(ir.FunctionType(address.type, [address.type]), "", "=r,0", [address], False)


def in_order(builder, registers):
    """The same registers, on x86, by a way of no instruction: what follows LLVM begins after it, and so keeps less at
    once."""
    count, kind = len(registers), registers[0].type
    ties = ",".join(["=v"] * count + [str(place) for place in range(count)])
    together = ir.FunctionType(ir.LiteralStructType([kind] * count), [kind] * count)
    kept = builder.asm(together, "", ties, registers, True)
    return [builder.extract_value(kept, place) for place in range(count)]


def store_as(builder, value, address, offset=0):
    """Unaligned store of one LLVM value."""
    builder.store(value, pointer(builder, address, value.type, offset), align=1 if value.type in (VI8, I8) else 2)


def splat_value(builder, scalar, lanes=LANES):
    """The scalar in all lanes."""
    undefined = ir.Constant(ir.VectorType(scalar.type, lanes), ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(I32, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(I32, lanes), [0] * lanes))


def fma_value(builder, a, b, c):
    """a * b + c in one rounding, of vectors of any length."""
    return call_llvm(builder, f"llvm.fma.v{a.type.count}f32", a.type, a, b, c)


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


@emits(types.void, F32x16, intp, intp)
def store_half_tail(b, vector, address, count):
    """The first `count` lanes rounded to float16."""
    halves = b.bitcast(b.fptrunc(vector, VHALF), VI16)
    masked_store(b, halves, address, lanes_below(b, count), "v16i16")


@emits(F32x16, F32x16)
def as_half(b, vector):
    """Each lane rounded to float16 and widened again."""
    return b.fpext(b.fptrunc(vector, VHALF), VF32)


@emits(types.void, intp, intp)
def prefetch(b, address, offset):
    """Ask for the line at address + offset; see `prefetch_value`."""
    prefetch_value(b, b.add(address, offset))
