"""What the layers of gpt-oss and Qwen3-Next have beside those of others, one pass each over rows of float32.

clamped_silu_mul  y = (u + 1) * (g / (1 + exp(-alpha g))), g = min(gate, limit), u = up between -limit and limit
add_expert_bias   y[place] += bias[expert of the place]
sigmoid_mul       y *= 1 / (1 + exp(-gate))
add_sinks         y[r, h] *= 1 / (1 + exp(s[h] - lse[r, h]))
"""

import math

import numpy as np
from numba import types

from cpu_kernels.small.elementwise_sizes import SILU_UNITS
from cpu_kernels.small.picks import busy_expert, busy_experts
from cpu_kernels.small.route_sizes import BIAS_FEATURES
from cpu_kernels.team.arguments import CLAMPED, EXPERT_BIAS, SIGMOID_MUL, SINKS
from cpu_kernels.team.chunks import parameter, real_parameter, take
from cpu_kernels.vectors.arithmetic import add, div, exp, mul, sub, vmax, vmin
from cpu_kernels.vectors.scalar import least, load_i32, load_scalar
from cpu_kernels.vectors.vector import load_f32, load_f32_tail, splat, store_f32, store_f32_tail

ZERO, ONE = np.float32(0.0), np.float32(1.0)


def clamped_silu_mul():
    def kernel(arguments, thread):
        gate_up, in_stride = parameter(arguments, CLAMPED.gate_up), parameter(arguments, CLAMPED.gate_up_row)
        out, out_stride = parameter(arguments, CLAMPED.out), parameter(arguments, CLAMPED.out_row)
        rows, units = parameter(arguments, CLAMPED.rows), parameter(arguments, CLAMPED.units)
        limit = types.float32(real_parameter(arguments, CLAMPED.limit))
        high, low = splat(limit), splat(types.float32(-limit))
        factor = splat(types.float32(-real_parameter(arguments, CLAMPED.alpha)))
        parts = (units + SILU_UNITS - 1) // SILU_UNITS
        chunk = take(arguments, 0)
        while chunk < rows * parts:
            row, first = chunk // parts, chunk % parts * SILU_UNITS
            for unit in range(first, least(units, first + SILU_UNITS)):
                at = gate_up + row * in_stride + 128 * unit
                gate, up = vmin(load_f32(at), high), vmax(vmin(load_f32(at + 64), high), low)
                gated = div(gate, add(splat(ONE), exp(mul(gate, factor))))
                store_f32(mul(add(up, splat(ONE)), gated), out + row * out_stride + 64 * unit)
            chunk = take(arguments, 0)

    return kernel


def add_expert_bias():
    """Kernel; a chunk is some features of all places of an expert that has picks."""

    def kernel(arguments, thread):
        bias, bias_stride = parameter(arguments, EXPERT_BIAS.bias), parameter(arguments, EXPERT_BIAS.bias_row)
        first, count = parameter(arguments, EXPERT_BIAS.first), parameter(arguments, EXPERT_BIAS.count)
        starts = parameter(arguments, EXPERT_BIAS.starts)
        out, out_stride = parameter(arguments, EXPERT_BIAS.out), parameter(arguments, EXPERT_BIAS.out_row)
        features = parameter(arguments, EXPERT_BIAS.features)
        parts = (features + BIAS_FEATURES - 1) // BIAS_FEATURES
        chunks = busy_experts(starts, first, count)[0] * parts
        before, e = 0, first  # experts with picks before e; chunks come in order
        chunk = take(arguments, 0)
        while chunk < chunks:
            e = busy_expert(starts, e, chunk // parts - before)
            before = chunk // parts
            start, added_at = chunk % parts * BIAS_FEATURES, bias + (e - first) * bias_stride
            for place in range(load_i32(starts + 4 * e), load_i32(starts + 4 * e + 4)):
                for i in range(start, least(features, start + BIAS_FEATURES), 16):
                    at, left = out + place * out_stride + 4 * i, features - i
                    added = load_f32_tail(added_at + 4 * i, left)
                    store_f32_tail(add(load_f32_tail(at, left), added), at, left)
            chunk = take(arguments, 0)

    return kernel


def add_sinks():
    """Kernel; a chunk is all heads of a row."""

    def kernel(arguments, thread):
        sinks, head_dim = parameter(arguments, SINKS.sinks), parameter(arguments, SINKS.head_dim)
        out, out_stride = parameter(arguments, SINKS.out), parameter(arguments, SINKS.out_row)
        head_stride, lse = parameter(arguments, SINKS.out_head), parameter(arguments, SINKS.lse)
        lse_stride, rows, heads = (
            parameter(arguments, SINKS.lse_row),
            parameter(arguments, SINKS.rows),
            parameter(arguments, SINKS.heads),
        )
        row = take(arguments, 0)
        while row < rows:
            for head in range(heads):
                behind = load_scalar(sinks + 4 * head) - load_scalar(lse + row * lse_stride + 4 * head)
                factor = splat(types.float32(1.0 / (1.0 + math.exp(types.float64(behind)))))
                for i in range(0, head_dim, 16):
                    at, left = out + row * out_stride + head * head_stride + 4 * i, head_dim - i
                    store_f32_tail(mul(load_f32_tail(at, left), factor), at, left)
            row = take(arguments, 0)

    return kernel


def sigmoid_mul():
    """Kernel; a chunk is a unit of a row."""

    def kernel(arguments, thread):
        gate, gate_stride = parameter(arguments, SIGMOID_MUL.gate), parameter(arguments, SIGMOID_MUL.gate_row)
        out, out_stride = parameter(arguments, SIGMOID_MUL.out), parameter(arguments, SIGMOID_MUL.out_row)
        gate_unit, out_unit = (
            parameter(arguments, SIGMOID_MUL.gate_unit),
            parameter(arguments, SIGMOID_MUL.out_unit),
        )
        rows, units, features = (
            parameter(arguments, SIGMOID_MUL.rows),
            parameter(arguments, SIGMOID_MUL.units),
            parameter(arguments, SIGMOID_MUL.features),
        )
        chunk = take(arguments, 0)
        while chunk < rows * units:
            source = gate + chunk // units * gate_stride + chunk % units * gate_unit
            to = out + chunk // units * out_stride + chunk % units * out_unit
            for i in range(0, features, 16):
                left = features - i
                power = exp(sub(splat(ZERO), load_f32_tail(source + 4 * i, left)))
                store_f32_tail(div(load_f32_tail(to + 4 * i, left), add(splat(ONE), power)), to + 4 * i, left)
            chunk = take(arguments, 0)

    return kernel
