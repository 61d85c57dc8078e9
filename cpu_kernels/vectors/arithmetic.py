"""Arithmetic on registers of 16 float32: lane by lane, over the lanes, and exponentials."""

from llvmlite import ir
from numba.core import cgutils

from cpu_kernels.vectors.vector import (
    F32,
    LANES,
    VF32,
    VI32,
    F32x16,
    call_llvm,
    constant,
    emits,
    float32,
    fma_value,
    intp,
    lanes_below,
    splat_value,
)


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
