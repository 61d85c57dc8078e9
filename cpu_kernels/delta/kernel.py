"""delta_step: rows of gated DeltaNet between its projections, a key head and the value heads that share it at a time.

    q, k, v  = silu(sum over taps of tap * input, the newest input's last);  k = k / |k|, q = q / |q| / sqrt(key_dim)
    decay    = exp(rate * softplus(a + dt_bias)), strength = sigmoid(b)
    S        = decay S + k u^T,  u = strength (v - decay S^T k);  y = S^T q
    out      = y / sqrt(mean(y^2) + eps) * norm * silu(z)

A chunk is a key head with all rows in their order: the inputs that it keeps and the states of its value heads are
nobody else's, so a row is the same bits for any number of threads and whatever rows of other sequences stand beside it.
The state is read from memory once, and read and written once more while the caches have it.

A draft leaves its sequence's state as it is: the first one reads it and writes a spare one, from which the others go
on.

Scratch of a key head: q, k and v of a row behind the convolution, then u and y of one value head.
"""

import math

import numpy as np
from numba import types

from cpu_kernels.small.elementwise_kernel import inverse_rms
from cpu_kernels.team.arguments import DELTA
from cpu_kernels.team.chunks import fail, parameter, real_parameter, take
from cpu_kernels.vectors.arithmetic import add, div, exp, fma, mul, sub, sum_lanes
from cpu_kernels.vectors.compiler import helper
from cpu_kernels.vectors.scalar import load_i64, load_scalar
from cpu_kernels.vectors.vector import load_f32, load_f32_tail, splat, store_f32, store_f32_tail

ZERO, ONE, L2_EPS = np.float32(0.0), np.float32(1.0), 1e-6


@helper
def silu(x):
    """x / (1 + exp(-x)) of every lane."""
    return div(x, add(splat(ONE), exp(sub(splat(ZERO), x))))


@helper
def strength_of(value):
    """sigmoid(value)."""
    return types.float32(1.0 / (1.0 + math.exp(-types.float64(value))))


@helper
def decay_of(rate, value):
    """exp(rate * softplus(value)); a large value is its own softplus."""
    wide = types.float64(value)
    soft = wide if wide > 40.0 else math.log(1.0 + math.exp(wide))
    return types.float32(math.exp(types.float64(rate) * soft))


@helper
def shorten(x, width, length):
    """Give `width` numbers that length."""
    total = splat(ZERO)
    for i in range(0, width, 16):
        value = load_f32_tail(x + 4 * i, width - i)
        total = fma(value, value, total)
    factor = splat(types.float32(length / math.sqrt(types.float64(sum_lanes(total)) + L2_EPS)))
    for i in range(0, width, 16):
        store_f32_tail(mul(load_f32_tail(x + 4 * i, width - i), factor), x + 4 * i, width - i)


@helper
def change(value, recalled, decay, strength):
    """strength (value - decay recalled)."""
    return mul(strength, sub(value, mul(decay, recalled)))


@helper
def recall(state, key, key_dim, width, value, decay, strength, to):
    """What the state is changed by: `change` of S^T k, four vectors of columns at a time."""
    row, i, lower, share = 4 * width, 0, splat(decay), splat(strength)
    while i + 64 <= width:
        at, own, out = state + 4 * i, value + 4 * i, to + 4 * i
        first, second, third, fourth = splat(ZERO), splat(ZERO), splat(ZERO), splat(ZERO)
        for j in range(key_dim):
            factor = splat(load_scalar(key + 4 * j))
            first = fma(factor, load_f32(at), first)
            second = fma(factor, load_f32(at + 64), second)
            third = fma(factor, load_f32(at + 128), third)
            fourth = fma(factor, load_f32(at + 192), fourth)
            at += row
        store_f32(change(load_f32(own), first, lower, share), out)
        store_f32(change(load_f32(own + 64), second, lower, share), out + 64)
        store_f32(change(load_f32(own + 128), third, lower, share), out + 128)
        store_f32(change(load_f32(own + 192), fourth, lower, share), out + 192)
        i += 64
    while i < width:
        at, left, total = state + 4 * i, width - i, splat(ZERO)
        for j in range(key_dim):
            total = fma(splat(load_scalar(key + 4 * j)), load_f32_tail(at, left), total)
            at += row
        store_f32_tail(change(load_f32_tail(value + 4 * i, left), total, lower, share), to + 4 * i, left)
        i += 16


