"""Softmax of a tile's scores in decode, up to four queries at a time.

As in tiles.py; but beside pages of codes weights count from the tile's own maximum, so that 16 bits hold the largest of
them well:
    t = ceil(max s)    m' = max(m, t)    p = 2^(s - t)    l' = l 2^(m - m') + 2^(t - m') sum p
The queries' maxima and sums are reduced together and their scalars are lanes of one register, because one query's
chain of dependent steps is several times as long as the work in it.
"""

import numpy as np
from llvmlite import ir
from numba import types

from cpu_kernels.attention.parameters import (
    HEAD_SCALARS,
    HEAD_SCORES,
    KEY_TILE,
    LANES,
    SCALE_OF_Q,
    WEIGHT_OF_TILE,
    RowShape,
)
from cpu_kernels.attention.tiles import weight_storer
from cpu_kernels.vectors.arithmetic import EXP2_COEFFICIENTS
from cpu_kernels.vectors.isa import Isa
from cpu_kernels.vectors.vector import (
    F32,
    I32,
    I64,
    VF32,
    VI32,
    call_llvm,
    constant,
    emits,
    float32,
    fma_value,
    intp,
    lanes_below,
    load_as,
    picked,
    splat_value,
    store_as,
    unknown,
)

QUERIES = 4
V4F32 = ir.VectorType(F32, QUERIES)
LOWEST = -127.0  # its power is 0 in float32's exponent bits


def larger_value(b, x, y):
    """Lane-wise maximum; a NaN in y stays."""
    return b.select(b.fcmp_ordered(">", x, y), x, y)


def reduced(b, vectors, combine):
    """Four <16 x float> -> <4 x float>: each one's lanes combined."""
    halves = [[half + lane + side for side in (0, LANES) for lane in range(8)] for half in (0, 8)]
    pairs = [combine(b, *(picked(b, vectors[at], vectors[at + 1], lanes) for lanes in halves)) for at in (0, 2)]
    quads = [[quad + lane + side for side in (0, 8, 16, 24) for lane in range(4)] for quad in (0, 4)]
    value = combine(b, *(picked(b, *pairs, lanes) for lanes in quads))
    for stride in (2, 1):
        value = combine(b, value, picked(b, value, value, [lane ^ stride for lane in range(LANES)]))
    return picked(b, value, value, list(range(0, LANES, LANES // QUERIES)))


def power_of_whole(b, k):
    """2**k per lane, k whole and not positive; 0 below -126."""
    magic = constant(k.type, 12582912.0 + 127.0)
    shifted = b.fadd(larger_value(b, constant(k.type, LOWEST), k), magic)
    bits = ir.VectorType(I32, k.type.count)
    return b.bitcast(b.shl(b.bitcast(shifted, bits), constant(bits, 23)), k.type)


def exp2_value(b, x):
    """2**x for x <= 0, as exp2_not_positive, in fewer instructions; 0 below -126.5."""
    magic = constant(VF32, 12582912.0 + 127.0)
    x = larger_value(b, constant(VF32, LOWEST), x)
    shifted = b.fadd(x, magic)
    r = b.fsub(x, b.fsub(shifted, magic))
    p = constant(VF32, EXP2_COEFFICIENTS[0])
    for coefficient in EXP2_COEFFICIENTS[1:]:
        p = fma_value(b, p, r, constant(VF32, coefficient))
    return b.fmul(p, b.bitcast(b.shl(b.bitcast(shifted, VI32), constant(VI32, 23)), VF32))


def tree(b, values, combine):
    """Four values combined."""
    return combine(b, combine(b, *values[:2]), combine(b, *values[2:]))


def added(b, x, y):
    """x + y."""
    return b.fadd(x, y)


def tile_softmax(isa: Isa, kv_dtype: str, heads: int):
    """Intrinsic (scores, keys, scale, running, scalars): scores of `heads` queries, at most 4, -> p in place, m, l.

    scale includes log2(e), not the scale of q's codes. Of the scalars it writes what acc is to be multiplied by and,
    beside codes, the weight of the tile's p.
    """
    has_codes, store_weights = RowShape.of(kv_dtype).has_codes, weight_storer(isa, kv_dtype)
    firsts = range(0, KEY_TILE, LANES)

    def factor_of(b, scale, scalars, head):
        """What a query's scores are multiplied by."""
        return b.fmul(scale, load_as(b, scalars, F32, HEAD_SCALARS * head + SCALE_OF_Q)) if has_codes else scale

    def scaled(b, scores, head, factor):
        """A query's scores, 16 at a time, times their factor."""
        factor, at = splat_value(b, factor), HEAD_SCORES * head
        return [b.fmul(load_as(b, scores, VF32, at + 4 * first), factor) for first in firsts]

    def scale_few(b, scores, keys, factors):
        """Scores of a tile with fewer keys times their factors, in place; -inf beyond the keys."""
        for head, factor in enumerate(factors):
            for first, value in zip(firsts, scaled(b, scores, head, factor)):
                mask = lanes_below(b, b.sub(keys, ir.Constant(I64, first)))
                value = b.select(mask, value, constant(VF32, -np.inf))
                store_as(b, value, scores, HEAD_SCORES * head + 4 * first)

    def together(b, vectors, combine):
        return reduced(b, vectors + vectors[-1:] * (QUERIES - heads), combine)

    def running_state(b, running):
        """(m, l) of the queries, <4 x float> each."""
        state = load_as(b, running, ir.VectorType(F32, 2 * heads))
        lanes = [2 * min(head, heads - 1) for head in range(QUERIES)]
        return (picked(b, state, state, [lane + field for lane in lanes]) for field in (0, 1))

    def weigh(b, scores, factors, base):
        """p of every query in place; their sums, lane by lane. Scores are read anew: registers do not hold them all."""
        for head, factor in enumerate(factors):
            m, scores = picked(b, base, base, [head] * LANES), unknown(b, scores)
            powers = [exp2_value(b, b.fsub(value, m)) for value in scaled(b, scores, head, factor)]
            store_weights(b, powers, scores, HEAD_SCORES * head)
            yield tree(b, powers, added)

    @emits(types.void, intp, intp, float32, intp, intp)
    def soften(b, scores, keys, scale, running, scalars):
        has_few = b.icmp_signed("<", keys, ir.Constant(I64, KEY_TILE))
        factors = [factor_of(b, scale, scalars, head) for head in range(heads)]
        with b.if_then(has_few, likely=False):
            scale_few(b, scores, keys, factors)
        factors = [b.select(has_few, ir.Constant(F32, 1.0), factor) for factor in factors]
        tops = [tree(b, scaled(b, scores, head, factor), larger_value) for head, factor in enumerate(factors)]
        top = call_llvm(b, "llvm.ceil.v4f32", V4F32, together(b, tops, larger_value))
        before, total = running_state(b, running)
        largest = larger_value(b, before, top)
        base = top if has_codes else largest
        correction, weight = (power_of_whole(b, b.fsub(m, largest)) for m in (before, base))
        added_up = together(b, list(weigh(b, scores, factors, base)), added)
        total = b.fadd(b.fmul(total, correction), b.fmul(added_up, weight) if has_codes else added_up)
        store_as(b, picked(b, largest, total, [at for head in range(heads) for at in (head, QUERIES + head)]), running)
        for head in range(heads):
            for value, at in ((correction, 0), (weight, WEIGHT_OF_TILE))[: 1 + has_codes]:
                store_as(b, b.extract_element(value, ir.Constant(I32, head)), scalars, HEAD_SCALARS * head + at)

    return soften
