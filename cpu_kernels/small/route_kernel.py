"""route: the router's scores of every row, its best experts, and the order in which experts are computed.

Stage 0 makes logits: one vector of sums for each row and expert, inputs ascending, its lanes added as a tree, so that a
row's logits are the same bits whatever rows stand beside it. Stage 1 chooses: the highest logit, of equal ones the
lower id; a NaN is never higher, so that ids stay valid and the weights show it. Where scores are sigmoids, corrected or
in groups, it is the highest of those in the best groups. Stage 2, one chunk, sorts all picks by
expert, those of one expert by row.

Scratch: per row `experts` logits, the gate's behind them, which become scores; as many scores to choose by; and as many
int32 marks.
"""

import math

import numpy as np
from numba import types

from cpu_kernels.small.route_sizes import EXPERTS_AT_ONCE, ROWS_AT_ONCE
from cpu_kernels.team.arguments import ROUTE
from cpu_kernels.team.chunks import await_stage, finish, parameter, real_parameter, take
from cpu_kernels.vectors.arithmetic import add, div, exp, fma, keep_below, sub, sum_lanes
from cpu_kernels.vectors.compiler import helper
from cpu_kernels.vectors.scalar import least, load_i32, load_scalar, store_scalar, store_word
from cpu_kernels.vectors.vector import load_f32, load_f32_tail, prefetch, splat, store_f32_tail

OPEN, TAKEN, SHUT = 0, 1, 2  # marks of an expert
ZERO, ONE, MINUS_INFINITY = np.float32(0.0), np.float32(1.0), np.float32(-np.inf)


def logits_of_four(asks_ahead: bool):
    """Function (x, router, stride, hidden, to): products of one row with four neighbouring rows of the router.

    asks_ahead: for the four rows behind them, as the first row of x that comes by does: four streams of a few KB each
    are too short for the CPU to see where they lead.
    """

    @helper
    def four_logits(x, router, stride, hidden, to):
        first, second, third, fourth = splat(ZERO), splat(ZERO), splat(ZERO), splat(ZERO)
        i = 0
        while i + 16 <= hidden:
            value, at = load_f32(x + 4 * i), router + 4 * i
            if asks_ahead:
                prefetch(at, 4 * stride)
                prefetch(at, 5 * stride)
                prefetch(at, 6 * stride)
                prefetch(at, 7 * stride)
            first = fma(value, load_f32(at), first)
            second = fma(value, load_f32(at + stride), second)
            third = fma(value, load_f32(at + 2 * stride), third)
            fourth = fma(value, load_f32(at + 3 * stride), fourth)
            i += 16
        if i < hidden:
            left, at = hidden - i, router + 4 * i
            value = load_f32_tail(x + 4 * i, left)
            first = fma(value, load_f32_tail(at, left), first)
            second = fma(value, load_f32_tail(at + stride, left), second)
            third = fma(value, load_f32_tail(at + 2 * stride, left), third)
            fourth = fma(value, load_f32_tail(at + 3 * stride, left), fourth)
        store_scalar(sum_lanes(first), to)
        store_scalar(sum_lanes(second), to + 4)
        store_scalar(sum_lanes(third), to + 8)
        store_scalar(sum_lanes(fourth), to + 12)

    return four_logits


first_logits, later_logits = logits_of_four(True), logits_of_four(False)


@helper
def softmax(logits, count):
    """Replace `count` logits by their softmax."""
    largest = MINUS_INFINITY
    for e in range(count):
        value = load_scalar(logits + 4 * e)
        if not value <= largest:
            largest = value
    total, m = splat(ZERO), splat(largest)
    for e in range(0, count, 16):
        power = keep_below(exp(sub(load_f32_tail(logits + 4 * e, count - e), m)), count - e, ZERO)
        total = add(total, power)
        store_f32_tail(power, logits + 4 * e, count - e)
    whole = splat(sum_lanes(total))
    for e in range(0, count, 16):
        store_f32_tail(div(load_f32_tail(logits + 4 * e, count - e), whole), logits + 4 * e, count - e)


