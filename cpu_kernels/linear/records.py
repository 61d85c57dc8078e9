"""Records: rows of activations as int8, as the kernels of coded weights read them.

A panel of up to `row_tile` rows has one record for every group of 64 inputs, so that the inner loop reads it from one
pointer at constant offsets.

Record of a panel of R rows: R x 64 int8, R float32 scales, two or four times R corrections, of which unused ones come
last (`record_bytes`):

  q4           scale * sum(xq) as float32
  `Starts`     minus the offset times the sum, int32 or an int16 pair, of every run of inputs that share a scale
  SM32         sums of 32 inputs as float32
  K2M32        sums of 32 inputs as one int16 pair, as where a zero point is that of 64 inputs or more
  all others   sums of 16 inputs as int16 pairs, of inputs 0..31, then of 32..63
"""

from collections.abc import Callable
from functools import reduce
from typing import NamedTuple

from llvmlite import ir
from numba import types

from cpu_kernels.formats import GROUP_INPUTS, WeightFormat
from cpu_kernels.linear.sizes import pairs_scales, record_bytes
from cpu_kernels.vectors.code_sums import LARGEST_SHORT, CodeSums
from cpu_kernels.vectors.compiler import helper
from cpu_kernels.vectors.isa import Isa
from cpu_kernels.vectors.scalar import least
from cpu_kernels.vectors.vector import (
    F32,
    I16,
    I32,
    I64,
    VF32,
    VI8,
    VI32,
    F32x16,
    call_llvm,
    constant,
    emits,
    intp,
    load_as,
    load_f32_tail,
    splat_value,
    store_as,
    unknown,
)

WIDTH_FIELD = 2  # behind the inputs, where `pairs_scales`: whether they are wide


class Starts(NamedTuple):
    """Where the dot products of `run` inputs begin, so that `offset` is taken from every code.

    are_pairs: in the int16 pairs that `CodeSums.pairs_hold`, each of which adds up two of every four inputs.
    """

    run: int
    offset: int
    are_pairs: bool


def run_of(item: WeightFormat) -> int:
    """Inputs of a group that share a scale."""
    if item.header.endswith("16"):
        return 16
    return 64 if item.header.endswith(("64", "128")) else 32


def starts_of(isa: Isa, item: WeightFormat) -> Starts | None:
    """What dot products of a format begin with, where a record says it: one load in place of a product of sums.

    Not where codes have zero points, which take the offset with them.
    """
    sums, run = CodeSums(isa, item.largest_code), run_of(item)
    offset = sums.left_of(item.offset)
    if not offset or item.has_zero_points:
        return None
    return Starts(run, offset, sums.pairs_hold(offset, run))


def has_sums_of_32(item: WeightFormat) -> bool:
    """Whether a record has the sums of both halves as one pair: where both, or a zero point of both, meet one dot2."""
    return item.header == "K2M32" or item.has_zero_points and run_of(item) == GROUP_INPUTS


class Record:
    """The activations of one record of `rows` rows, as LLVM values."""

    def __init__(self, b, address, rows: int):
        self._b, self._address, self._rows = b, address, rows

    def read_again(self) -> "Record":
        """The same record, whose values LLVM does not know to be those that were read already."""
        return Record(self._b, unknown(self._b, self._address), self._rows)

    def inputs(self, row: int, k: int):
        """Inputs 4k..4k+3 in every lane."""
        return splat_value(self._b, load_as(self._b, self._address, I32, GROUP_INPUTS * row + 4 * k))

    def numbers(self, row: int, k: int, factor: float):
        """Inputs 16k..16k+15 times a power of two as float32, one in a lane."""
        inputs = self._b.sitofp(load_as(self._b, self._address, VI8, GROUP_INPUTS * row + 16 * k), VF32)
        return inputs if factor == 1.0 else self._b.fmul(inputs, constant(VF32, factor))

    def scale(self, row: int):
        """The row's scale in every lane."""
        return splat_value(self._b, load_as(self._b, self._address, F32, self._offset(row, 0)))

    def start(self, row: int, run: int):
        """Of `Starts`, in every lane."""
        return splat_value(self._b, load_as(self._b, self._address, I32, self._offset(row, 1 + run)))

    def sum_of_32(self, row: int, half: int):
        """Of SM32, the sum of a half's inputs as float32, in every lane."""
        return splat_value(self._b, load_as(self._b, self._address, F32, self._offset(row, 1 + half)))

    def sums(self, row: int, half: int):
        """The sums of both 16 inputs of a half, where `has_sums_of_32` those of both halves as half 0, int16 pairs in
        every lane."""
        return splat_value(self._b, load_as(self._b, self._address, I32, self._offset(row, 1 + half)))

    def is_wide(self):
        """Where `pairs_scales`, whether any dot product of a run, of an even number of rows, may need more than 16
        bits; a boolean."""
        b, first = self._b, self._offset(0, WIDTH_FIELD)
        words = [load_as(b, self._address, I64, first + 4 * row) for row in range(0, self._rows, 2)]
        return b.icmp_unsigned("!=", reduce(b.or_, words), I64(0))

    def _offset(self, row: int, field: int) -> int:
        return self._rows * (GROUP_INPUTS + 4 * field) + 4 * row


