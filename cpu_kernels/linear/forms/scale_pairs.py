"""Two dot products of a row times their whole-number scales by one vpdpwssd, in place of two vpmulld.

A register grows the dot products of two runs one after the other, in the upper and then in the lower half of its words:
so no more registers are kept than one run needs. Both fit in 16 bits where a record says that its inputs are not wide
(records.py), whatever the codes, as nearly all are; the others take the long way. The sums are the same.
"""

from cpu_kernels.vectors.dot import emit_dot2, pairs_of
from cpu_kernels.vectors.isa import Isa
from cpu_kernels.vectors.vector import VI32, constant, in_order

LOWEST = 1 << 15  # more in the lower half, so that it takes nothing from the upper one


def second_starts(b, dots):
    """Where the dot products of the second run begin: below those of the first."""
    return in_order(b, [b.add(b.shl(dot, constant(VI32, 16)), constant(VI32, LOWEST)) for dot in dots])


def paired_totals(isa: Isa, b, scales, grown):
    """The first scale times the first run's dot product and the second's, added up, for every row; grown: upon
    `second_starts`."""
    both = pairs_of(b, *reversed(scales))
    pairs = [b.xor(value, constant(VI32, LOWEST)) for value in grown]
    return [emit_dot2(isa, b, constant(VI32, 0), pair, both) for pair in pairs]


def either(b, is_wide, wide_way, short_way):
    """What one of two functions gives, registers as many as the other's: the second's unless `is_wide`."""
    with b.if_else(is_wide, likely=False) as (wide, short):
        with wide:
            long_values, long_block = wide_way(), b.block
        with short:
            short_values, short_block = short_way(), b.block
    chosen = []
    for long_value, short_value in zip(long_values, short_values):
        value = b.phi(VI32)
        value.add_incoming(long_value, long_block)
        value.add_incoming(short_value, short_block)
        chosen.append(value)
    return chosen
