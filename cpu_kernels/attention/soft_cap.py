"""Soft caps: a score s becomes cap * tanh(s / cap) before the softmax, so that none is larger than the cap."""

from cpu_kernels.attention.parameters import HEAD_SCORES, LINE_BYTES
from cpu_kernels.vectors.arithmetic import exp_value, mul
from cpu_kernels.vectors.compiler import helper
from cpu_kernels.vectors.vector import VF32, F32x16, call_llvm, constant, emits, fma_value, load_f32, splat, store_f32

# tanh(x) / x in powers of x^2: exact to float32 below NEAR, where 1 - e^(-2x) would lose what there is of x.
NEAR = 0.25
COEFFICIENTS = (62.0 / 2835.0, -17.0 / 315.0, 2.0 / 15.0, -1.0 / 3.0, 1.0)


@emits(F32x16, F32x16)
def tanh(b, x):
    """tanh per lane."""
    size = call_llvm(b, "llvm.fabs.v16f32", VF32, x)
    power = exp_value(b, b.fmul(size, constant(VF32, -2.0)))
    one = constant(VF32, 1.0)
    far = call_llvm(b, "llvm.copysign.v16f32", VF32, b.fdiv(b.fsub(one, power), b.fadd(one, power)), x)
    square, near = b.fmul(x, x), constant(VF32, COEFFICIENTS[0])
    for coefficient in COEFFICIENTS[1:]:
        near = fma_value(b, near, square, constant(VF32, coefficient))
    return b.select(b.fcmp_ordered("<", size, constant(VF32, NEAR)), b.fmul(near, x), far)


@helper
def cap_scores(scores, factor, cap):
    """scores[64] -> cap * tanh(scores * factor), in place."""
    for at in range(0, HEAD_SCORES, LINE_BYTES):
        store_f32(mul(tanh(mul(load_f32(scores + at), splat(factor))), splat(cap)), scores + at)
