"""Records: rows of activations as int8, as the kernels of coded weights read them.

A panel of up to `row_tile` rows has one record for every group of 64 inputs, so that the inner loop reads it from one
pointer at constant offsets.

Record of a panel of R rows (76 R bytes): R x 64 int8, R float32 scales, R corrections, R second corrections, which are
q4: scale * sum(xq) as float32, unused;  q8: -128 * sum(xq) as int32 of inputs 0..31, then of 32..63;
K2M32: sums of 32 inputs as one int16 pair, unused; other formats: sums of 16 inputs as int16 pairs, of inputs 0..31,
then of 32..63 (forms/step.py).
"""

from llvmlite import ir
from numba import types

from cpu_kernels.formats import GROUP_INPUTS, format_of
from cpu_kernels.linear.sizes import RECORD_BYTES
from cpu_kernels.vectors.compiler import helper
from cpu_kernels.vectors.scalar import least
from cpu_kernels.vectors.vector import (
    F32,
    I16,
    I32,
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

    def sums(self, row: int, half: int):
        """The sums of both 16 inputs of a half, of K2M32 those of both halves as half 0, int16 pairs in every lane."""
        return splat_value(self._b, load_as(self._b, self._address, I32, self._offset(row, 1 + half)))

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


def store_sums_of_16(b, v_sums, second, row_bytes):
    """Four int32 sums of 16 inputs as int16 pairs at `second` and `row_bytes` behind it."""
    for half in range(2):
        low, high = (b.trunc(v_sums[2 * half + part], I16) for part in range(2))
        both = b.or_(b.zext(low, I32), b.shl(b.zext(high, I32), ir.Constant(I32, 16)))
        at = second if half == 0 else b.add(second, row_bytes)
        b.store(both, b.inttoptr(at, I32.as_pointer()), align=4)


@emits(types.void, *[F32x16] * 4, intp, intp, intp)
def store_group(b, v0, v1, v2, v3, quants, scale_at, row_bytes):
    """Quantise 64 inputs: bytes to `quants`; scale and the two int32 sums to scale_at, + row_bytes, + 2 row_bytes."""
    codes = _store_codes(b, (v0, v1, v2, v3), quants, scale_at)
    second = b.add(scale_at, row_bytes)
    store_as(b, _sum(b, b.add(codes[0], codes[1])), second)
    store_as(b, _sum(b, b.add(codes[2], codes[3])), b.add(second, row_bytes))


@emits(types.void, *[F32x16] * 4, intp, intp, intp)
def store_group_of_16(b, v0, v1, v2, v3, quants, scale_at, row_bytes):
    """As `store_group`, with the sums of every 16 inputs as int16 pairs."""
    codes = _store_codes(b, (v0, v1, v2, v3), quants, scale_at)
    store_sums_of_16(b, [_sum(b, part) for part in codes], b.add(scale_at, row_bytes), row_bytes)


@emits(types.void, intp, intp)
def correct_q4(b, scale_at, row_bytes):
    """Replace the sums by scale * sum as float32."""
    second = b.add(scale_at, row_bytes)
    total = b.add(load_as(b, second, I32), load_as(b, b.add(second, row_bytes), I32))
    store_as(b, b.fmul(b.sitofp(total, F32), load_as(b, scale_at, F32)), second)


@emits(types.void, intp, intp)
def keep_sums(b, scale_at, row_bytes):
    """The sums as they are."""


@emits(types.void, intp, intp)
def correct_q8(b, scale_at, row_bytes):
    """Multiply the sums by -128: weights are stored with 128 added."""
    for times in (1, 2):
        at = b.add(scale_at, b.mul(row_bytes, ir.Constant(row_bytes.type, times)))
        store_as(b, b.mul(load_as(b, at, I32), ir.Constant(I32, -128)), at)


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


@emits(types.void, *[F32x16] * 4, intp, intp, intp)
def store_group_of_32(b, v0, v1, v2, v3, quants, scale_at, row_bytes):
    """As `store_group`, with the sums of both 32 inputs as one int16 pair."""
    codes = _store_codes(b, (v0, v1, v2, v3), quants, scale_at)
    low, high = (b.trunc(_sum(b, b.add(*codes[at : at + 2])), I16) for at in (0, 2))
    both = b.or_(b.zext(low, I32), b.shl(b.zext(high, I32), ir.Constant(I32, 16)))
    store_as(b, both, b.add(scale_at, row_bytes))


def row_quantiser(weight_dtype: str):
    """Function: the groups [group, last) of a row's inputs into its place in the records of a panel of `size` rows."""
    correct = {"q4": correct_q4, "q8": correct_q8}.get(weight_dtype, keep_sums)
    if weight_dtype in ("q4", "q8"):
        store_codes = store_group
    else:
        store_codes = store_group_of_32 if format_of(weight_dtype).header == "K2M32" else store_group_of_16

    @helper
    def quantize_row(source, in_features, group, last, panel, row, size):
        while group < last:
            at, left = source + 256 * group, in_features - GROUP_INPUTS * group
            record = panel + group * size * RECORD_BYTES
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
            correct(scale_at, 4 * size)
            group += 1

    return quantize_row