@helper
def step(state, lead, key, query, key_dim, width, decay, changes, to):
    """S = decay S + k u^T and y = S^T q, two vectors of columns at a time: more need more than 16 registers. lead: how
    many bytes behind S is written."""
    row, i, lower = 4 * width, 0, splat(decay)
    while i + 32 <= width:
        at, own, out = state + 4 * i, changes + 4 * i, to + 4 * i
        first, second, left_sum, right_sum = load_f32(own), load_f32(own + 64), splat(ZERO), splat(ZERO)
        for j in range(key_dim):
            factor, weight = splat(load_scalar(key + 4 * j)), splat(load_scalar(query + 4 * j))
            value = fma(factor, first, mul(lower, load_f32(at)))
            store_f32(value, at + lead)
            left_sum = fma(weight, value, left_sum)
            value = fma(factor, second, mul(lower, load_f32(at + 64)))
            store_f32(value, at + lead + 64)
            right_sum = fma(weight, value, right_sum)
            at += row
        store_f32(left_sum, out)
        store_f32(right_sum, out + 64)
        i += 32
    while i < width:
        at, left, total = state + 4 * i, width - i, splat(ZERO)
        own = load_f32_tail(changes + 4 * i, left)
        for j in range(key_dim):
            value = fma(splat(load_scalar(key + 4 * j)), own, mul(lower, load_f32_tail(at, left)))
            store_f32_tail(value, at + lead, left)
            total = fma(splat(load_scalar(query + 4 * j)), value, total)
            at += row
        store_f32_tail(total, to + 4 * i, left)
        i += 16


def passes(whole: bool):
    """(convolve, gated_norm), whose loads and stores need no masks where widths are of whole vectors."""

    @helper
    def load(address, left):
        return load_f32(address) if whole else load_f32_tail(address, left)

    @helper
    def store(value, address, left):
        if whole:
            store_f32(value, address)
        else:
            store_f32_tail(value, address, left)

    @helper
    def convolve(new, kept, lead, taps, stride, count, width, to):
        """Of `width` features, their new inputs and those kept, `stride` bytes from each to the next, which move up;
        lead: as of `step`."""
        for i in range(0, width, 16):
            left, at, tap = width - i, kept + 4 * i, taps + 4 * i
            total = mul(load(at, left), load(tap, left))
            for _ in range(count - 2):
                value = load(at + stride, left)
                store(value, at + lead, left)
                at, tap = at + stride, tap + stride
                total = fma(value, load(tap, left), total)
            value = load(new + 4 * i, left)
            store(value, at + lead, left)
            store(silu(fma(value, load(tap + stride, left), total)), to + 4 * i, left)

    @helper
    def gated_norm(y, width, norm, eps, gate, to):
        """y / sqrt(mean(y^2) + eps) * norm * silu(gate)."""
        factor = splat(inverse_rms(y, width, eps))
        for i in range(0, width, 16):
            left = width - i
            value = mul(mul(load(y + 4 * i, left), factor), load(norm + 4 * i, left))
            store(mul(value, silu(load(gate + 4 * i, left))), to + 4 * i, left)

    return convolve, gated_norm


