"""The ops between the linears, one pass each over rows of float32.

rms_norm      y = x * weight / sqrt(mean(x^2) + eps), or y += that
copy_rows     y = x
silu_mul      y = gate / (1 + exp(-gate)) * up
gelu_mul      y = gelu(gate) * up, gelu by tanh: g / (1 + exp(-2 sqrt(2 / pi) (g + 0.044715 g^3)))
gelu          y = gelu(x)
gather_columns  y_i = x_j, j = order_i
merge         w_i = exp(lse_i - max lse); out = sum w_i out_i / sum w_i; lse = max + log sum w_i
"""

import math

import numpy as np
from numba import types

from cpu_kernels.small.elementwise_sizes import COPY_FEATURES, GATHER_FEATURES, GELU_FEATURES, MERGE_ROWS, SILU_UNITS
from cpu_kernels.team.arguments import COPY_ROWS, GATED, GATHER, GELU, MERGE, RMS_NORM
from cpu_kernels.team.chunks import parameter, real_parameter, take
from cpu_kernels.vectors.arithmetic import add, div, exp, fma, keep_below, mul, sub, sum_lanes
from cpu_kernels.vectors.compiler import helper
from cpu_kernels.vectors.scalar import least, load_scalar, load_word, store_scalar
from cpu_kernels.vectors.vector import load_f32, load_f32_tail, splat, store_f32, store_f32_tail

MINUS_INFINITY, ZERO, ONE = np.float32(-np.inf), np.float32(0.0), np.float32(1.0)
GELU_FACTOR, GELU_CUBIC = np.float32(-2.0 * math.sqrt(2.0 / math.pi)), np.float32(0.044715)


@helper
def inverse_rms(x, count, eps):
    """1 / sqrt(mean(x^2) + eps) of `count` float32."""
    total, more = splat(ZERO), splat(ZERO)
    i = 0
    while i + 32 <= count:
        a, b = load_f32(x + 4 * i), load_f32(x + 4 * i + 64)
        total, more = fma(a, a, total), fma(b, b, more)
        i += 32
    while i < count:
        a = load_f32_tail(x + 4 * i, count - i)
        total = fma(a, a, total)
        i += 16
    mean = types.float64(sum_lanes(add(total, more))) / count
    return types.float32(1.0 / math.sqrt(mean + eps))


def rms_norm(adds: bool = False):
    """Kernel; adds: onto `out`."""

    @helper
    def result(value, to, left):
        return add(load_f32_tail(to, left), value) if adds else value

    def kernel(arguments, thread):
        x, x_stride, weight = (
            parameter(arguments, RMS_NORM.x),
            parameter(arguments, RMS_NORM.x_row),
            parameter(arguments, RMS_NORM.weight),
        )
        eps, out, out_stride = (
            real_parameter(arguments, RMS_NORM.eps),
            parameter(arguments, RMS_NORM.out),
            parameter(arguments, RMS_NORM.out_row),
        )
        rows, hidden = parameter(arguments, RMS_NORM.rows), parameter(arguments, RMS_NORM.hidden)
        row = take(arguments, 0)
        while row < rows:
            source, to = x + row * x_stride, out + row * out_stride
            factor = splat(inverse_rms(source, hidden, eps))
            i = 0
            while i + 16 <= hidden:
                value = mul(mul(load_f32(source + 4 * i), factor), load_f32(weight + 4 * i))
                store_f32(result(value, to + 4 * i, 16), to + 4 * i)
                i += 16
            if i < hidden:
                left = hidden - i
                value = mul(mul(load_f32_tail(source + 4 * i, left), factor), load_f32_tail(weight + 4 * i, left))
                store_f32_tail(result(value, to + 4 * i, left), to + 4 * i, left)
            row = take(arguments, 0)

    return kernel


@helper
def silu_power(gate):
    """-gate."""
    return sub(splat(ZERO), gate)


@helper
def gelu_power(gate):
    """-2 sqrt(2 / pi) (gate + 0.044715 gate^3)."""
    cubic = mul(mul(gate, gate), splat(GELU_CUBIC))
    return mul(mul(gate, splat(GELU_FACTOR)), add(splat(ONE), cubic))


def silu_mul():
    return gated(silu_power)


def gelu_mul():
    return gated(gelu_power)


def gated(power):
    """gate / (1 + exp(power(gate))) * up."""

    def kernel(arguments, thread):
        gate_up, in_stride = parameter(arguments, GATED.gate_up), parameter(arguments, GATED.gate_up_row)
        out, out_stride = parameter(arguments, GATED.out), parameter(arguments, GATED.out_row)
        rows, units = parameter(arguments, GATED.rows), parameter(arguments, GATED.units)
        parts = (units + SILU_UNITS - 1) // SILU_UNITS
        chunk = take(arguments, 0)
        while chunk < rows * parts:
            row, first = chunk // parts, chunk % parts * SILU_UNITS
            for unit in range(first, least(units, first + SILU_UNITS)):
                at = gate_up + row * in_stride + 128 * unit
                gate = load_f32(at)
                denominator = add(splat(ONE), exp(power(gate)))
                store_f32(mul(div(gate, denominator), load_f32(at + 64)), out + row * out_stride + 64 * unit)
            chunk = take(arguments, 0)

    return kernel