@helper
def sum_of_two_best(choices, first, count):
    """Of the scores from one expert on, a NaN counting as the lowest."""
    best, second = MINUS_INFINITY, MINUS_INFINITY
    for e in range(first, first + count):
        value = load_scalar(choices + 4 * e)
        if value > best:
            second, best = best, value
        elif value > second:
            second = value
    return types.float32(best + second)


@helper
def keep_groups(choices, marks, count, groups, kept):
    """Mark the experts of the best groups with OPEN and all others with SHUT."""
    size = count // groups
    for e in range(count):
        store_word(OPEN if kept == groups else SHUT, marks + 4 * e)
    if kept < groups:
        for _ in range(kept):
            best, highest = -1, MINUS_INFINITY
            for group in range(groups):
                if load_i32(marks + 4 * group * size) == SHUT:
                    value = sum_of_two_best(choices, group * size, size)
                    if best < 0 or value > highest:
                        best = group
                        highest = value
            for e in range(best * size, (best + 1) * size):
                store_word(OPEN, marks + 4 * e)


@helper
def mark_best(choices, marks, count, top_k):
    """Mark the top_k experts of those that are OPEN with TAKEN."""
    for _ in range(top_k):
        best, highest = -1, MINUS_INFINITY
        for e in range(count):
            if load_i32(marks + 4 * e) == OPEN:
                value = load_scalar(choices + 4 * e)
                if best < 0 or value > highest:
                    best = e
                    highest = value
        store_word(TAKEN, marks + 4 * best)


@helper
def sigmoid(value):
    """1 / (1 + exp(-value))."""
    return types.float32(1.0 / (1.0 + math.exp(-types.float64(value))))


@helper
def add_numbers(values, others, count):
    """values += others."""
    for e in range(count):
        store_scalar(types.float32(load_scalar(values + 4 * e) + load_scalar(others + 4 * e)), values + 4 * e)


@helper
def choose(logits, choices, marks, count, top_k, is_sigmoid, correction, groups, kept):
    """Mark the experts of a row, and leave their scores where its logits were."""
    if is_sigmoid:
        for e in range(count):
            store_scalar(sigmoid(load_scalar(logits + 4 * e)), logits + 4 * e)
    for e in range(count):
        store_scalar(load_scalar(logits + 4 * e), choices + 4 * e)
    if correction:
        add_numbers(choices, correction, count)
    keep_groups(choices, marks, count, groups, kept)
    mark_best(choices, marks, count, top_k)
    if not is_sigmoid:
        softmax(logits, count)


@helper
def keep_chosen(scores, marks, count, ids, weights):
    """Write the experts that are TAKEN, ascending, and their scores; returns the sum of these."""
    pick, total = 0, types.float32(0.0)
    for e in range(count):
        if load_i32(marks + 4 * e) == TAKEN:
            store_word(e, ids + 4 * pick)
            weight = load_scalar(scores + 4 * e)
            store_scalar(weight, weights + 4 * pick)
            total += weight
            pick += 1
    return total


@helper
def scale_weights(weights, count, divisor, scale):
    """weights = weights / divisor * scale, each step rounded to float32."""
    for pick in range(count):
        share = types.float32(load_scalar(weights + 4 * pick) / divisor)
        store_scalar(types.float32(share * scale), weights + 4 * pick)


