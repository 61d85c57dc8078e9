"""delta_step: a token of gated DeltaNet of some sequences, between its projections.

    q, k, v  = silu(sum over taps of tap * input, the newest input's last);  k = k / |k|, q = q / |q| / sqrt(key_dim)
    decay    = exp(rate * softplus(a + dt_bias)), strength = sigmoid(b)
    S        = decay S + k u^T,  u = strength (v - decay S^T k);  y = S^T q
    out      = y / sqrt(mean(y^2) + eps) * norm * silu(z)

A program is a key head of a sequence with the value heads that share it: the inputs that these keep and their states
are no other program's, so nothing is read by one that another writes. Where several rows are of one sequence, the
programs of the first one take them all, in their order; from the first draft on they write a spare state. A state is
read and written once, in registers between: columns of it depend on each other in the norm alone, so large ones are
taken some columns at a time.

Threads of a program may hold the same numbers, each of which has read them: a barrier stands before what is written
over numbers that were read, and behind a row. The inputs of the convolution are taken tap by tap: over a tile of taps
the compiler would turn the layout of the whole state round to that of the taps, by way of shared memory.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from cpu_kernels.contract import L2_EPS, DeltaRule, DeltaStates
from gpu_kernels.elementwise import ordered_exp
from gpu_kernels.launching import Kernel, Shape
from gpu_kernels.reference.delta import DeltaSizes, delta_sizes

TILE = 16384  # numbers of a state at once: all of a published head, whose loads are then all on their way together
EPSILON = tl.constexpr(L2_EPS)


@triton.jit
def _silu(x):
    return x / (1.0 + ordered_exp(-x))


@triton.jit
def _decay(rate, value):
    """exp(rate * softplus(value)). log(1 + t) is 2 artanh(t / (2 + t)), whose series has all digits of a small t; of
    a logarithm near 1 a GPU has few, and a state is multiplied by thousands of decays."""
    t = ordered_exp(-tl.abs(value))
    s = t / (2.0 + t)
    square = s * s
    series = 1.0 / 9 + square * (1.0 / 11 + square * (1.0 / 13 + square * (1.0 / 15)))
    series = 1.0 + square * (1.0 / 3 + square * (1.0 / 5 + square * (1.0 / 7 + square * series)))
    return ordered_exp(rate * (tl.maximum(value, 0.0) + 2.0 * s * series))


class Inputs(NamedTuple):
    """What the convolution reads beside a row: a sequence's kept inputs, where they go, the taps and their strides."""

    kept: Any
    to: Any
    conv: Any
    conv_tap: Any
    conv_feature: Any


@triton.jit
def _convolved(new, inputs, columns, features, inside, WIDTH: tl.constexpr, TAPS: tl.constexpr):
    """What the convolution makes of `columns` of a unit, which are its `features`; the kept inputs move up."""
    kept, to, conv = inputs.kept + features, inputs.to + features, inputs.conv + features * inputs.conv_feature
    newest = tl.load(new + columns, mask=inside, other=0.0)
    total = newest * tl.load(conv + (TAPS - 1) * inputs.conv_tap, mask=inside, other=0.0)
    for tap in tl.static_range(TAPS - 1):
        older = tl.load(kept + tap * WIDTH, mask=inside, other=0.0)
        total += older * tl.load(conv + tap * inputs.conv_tap, mask=inside, other=0.0)
    tl.debug_barrier()
    for tap in tl.static_range(TAPS - 2):
        tl.store(to + tap * WIDTH, tl.load(kept + (tap + 1) * WIDTH, mask=inside, other=0.0), mask=inside)
    tl.store(to + (TAPS - 2) * WIDTH, newest, mask=inside)
    return _silu(total)


@triton.jit
def _gates_of(gates, rates, dt_bias, head, VALUE_HEADS: tl.constexpr):
    """(strength, decay) of a value head of a row."""
    strength = 1.0 / (1.0 + ordered_exp(-tl.load(gates + head)))
    gate = tl.load(gates + VALUE_HEADS + head)
    return strength, _decay(tl.load(rates + head), gate + tl.load(dt_bias + head))


@triton.jit
def _advanced(state, to, q, k, v, strength, decay, inside):
    """y of some columns of a value head, whose state, pointers [key_dim, columns], moves on by a row, to `to`."""
    matrix = tl.load(state, mask=inside, other=0.0)
    change = strength * (v - decay * tl.sum(k[:, None] * matrix, axis=0))
    matrix = decay * matrix + k[:, None] * change[None, :]
    tl.debug_barrier()
    tl.store(to, matrix, mask=inside)
    return tl.sum(q[:, None] * matrix, axis=0)


