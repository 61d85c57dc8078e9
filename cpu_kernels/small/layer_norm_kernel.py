"""layer_norm: y = (x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps) * weight (+ bias), one row at a time."""

import math

import numpy as np
from numba import types

from cpu_kernels.team.arguments import LAYER_NORM
from cpu_kernels.team.chunks import parameter, real_parameter, take
from cpu_kernels.vectors.arithmetic import add, fma, keep_below, mul, sub, sum_lanes
from cpu_kernels.vectors.compiler import helper
from cpu_kernels.vectors.vector import load_f32_tail, splat, store_f32_tail

ZERO = np.float32(0.0)


@helper
def mean_of(x, count):
    """The mean of `count` float32."""
    total = splat(ZERO)
    for i in range(0, count, 16):
        total = add(total, load_f32_tail(x + 4 * i, count - i))
    return types.float32(types.float64(sum_lanes(total)) / count)


@helper
def inverse_deviation(x, count, mean, eps):
    """1 / sqrt(mean((x - mean)^2) + eps) of `count` float32."""
    total, middle = splat(ZERO), splat(mean)
    for i in range(0, count, 16):
        apart = keep_below(sub(load_f32_tail(x + 4 * i, count - i), middle), count - i, ZERO)
        total = fma(apart, apart, total)
    return types.float32(1.0 / math.sqrt(types.float64(sum_lanes(total)) / count + eps))


def layer_norm(has_bias: bool = False):
    """Kernel; has_bias: whether one is added."""

    @helper
    def result(value, bias, left):
        return add(value, load_f32_tail(bias, left)) if has_bias else value

    def kernel(arguments, thread):
        x, x_stride = parameter(arguments, LAYER_NORM.x), parameter(arguments, LAYER_NORM.x_row)
        weight, bias = parameter(arguments, LAYER_NORM.weight), parameter(arguments, LAYER_NORM.bias)
        out, out_stride = parameter(arguments, LAYER_NORM.out), parameter(arguments, LAYER_NORM.out_row)
        rows, hidden = parameter(arguments, LAYER_NORM.rows), parameter(arguments, LAYER_NORM.hidden)
        eps = real_parameter(arguments, LAYER_NORM.eps)
        row = take(arguments, 0)
        while row < rows:
            source, to = x + row * x_stride, out + row * out_stride
            mean = mean_of(source, hidden)
            middle, factor = splat(mean), splat(inverse_deviation(source, hidden, mean, eps))
            for i in range(0, hidden, 16):
                left = hidden - i
                apart = sub(load_f32_tail(source + 4 * i, left), middle)
                value = mul(mul(apart, factor), load_f32_tail(weight + 4 * i, left))
                store_f32_tail(result(value, bias + 4 * i, left), to + 4 * i, left)
            row = take(arguments, 0)

    return kernel