def _store_codes(b, vectors, quants, scale_at):
    """Quantise 64 inputs: bytes to `quants`, the scale to `scale_at`; returns the int32 sums of every 16, as vectors.

    Magnitudes are compared as integers, so that a NaN wins, makes the scale NaN and shows in the output. Adding
    1.5 * 2**23 leaves round_half_even(x / scale) in the low bits, without undefined conversions.
    """
    largest = constant(VI32, 0)
    for vector in vectors:
        magnitude = b.and_(b.bitcast(vector, VI32), constant(VI32, 0x7FFFFFFF))
        largest = b.select(b.icmp_signed(">", magnitude, largest), magnitude, largest)
    absmax = b.bitcast(call_llvm(b, "llvm.vector.reduce.smax.v16i32", I32, largest), F32)
    scale = b.fdiv(absmax, ir.Constant(F32, 127.0))
    is_zero = b.fcmp_ordered("==", scale, ir.Constant(F32, 0.0))
    divisor = splat_value(b, b.select(is_zero, ir.Constant(F32, 1.0), scale))
    codes = []
    for part, vector in enumerate(vectors):
        shifted = b.fadd(b.fdiv(vector, divisor), constant(VF32, 12582912.0))
        narrow = b.trunc(b.bitcast(shifted, VI32), VI8)
        store_as(b, narrow, quants, 16 * part)
        codes.append(b.sext(narrow, VI32))
    store_as(b, scale, scale_at)
    return codes


def _sum(b, vector):
    return call_llvm(b, "llvm.vector.reduce.add.v16i32", I32, vector)


def _pair_of_sums(b, vector, factor: int):
    """`factor` times the sums of lanes 0, 1, 4, 5, ... and of lanes 2, 3, 6, 7, ... as one int16 pair."""
    both = _sum(b, b.shl(vector, ir.Constant(VI32, [0, 0, 16, 16] * 4)))
    both = b.mul(both, ir.Constant(I32, factor))
    low = b.sext(b.trunc(both, I16), I32)  # where it is negative it has taken 1 from the high half
    return b.or_(b.and_(both, ir.Constant(I32, 0xFFFF)), b.sub(both, low))


def store_sums_of_16(b, v_sums, second, row_bytes):
    """Four int32 sums of 16 inputs as int16 pairs at `second` and `row_bytes` behind it."""
    for half in range(2):
        low, high = (b.trunc(v_sums[2 * half + part], I16) for part in range(2))
        both = b.or_(b.zext(low, I32), b.shl(b.zext(high, I32), ir.Constant(I32, 16)))
        at = second if half == 0 else b.add(second, row_bytes)
        b.store(both, b.inttoptr(at, I32.as_pointer()), align=4)


def store_group_sums(run: int, of_inputs: Callable):
    """Intrinsic (v0, v1, v2, v3, quants, scale_at, row_bytes): quantise 64 inputs: bytes to `quants`, the scale to
    scale_at, and what `of_inputs(b, inputs, scale)` makes of every run's inputs, added up to a vector of int32 lane by
    lane of 16, to scale_at + row_bytes, + 2 row_bytes and so on."""

    @emits(types.void, *[F32x16] * 4, intp, intp, intp)
    def store_group(b, v0, v1, v2, v3, quants, scale_at, row_bytes):
        codes, at, parts = _store_codes(b, (v0, v1, v2, v3), quants, scale_at), scale_at, run // 16
        for first in range(0, len(codes), parts):
            at, inputs = b.add(at, row_bytes), reduce(b.add, codes[first : first + parts])
            store_as(b, of_inputs(b, inputs, load_as(b, scale_at, F32)), at)

    return store_group


