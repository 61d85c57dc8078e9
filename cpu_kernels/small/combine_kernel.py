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
from cpu_kernels.team.arguments import COMBINE, NORM_HEADS, SCALE_ROWS
from cpu_kernels.team.chunks import parameter, real_parameter, take
from cpu_kernels.vectors.arithmetic import fma, mul, sum_lanes
from cpu_kernels.vectors.compiler import helper
from cpu_kernels.vectors.scalar import least, load_i32, load_scalar
from cpu_kernels.vectors.vector import load_f32_tail, splat, store_f32_tail

ZERO = np.float32(0.0)


def combine():
    def kernel(arguments, thread):
        near, near_stride = parameter(arguments, COMBINE.near), parameter(arguments, COMBINE.near_row)
        far, far_stride, border = (
            parameter(arguments, COMBINE.far),
            parameter(arguments, COMBINE.far_row),
            load_i32(parameter(arguments, COMBINE.border)),
        )
        places, weights, weights_stride = (
            parameter(arguments, COMBINE.places),
            parameter(arguments, COMBINE.weights),
            parameter(arguments, COMBINE.weights_row),
        )
        out, out_stride = parameter(arguments, COMBINE.out), parameter(arguments, COMBINE.out_row)
        rows, picks, features = (
            parameter(arguments, COMBINE.rows),
            parameter(arguments, COMBINE.picks),
            parameter(arguments, COMBINE.features),
        )
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
    def kernel(arguments, thread):
        factors, factor_row = parameter(arguments, SCALE_ROWS.factors), parameter(arguments, SCALE_ROWS.factor_row)
        out, out_stride = parameter(arguments, SCALE_ROWS.out), parameter(arguments, SCALE_ROWS.out_row)
        rows, features = parameter(arguments, SCALE_ROWS.rows), parameter(arguments, SCALE_ROWS.features)
        row = take(arguments, 0)
        while row < rows:
            factor = splat(load_scalar(factors + row * factor_row))
            for i in range(0, features, 16):
                at, left = out + row * out_stride + 4 * i, features - i
                store_f32_tail(mul(load_f32_tail(at, left), factor), at, left)
            row = take(arguments, 0)

    return kernel


@helper
def norm_parts(first, stride, kv_heads, width, weight, eps):
    """Norm the `width` numbers at `first` of every KV head, `stride` bytes apart, by one factor."""
    total = splat(ZERO)
    for kv_head in range(kv_heads):
        for i in range(0, width, 16):
            value = load_f32_tail(first + kv_head * stride + 4 * i, width - i)
            total = fma(value, value, total)
    mean = types.float64(sum_lanes(total)) / (kv_heads * width)
    factor = splat(types.float32(1.0 / math.sqrt(mean + eps)))
    for kv_head in range(kv_heads):
        for i in range(0, width, 16):
            at, left = first + kv_head * stride + 4 * i, width - i
            scale = load_f32_tail(weight + 4 * (kv_head * width + i), left)
            store_f32_tail(mul(mul(load_f32_tail(at, left), factor), scale), at, left)


def norm_heads():
    """Kernel; q_width, k_width: features of a KV head's queries and of its key."""

    def kernel(arguments, thread):
        qkv, stride, unit = (
            parameter(arguments, NORM_HEADS.qkv),
            parameter(arguments, NORM_HEADS.qkv_row),
            parameter(arguments, NORM_HEADS.qkv_unit),
        )
        rows, kv_heads, q_width = (
            parameter(arguments, NORM_HEADS.rows),
            parameter(arguments, NORM_HEADS.kv_heads),
            parameter(arguments, NORM_HEADS.q_width),
        )
        k_width, eps = parameter(arguments, NORM_HEADS.k_width), real_parameter(arguments, NORM_HEADS.eps)
        chunk = take(arguments, 0)
        while chunk < 2 * rows:
            at = qkv + chunk // 2 * stride
            if chunk % 2:
                norm_parts(at + 4 * q_width, unit, kv_heads, k_width, parameter(arguments, NORM_HEADS.k_norm), eps)
            else:
                norm_parts(at, unit, kv_heads, q_width, parameter(arguments, NORM_HEADS.q_norm), eps)
            chunk = take(arguments, 0)

    return kernel