@helper
def places(arguments, row):
    """(where the state of a row's sequence is read, how many bytes behind that it is written); 0, 0 where the id has no
    state."""
    ids = parameter(arguments, DELTA.ids)
    place = load_i64(ids + 8 * row)
    sequence = place if place >= 0 else ~place
    own = parameter(arguments, DELTA.states) + sequence * parameter(arguments, DELTA.states_row)
    spare = parameter(arguments, DELTA.spare) + sequence * parameter(arguments, DELTA.spare_row)
    if sequence >= parameter(arguments, DELTA.sequences) or (
        place < 0 and sequence >= parameter(arguments, DELTA.spares)
    ):
        own, lead = types.int64(0), types.int64(0)
    elif place >= 0:
        lead = types.int64(0)
    elif row > 0 and load_i64(ids + 8 * (row - 1)) == place:
        own, lead = spare, types.int64(0)
    else:
        lead = spare - own
    return own, lead


def delta_step(whole: bool):
    """Kernel; whole: whether key_dim and value_dim are multiples of 16."""
    convolve, gated_norm = passes(whole)

    def kernel(arguments, thread):
        key_heads, per_key = parameter(arguments, DELTA.key_heads), parameter(arguments, DELTA.values_per_key)
        key_dim, value_dim = parameter(arguments, DELTA.key_dim), parameter(arguments, DELTA.value_dim)
        value_heads, values, key_bytes = key_heads * per_key, per_key * value_dim, 4 * key_dim
        stride, count = parameter(arguments, DELTA.taps_row), parameter(arguments, DELTA.taps)
        taps, eps = parameter(arguments, DELTA.conv), real_parameter(arguments, DELTA.eps)
        matrix = key_bytes * value_dim
        head = take(arguments, 0)
        while head < key_heads:
            q = parameter(arguments, DELTA.scratch) + head * parameter(arguments, DELTA.head_bytes)
            k, v = q + key_bytes, q + 2 * key_bytes
            changes = v + 4 * values
            y = changes + 4 * value_dim
            of_key, of_value = head * key_bytes, 2 * key_heads * key_bytes + 4 * head * values
            for row in range(parameter(arguments, DELTA.rows)):
                state, lead = places(arguments, row)
                if state == 0:
                    fail(arguments, 1)
                    break
                kept = state + value_heads * matrix
                x = parameter(arguments, DELTA.x) + row * parameter(arguments, DELTA.x_row)
                x += head * parameter(arguments, DELTA.x_head)
                convolve(x, kept + of_key, lead, taps + of_key, stride, count, key_dim, q)
                of_k = of_key + key_heads * key_bytes
                convolve(x + key_bytes, kept + of_k, lead, taps + of_k, stride, count, key_dim, k)
                convolve(x + 2 * key_bytes, kept + of_value, lead, taps + of_value, stride, count, values, v)
                shorten(q, key_dim, 1.0 / math.sqrt(types.float64(key_dim)))
                shorten(k, key_dim, 1.0)
                gates = parameter(arguments, DELTA.gates) + row * parameter(arguments, DELTA.gates_row)
                to = parameter(arguments, DELTA.out) + row * parameter(arguments, DELTA.out_row)
                to += head * parameter(arguments, DELTA.out_key)
                for value in range(per_key):
                    of_head = 4 * (head * per_key + value)
                    own, here = state + (head * per_key + value) * matrix, 4 * value * value_dim
                    rate = load_scalar(parameter(arguments, DELTA.rates) + of_head)
                    gate = load_scalar(gates + 4 * value_heads + of_head)
                    bias = load_scalar(parameter(arguments, DELTA.dt_bias) + of_head)
                    decay, strength = decay_of(rate, gate + bias), strength_of(load_scalar(gates + of_head))
                    recall(own, k, key_dim, value_dim, v + here, decay, strength, changes)
                    step(own, lead, k, q, key_dim, value_dim, decay, changes, y)
                    z = x + 2 * key_bytes + 4 * values + here
                    norm = parameter(arguments, DELTA.norm)
                    gated_norm(y, value_dim, norm, eps, z, to + value * parameter(arguments, DELTA.out_value))
            head = take(arguments, 0)

    return kernel
