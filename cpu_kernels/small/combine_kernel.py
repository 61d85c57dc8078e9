"""What follows experts: their outputs, weighted and added to the rows that chose them; and rows times a factor each,
given or that of a norm over all heads.

combine     y[r] = (((y[r] + w[r,0] p[r,0]) + w[r,1] p[r,1]) + ...), picks in ascending order of their experts, each
            step one rounding; so the sum is the same bits wherever an expert was computed
scale_rows  y[r] = f[r] y[r]
norm_heads  q[r] = q[r] * weight / sqrt(mean over all heads of q[r]^2 + eps), k likewise
"""

import math

import numpy as np
from numba import types

from cpu_kernels.small.route_sizes import COMBINE_FEATURES
from cpu_kernels.team.chunks import parameter, real_parameter, take
from cpu_kernels.vectors.compiler import helper
from cpu_kernels.vectors.scalar import least, load_i32, load_scalar
from cpu_kernels.vectors.vector import fma, load_f32_tail, mul, splat, store_f32_tail, sum_lanes

ZERO = np.float32(0.0)


def combine():
    """Parameters: scratch, near, its row stride, far, its row stride, where the starts say that far begins, places,
    weights, their row stride, out, its row stride, rows, picks, features."""

    def kernel(arguments, thread):
        near, near_stride = parameter(arguments, 1), parameter(arguments, 2)
        far, far_stride, border = parameter(arguments, 3), parameter(arguments, 4), load_i32(parameter(arguments, 5))
        places, weights, weights_stride = parameter(arguments, 6), parameter(arguments, 7), parameter(arguments, 8)
        out, out_stride = parameter(arguments, 9), parameter(arguments, 10)
        rows, picks, features = parameter(arguments, 11), parameter(arguments, 12), parameter(arguments, 13)
        parts = (features + COMBINE_FEATURES - 1) // COMBINE_FEATURES
        chunk = take(arguments, 0)
        while chunk < rows * parts:
            row, first = chunk // parts, chunk % parts * COMBINE_FEATURES
            for i in range(first, least(features, first + COMBINE_FEATURES), 16):
                at, left = out + row * out_stride + 4 * i, features - i
                value = load_f32_tail(at, left)
                for pick in range(picks):
                    place = load_i32(places + 4 * (row * picks + pick))
                    source = near + place * near_stride if place < border else far + place * far_stride
                    weight = splat(load_scalar(weights + row * weights_stride + 4 * pick))
                    value = fma(weight, load_f32_tail(source + 4 * i, left), value)
                store_f32_tail(value, at, left)
            chunk = take(arguments, 0)

    return kernel


def scale_rows():
    """Parameters: scratch, factors, bytes from one to the next, out, its row stride, rows, features."""

    def kernel(arguments, thread):
        factors, step = parameter(arguments, 1), parameter(arguments, 2)
        out, out_stride = parameter(arguments, 3), parameter(arguments, 4)
        rows, features = parameter(arguments, 5), parameter(arguments, 6)
        row = take(arguments, 0)
        while row < rows:
            factor = splat(load_scalar(factors + row * step))
            for i in range(0, features, 16):
                at, left = out + row * out_stride + 4 * i, features - i
                store_f32_tail(mul(load_f32_tail(at, left), factor), at, left)
            row = take(arguments, 0)

    return kernel


@helper
def norm_parts(first, stride, groups, width, weight, eps):
    """Norm the `width` numbers at `first` of every group, `stride` bytes apart, by one factor."""
    total = splat(ZERO)
    for group in range(groups):
        for i in range(0, width, 16):
            value = load_f32_tail(first + group * stride + 4 * i, width - i)
            total = fma(value, value, total)
    mean = types.float64(sum_lanes(total)) / (groups * width)
    factor = splat(types.float32(1.0 / math.sqrt(mean + eps)))
    for group in range(groups):
        for i in range(0, width, 16):
            at, left = first + group * stride + 4 * i, width - i
            scale = load_f32_tail(weight + 4 * (group * width + i), left)
            store_f32_tail(mul(mul(load_f32_tail(at, left), factor), scale), at, left)


def norm_heads():
    """Parameters: scratch, qkv, its row stride, its group stride, rows, groups, q features of a group, k features,
    q_norm, k_norm, eps."""

    def kernel(arguments, thread):
        qkv, stride, unit = parameter(arguments, 1), parameter(arguments, 2), parameter(arguments, 3)
        rows, groups, q_width = parameter(arguments, 4), parameter(arguments, 5), parameter(arguments, 6)
        k_width, eps = parameter(arguments, 7), real_parameter(arguments, 10)
        chunk = take(arguments, 0)
        while chunk < 2 * rows:
            at = qkv + chunk // 2 * stride
            if chunk % 2:
                norm_parts(at + 4 * q_width, unit, groups, k_width, parameter(arguments, 9), eps)
            else:
                norm_parts(at, unit, groups, q_width, parameter(arguments, 8), eps)
            chunk = take(arguments, 0)

    return kernel