@emits(types.void, *[F32x16] * 4, intp, intp, intp)
def store_group_of_16(b, v0, v1, v2, v3, quants, scale_at, row_bytes):
    """As `store_group_sums`, with the sums of every 16 inputs as int16 pairs."""
    codes = _store_codes(b, (v0, v1, v2, v3), quants, scale_at)
    store_sums_of_16(b, [_sum(b, part) for part in codes], b.add(scale_at, row_bytes), row_bytes)


@helper
def panel_of(row, rows, tile, filled):
    """(first row, number of rows) of the panel that holds `row`: panels of `tile`, then its halves for the rest.

    filled: how many rows the last panel may have beyond `rows`, but less than half its own; they repeat the last row.
    """
    first, size = 0, tile
    while True:
        whole = (rows - first + least(filled, (size - 1) // 2)) // size * size
        if row < first + whole:
            return first + (row - first) // size * size, size
        first += whole
        size //= 2


def store_sums_of_32(b, codes, at):
    """The int32 sums of both halves of 64 codes as one int16 pair at an address."""
    low, high = (b.trunc(_sum(b, b.add(*codes[first : first + 2])), I16) for first in (0, 2))
    store_as(b, b.or_(b.zext(low, I32), b.shl(b.zext(high, I32), ir.Constant(I32, 16))), at)


@emits(types.void, *[F32x16] * 4, intp, intp, intp)
def store_group_of_32(b, v0, v1, v2, v3, quants, scale_at, row_bytes):
    """As `store_group_sums`, with the sums of both 32 inputs as one int16 pair."""
    store_sums_of_32(b, _store_codes(b, (v0, v1, v2, v3), quants, scale_at), b.add(scale_at, row_bytes))


def store_group_with_width(largest_code: int):
    """As `store_group_of_32`, and as int32 whether any 32 inputs are so large that products with codes could add up to
    more than int16 holds, whatever the codes: not 0 if so."""

    @emits(types.void, *[F32x16] * 4, intp, intp, intp)
    def store_group(b, v0, v1, v2, v3, quants, scale_at, row_bytes):
        codes, at = _store_codes(b, (v0, v1, v2, v3), quants, scale_at), b.add(scale_at, row_bytes)
        store_sums_of_32(b, codes, at)
        keeps_least, most = ir.Constant(ir.IntType(1), 0), ir.Constant(I32, LARGEST_SHORT // largest_code)
        sizes = [call_llvm(b, "llvm.abs.v16i32", VI32, part, keeps_least) for part in codes]
        are_wide = [b.icmp_signed(">", _sum(b, b.add(*sizes[first : first + 2])), most) for first in (0, 2)]
        store_as(b, b.zext(b.or_(*are_wide), I32), b.add(at, row_bytes))

    return store_group


def group_store(isa: Isa, item: WeightFormat):
    """Intrinsic (v0, v1, v2, v3, quants, scale_at, row_bytes): 64 inputs of a row, with the corrections of a format."""
    if item.name == "q4":
        return store_group_sums(64, lambda b, inputs, scale: b.fmul(b.sitofp(_sum(b, inputs), F32), scale))
    if item.header == "SM32":
        return store_group_sums(32, lambda b, inputs, scale: b.sitofp(_sum(b, inputs), F32))
    starts = starts_of(isa, item)
    if starts is not None:
        assert 4 * (GROUP_INPUTS // starts.run) <= record_bytes(item) - GROUP_INPUTS - 4, (isa, item.name)
        if starts.are_pairs:
            return store_group_sums(starts.run, lambda b, inputs, scale: _pair_of_sums(b, inputs, -starts.offset))
        factor = ir.Constant(I32, -starts.offset)
        return store_group_sums(starts.run, lambda b, inputs, scale: b.mul(_sum(b, inputs), factor))
    if pairs_scales(isa, item):
        return store_group_with_width(item.largest_code)
    return store_group_of_32 if has_sums_of_32(item) else store_group_of_16


def row_quantiser(isa: Isa, item: WeightFormat):
    """Function: the groups [group, last) of a row's inputs into its place in the records of a panel of `size` rows."""
    store_codes, row_bytes = group_store(isa, item), record_bytes(item)

    @helper
    def quantize_row(source, in_features, group, last, panel, row, size):
        while group < last:
            at, left = source + 256 * group, in_features - GROUP_INPUTS * group
            record = panel + group * size * row_bytes
            scale_at = record + size * GROUP_INPUTS + 4 * row
            store_codes(
                load_f32_tail(at, left),
                load_f32_tail(at + 64, left - 16),
                load_f32_tail(at + 128, left - 32),
                load_f32_tail(at + 192, left - 48),
                record + GROUP_INPUTS * row,
                scale_at,
                4 * size,
            )
            group += 1

    return quantize_row