@triton.jit
def _store_normed(out, y, z, norm, eps, VALUE_DIM: tl.constexpr, BLOCKS: tl.constexpr, COLUMNS: tl.constexpr):
    """Write a value head's y [blocks, columns], normed and gated by what lies at z."""
    column = tl.arange(0, BLOCKS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = column < VALUE_DIM
    inverse = tl.rsqrt(tl.sum(tl.sum(y * y, axis=1), axis=0) / VALUE_DIM + eps)
    gate = tl.load(z + column, mask=inside, other=0.0)
    normed = y * inverse * tl.load(norm + column, mask=inside, other=0.0) * _silu(gate)
    tl.store(out + column, normed, mask=inside)


@triton.jit
def _own_rows(ids, first, rows, ROWS_PAD: tl.constexpr):
    """(which rows are of the sequence that row `first` is of, that sequence, how many rows this program takes: all of
    them where `first` is their first one, else none)."""
    index = tl.arange(0, ROWS_PAD)
    own_id, other_ids = tl.load(ids + first), tl.load(ids + index, mask=index < rows, other=0)
    sequence = tl.where(own_id < 0, ~own_id, own_id)
    is_own = (tl.where(other_ids < 0, ~other_ids, other_ids) == sequence) & (index < rows)
    is_first = tl.min(tl.where(is_own, index, ROWS_PAD), axis=0) == first
    return is_own, sequence, tl.where(is_first, tl.sum(is_own.to(tl.int32), axis=0), 0)


@triton.jit
def _pairs(head, KEY_HEADS: tl.constexpr, KEY_DIM: tl.constexpr, KEY_PAD: tl.constexpr):
    """Of what a key head's q and k are padded to, one behind the other: (which are theirs, the features of them)."""
    pair = tl.arange(0, 2 * KEY_PAD)
    is_key = pair // KEY_PAD
    in_pair = pair % KEY_PAD < KEY_DIM
    return in_pair, pair % KEY_PAD + is_key * (KEY_HEADS * KEY_DIM) + head * KEY_DIM


@triton.jit
def _query_and_key(
    unit, inputs, pairs, scale, KEY_DIM: tl.constexpr, KEY_PAD: tl.constexpr, WIDTH: tl.constexpr, TAPS: tl.constexpr
):
    """(q, k) of a key head of a row, of unit length, q scaled. pairs: of `_pairs`."""
    in_pair, of_pair = pairs
    pair = tl.arange(0, 2 * KEY_PAD)
    in_unit = pair % KEY_PAD + pair // KEY_PAD * KEY_DIM
    both = _convolved(unit, inputs, in_unit, of_pair, in_pair, WIDTH, TAPS).reshape(2, KEY_PAD)
    both *= tl.rsqrt(tl.sum(both * both, axis=1) + EPSILON)[:, None]
    is_second = tl.arange(0, 2)[:, None] == 1
    k = tl.sum(tl.where(is_second, both, 0.0), axis=0)
    q = tl.sum(tl.where(is_second, 0.0, both), axis=0) * scale
    return q, k


@triton.jit
def _value_head(
    values,
    inputs,
    states,
    meets,
    of_head,
    key,
    KEY_HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
    TAPS: tl.constexpr,
):
    """y [blocks, columns] of value head `of_head` of a row, whose values lie at `values`. states: of the sequence
    before and after; meets: (q, k, strength, decay); key: the padded rows of a state."""
    state, to = states
    q, k, strength, decay = meets
    of_own = of_head * (KEY_DIM * VALUE_DIM)
    y = tl.zeros([BLOCKS, COLUMNS], tl.float32)
    for block in range(BLOCKS):
        column = block * COLUMNS + tl.arange(0, COLUMNS)
        in_head = column < VALUE_DIM
        cell = of_own + key[:, None] * VALUE_DIM + column[None, :]
        inside = (key < KEY_DIM)[:, None] & in_head[None, :]
        feature = 2 * KEY_HEADS * KEY_DIM + of_head * VALUE_DIM + column
        v = _convolved(values, inputs, column, feature, in_head, WIDTH, TAPS)
        moved = _advanced(state + cell, to + cell, q, k, v, strength, decay, inside)
        y = tl.where(tl.arange(0, BLOCKS)[:, None] == block, moved[None, :], y)
    return y


@Kernel
@triton.jit(do_not_specialize=["rows"])
def _delta_step_kernel(
    x,
    gates,
    conv,
    rates,
    dt_bias,
    norm,
    states,
    spare,
    ids,
    out,
    rows,
    eps,
    scale,
    x_row,
    x_head,
    gates_row,
    conv_tap,
    conv_feature,
    states_row,
    spare_row,
    out_row,
    KEY_HEADS: tl.constexpr,
    PER_KEY: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    TAPS: tl.constexpr,
    IS_TILED: tl.constexpr,
    KEY_PAD: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCKS: tl.constexpr,
    ROWS_PAD: tl.constexpr,
):
    """grid: (key_heads, rows). x: [rows, key_heads, 2 key_dim + 2 per_key value_dim or more]; gates: [rows, 2
    value_heads or more]; conv: [taps, features]; states, spare: [sequences, size]; ids: int64 [rows]; the others as in
    `DeltaRule`. scale: 1 / sqrt(key_dim). BLOCKS blocks of COLUMNS are a value head's."""
    head, first = tl.program_id(0), tl.program_id(1)
    width: tl.constexpr = (2 * KEY_DIM + PER_KEY * VALUE_DIM) * KEY_HEADS
    matrices: tl.constexpr = KEY_HEADS * PER_KEY * KEY_DIM * VALUE_DIM
    is_own, sequence, turns = _own_rows(ids, first, rows, ROWS_PAD)
    state = states + sequence * states_row
    beside = spare + sequence * spare_row
    pairs = _pairs(head, KEY_HEADS, KEY_DIM, KEY_PAD)
    index, key = tl.arange(0, ROWS_PAD), tl.arange(0, KEY_PAD)
    row = first
    for _ in range(turns):
        at = row.to(tl.int64)
        to = state
        if tl.load(ids + row) < 0:
            to = beside
        inputs = Inputs(state + matrices, to + matrices, conv, conv_tap, conv_feature)
        unit, row_gates, row_out = x + at * x_row + head * x_head, gates + at * gates_row, out + at * out_row
        q, k = _query_and_key(unit, inputs, pairs, scale, KEY_DIM, KEY_PAD, width, TAPS)
        for value in range(PER_KEY):
            of_head = head * PER_KEY + value
            strength, decay = _gates_of(row_gates, rates, dt_bias, of_head, KEY_HEADS * PER_KEY)
            values, meets = unit + 2 * KEY_DIM + value * VALUE_DIM, (q, k, strength, decay)
            y = _value_head(
                values,
                inputs,
                (state, to),
                meets,
                of_head,
                key,
                KEY_HEADS,
                KEY_DIM,
                VALUE_DIM,
                COLUMNS,
                BLOCKS,
                width,
                TAPS,
            )
            place = value * KEY_HEADS + head if IS_TILED else of_head
            z = values + PER_KEY * VALUE_DIM
            _store_normed(row_out + place * VALUE_DIM, y, z, norm, eps, VALUE_DIM, BLOCKS, COLUMNS)
        tl.debug_barrier()
        state = to
        row = tl.min(tl.where(is_own & (index > row), index, ROWS_PAD), axis=0)


def delta_step(
    projected: Tensor, gates: Tensor, rule: DeltaRule, states: DeltaStates, ids: Tensor, out: Tensor
) -> None:
    sizes, rows = delta_sizes(projected, gates, rule, states, ids, out), projected.shape[0]
    values, spare = states.values, states.values if states.spare is None else states.spare
    assert projected.stride(2) == gates.stride(1) == values.stride(1) == out.stride(1) == 1, "rows have gaps inside"
    if rows:
        _delta_step_kernel.launch(
            (sizes.key_heads, rows, 1),
            (projected, gates, rule.conv, rule.rates, rule.dt_bias, rule.norm, values, spare, ids, out),
            (rows, rule.eps, sizes.key_dim**-0.5),
            (*projected.stride()[:2], gates.stride(0), *rule.conv.stride(), values.stride(0), spare.stride(0))
            + (out.stride(0),),
            _shape(sizes, rule.is_tiled, triton.next_power_of_2(rows)),
        )


@functools.cache
def _shape(sizes: DeltaSizes, is_tiled: bool, rows: int) -> Shape:
    key_pad, value_pad = triton.next_power_of_2(sizes.key_dim), triton.next_power_of_2(sizes.value_dim)
    columns = min(value_pad, max(1, TILE // key_pad))
    return Shape(
        KEY_HEADS=sizes.key_heads,
        PER_KEY=sizes.per_key,
        KEY_DIM=sizes.key_dim,
        VALUE_DIM=sizes.value_dim,
        TAPS=sizes.taps,
        IS_TILED=is_tiled,
        KEY_PAD=key_pad,
        COLUMNS=columns,
        BLOCKS=value_pad // columns,
        ROWS_PAD=rows,
        num_warps=max(4, min(16, key_pad * columns // 1024)),
    )