def gelu():
    """Kernel; of `GELU_FEATURES` features of a row at a time."""

    def kernel(arguments, thread):
        x, x_stride = parameter(arguments, GELU.x), parameter(arguments, GELU.x_row)
        out, out_stride = parameter(arguments, GELU.out), parameter(arguments, GELU.out_row)
        rows, features = parameter(arguments, GELU.rows), parameter(arguments, GELU.features)
        parts = (features + GELU_FEATURES - 1) // GELU_FEATURES
        chunk = take(arguments, 0)
        while chunk < rows * parts:
            row, first = chunk // parts, chunk % parts * GELU_FEATURES
            source, to, stop = x + row * x_stride, out + row * out_stride, least(features, first + GELU_FEATURES)
            for i in range(first, stop, 16):
                value = load_f32_tail(source + 4 * i, stop - i)
                value = div(value, add(splat(ONE), exp(gelu_power(value))))
                store_f32_tail(value, to + 4 * i, stop - i)
            chunk = take(arguments, 0)

    return kernel


def gather_columns():
    """Kernel; of `GATHER_FEATURES` features of a row at a time."""

    def kernel(arguments, thread):
        x, x_stride, order = (
            parameter(arguments, GATHER.x),
            parameter(arguments, GATHER.x_row),
            parameter(arguments, GATHER.order),
        )
        out, out_stride = parameter(arguments, GATHER.out), parameter(arguments, GATHER.out_row)
        rows, features = parameter(arguments, GATHER.rows), parameter(arguments, GATHER.features)
        parts = (features + GATHER_FEATURES - 1) // GATHER_FEATURES
        chunk = take(arguments, 0)
        while chunk < rows * parts:
            row, first = chunk // parts, chunk % parts * GATHER_FEATURES
            source, to = x + row * x_stride, out + row * out_stride
            for i in range(first, least(features, first + GATHER_FEATURES)):
                store_scalar(load_scalar(source + 4 * load_word(order + 4 * i)), to + 4 * i)
            chunk = take(arguments, 0)

    return kernel


def copy_rows():
    """Kernel; of `COPY_FEATURES` features of a row at a time."""

    def kernel(arguments, thread):
        source, source_stride = parameter(arguments, COPY_ROWS.source), parameter(arguments, COPY_ROWS.source_row)
        target, target_stride = parameter(arguments, COPY_ROWS.target), parameter(arguments, COPY_ROWS.target_row)
        rows, features = parameter(arguments, COPY_ROWS.rows), parameter(arguments, COPY_ROWS.features)
        parts = (features + COPY_FEATURES - 1) // COPY_FEATURES
        chunk = take(arguments, 0)
        while chunk < rows * parts:
            row, first = chunk // parts, chunk % parts * COPY_FEATURES
            stop = least(features, first + COPY_FEATURES)
            for i in range(first, stop, 16):
                values = load_f32_tail(source + row * source_stride + 4 * i, stop - i)
                store_f32_tail(values, target + row * target_stride + 4 * i, stop - i)
            chunk = take(arguments, 0)

    return kernel


@helper
def part_lse(arguments, part, row):
    """The lse of one partial's row."""
    return load_scalar(parameter(arguments, MERGE.part_lse_0 + 2 * part) + 4 * row)


@helper
def part_weight(arguments, part, row, m):
    """exp(lse - m) in all lanes."""
    return exp(sub(splat(part_lse(arguments, part, row)), m))


def merge():
    def kernel(arguments, thread):
        count, out, lse = (
            parameter(arguments, MERGE.count),
            parameter(arguments, MERGE.out),
            parameter(arguments, MERGE.lse),
        )
        rows, head_dim = parameter(arguments, MERGE.rows), parameter(arguments, MERGE.head_dim)
        chunk = take(arguments, 0)
        while chunk * MERGE_ROWS < rows:
            for row in range(chunk * MERGE_ROWS, least(rows, (chunk + 1) * MERGE_ROWS)):
                largest = MINUS_INFINITY
                for part in range(count):
                    value = part_lse(arguments, part, row)
                    if not value <= largest:
                        largest = value
                m = splat(ZERO if largest == MINUS_INFINITY else largest)
                total = splat(ZERO)
                for part in range(count):
                    total = add(total, part_weight(arguments, part, row, m))
                empty = largest == MINUS_INFINITY
                inverse = div(splat(ONE), splat(ONE) if empty else total)
                for i in range(0, head_dim, 16):
                    value = splat(ZERO)
                    for part in range(count):
                        source = parameter(arguments, MERGE.part_0 + 2 * part) + 4 * (row * head_dim + i)
                        weight = part_weight(arguments, part, row, m)
                        value = fma(mul(load_f32_tail(source, head_dim - i), weight), inverse, value)
                    store_f32_tail(value, out + 4 * (row * head_dim + i), head_dim - i)
                scalar = sum_lanes(keep_below(total, 1, ZERO))
                store_scalar(MINUS_INFINITY if empty else types.float32(largest + math.log(scalar)), lse + 4 * row)
            chunk = take(arguments, 0)

    return kernel