@helper
def sort_picks(ids, places, sources, starts, rows, top_k, experts):
    """Positions of all picks in the order of their experts, then of their rows."""
    for e in range(experts + 1):
        store_word(0, starts + 4 * e)
    for pick in range(rows * top_k):
        at = starts + 4 * (load_i32(ids + 4 * pick) + 1)
        store_word(load_i32(at) + 1, at)
    for e in range(experts):
        store_word(load_i32(starts + 4 * e) + load_i32(starts + 4 * e + 4), starts + 4 * e + 4)
    for pick in range(rows * top_k):
        at = starts + 4 * load_i32(ids + 4 * pick)
        place = load_i32(at)
        store_word(place, places + 4 * pick)
        store_word(pick // top_k, sources + 4 * place)
        store_word(place + 1, at)
    # Each start is now where its expert's picks end: where those of the next one begin.
    for e in range(experts, 0, -1):
        store_word(load_i32(starts + 4 * e - 4), starts + 4 * e)
    store_word(0, starts)


@helper
def make_logits(arguments, chunk):
    """Stage 0: logits of ROWS_AT_ONCE rows and EXPERTS_AT_ONCE experts into the scratch."""
    scratch, padded = parameter(arguments, ROUTE.scratch), parameter(arguments, ROUTE.router_rows)
    x, x_stride = parameter(arguments, ROUTE.x), parameter(arguments, ROUTE.x_row)
    router, hidden = parameter(arguments, ROUTE.router), parameter(arguments, ROUTE.hidden)
    row_bytes, stride, parts = 12 * padded, 4 * hidden, padded // EXPERTS_AT_ONCE
    first, start = chunk % parts * EXPERTS_AT_ONCE, chunk // parts * ROWS_AT_ONCE
    stop = least(parameter(arguments, ROUTE.rows), start + ROWS_AT_ONCE)
    for e in range(first, first + EXPERTS_AT_ONCE, 4):
        to = scratch + start * row_bytes + 4 * e
        first_logits(x + start * x_stride, router + e * stride, stride, hidden, to)
        for row in range(start + 1, stop):
            to = scratch + row * row_bytes + 4 * e
            later_logits(x + row * x_stride, router + e * stride, stride, hidden, to)


@helper
def choose_of_row(arguments, row):
    """Stage 1: the experts of a row and what they count, and of a gate behind them."""
    experts, top_k = parameter(arguments, ROUTE.experts), parameter(arguments, ROUTE.top_k)
    padded, gated = parameter(arguments, ROUTE.router_rows), parameter(arguments, ROUTE.gated)
    logits = parameter(arguments, ROUTE.scratch) + row * 12 * padded
    choices, marks = logits + 4 * padded, logits + 8 * padded
    gate = load_scalar(logits + 4 * experts) if gated else ZERO
    bias = parameter(arguments, ROUTE.bias)
    if bias:
        add_numbers(logits, bias, experts)
    choose(
        logits,
        choices,
        marks,
        experts,
        top_k,
        parameter(arguments, ROUTE.sigmoid),
        parameter(arguments, ROUTE.correction),
        parameter(arguments, ROUTE.groups),
        parameter(arguments, ROUTE.kept_groups),
    )
    to = parameter(arguments, ROUTE.weights) + row * parameter(arguments, ROUTE.weights_row)
    total = keep_chosen(logits, marks, experts, parameter(arguments, ROUTE.ids) + 4 * row * top_k, to)
    is_normalised = parameter(arguments, ROUTE.normalise)
    divisor = types.float32(total + real_parameter(arguments, ROUTE.eps)) if is_normalised else ONE
    scale_weights(to, top_k, divisor, types.float32(real_parameter(arguments, ROUTE.scale)))
    store_scalar(sigmoid(gate) if gated else ONE, to + 4 * top_k)


def route():
    def kernel(arguments, thread):
        rows = parameter(arguments, ROUTE.rows)
        row_blocks = (rows + ROWS_AT_ONCE - 1) // ROWS_AT_ONCE
        chunks = parameter(arguments, ROUTE.router_rows) // EXPERTS_AT_ONCE * row_blocks
        chunk = take(arguments, 0)
        while chunk < chunks:
            make_logits(arguments, chunk)
            finish(arguments, 0)
            chunk = take(arguments, 0)
        await_stage(arguments, 0, chunks)
        row = take(arguments, 1)
        while row < rows:
            choose_of_row(arguments, row)
            finish(arguments, 1)
            row = take(arguments, 1)
        await_stage(arguments, 1, rows)
        if take(arguments, 2) == 0:
            sort_picks(
                parameter(arguments, ROUTE.ids),
                parameter(arguments, ROUTE.places),
                parameter(arguments, ROUTE.sources),
                parameter(arguments, ROUTE.starts),
                rows,
                parameter(arguments, ROUTE.top_k),
                parameter(arguments, ROUTE.experts),
            )

    return kernel
