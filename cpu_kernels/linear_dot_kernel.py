"""linear for fp32 and bf16 weights: y[r, f] = sum_i w[f, i] x[r, i], float32 accumulation, weights row-major.

Both operands run along the inputs, so a register tile of `features` x `rows` vectors collects partial sums that are
added across lanes once per output. Stage 0 (bf16 only) rounds the input rows to bf16; stage 1 hands out ranges of
blocks. At few rows a thread reads the weights as one linear stream; at many, panels of rows pass over a range kept in
cache.
"""

from llvmlite import ir
from numba import types

from .chunks import await_stage, finish, parameter, take, take_range
from .compiler import helper
from .dot import emit_dot_bf16
from .isa import Isa
from .layout import BLOCK_FEATURES
from .linear_layout import SEGMENT_INPUTS
from .scalar import least
from .tiles import finish_dots, masked_line, zeros
from .vector import (
    I64,
    VF32,
    VI32,
    F32x16,
    emits,
    fma_value,
    intp,
    load_as,
    load_f32,
    load_f32_tail,
    prefetch_value,
    store_bf16,
    store_bf16_tail,
)

STREAM_LINES = 4  # lines of one feature per step when rows are few: as many independent sums
STREAM_AHEAD = 3072  # bytes; measured flat from 1 to 5 KB


def multiply_add(isa: Isa, weight_dtype: str, b, acc, w, x):
    """acc + the products of one line of weights and one of inputs."""
    if weight_dtype == "bf16":
        return emit_dot_bf16(isa, b, acc, w, x)
    return fma_value(b, b.bitcast(w, VF32), b.bitcast(x, VF32), acc)


def tile_step(isa: Isa, weight_dtype: str, features: int, rows: int):
    """Intrinsics (sums, w, w_stride, x, x_stride[, items]) -> sums: one 64-byte line, whole or its first items."""
    tile = types.UniTuple(F32x16, features * rows)
    item_bytes = 2 if weight_dtype == "bf16" else 4

    def accumulate(b, sums, ws, xs):
        for row, x in enumerate(xs):
            for f, w in enumerate(ws):
                index = row * features + f
                acc = multiply_add(isa, weight_dtype, b, b.extract_value(sums, index), w, x)
                sums = b.insert_value(sums, acc, index)
        return sums

    def addresses(b, base, stride, count):
        return [b.add(base, b.mul(stride, ir.Constant(I64, index))) for index in range(count)]

    @emits(tile, tile, intp, intp, intp, intp, intp)
    def line(b, sums, w, w_stride, x, x_stride, ahead):
        w_rows, x_rows = addresses(b, w, w_stride, features), addresses(b, x, x_stride, rows)
        for index in range(features):
            prefetch_value(b, ahead, 64 * index)
        ws = [load_as(b, address, VI32) for address in w_rows]
        return accumulate(b, sums, ws, [load_as(b, address, VI32) for address in x_rows])

    @emits(tile, tile, intp, intp, intp, intp, intp)
    def part(b, sums, w, w_stride, x, x_stride, items):
        ws, xs = (
            [masked_line(b, address, items, item_bytes) for address in addresses(b, base, stride, count)]
            for base, stride, count in ((w, w_stride, features), (x, x_stride, rows))
        )
        return accumulate(b, sums, ws, xs)

    return line, part


def stream_step(isa: Isa, weight_dtype: str):
    """Intrinsic (sums, w, x) -> sums: STREAM_LINES lines of one feature, one row."""
    tile = types.UniTuple(F32x16, STREAM_LINES)

    @emits(tile, tile, intp, intp)
    def lines(b, sums, w, x):
        for index in range(STREAM_LINES):
            prefetch_value(b, w, STREAM_AHEAD + 64 * index)
            w_line, x_line = load_as(b, w, VI32, 64 * index), load_as(b, x, VI32, 64 * index)
            acc = multiply_add(isa, weight_dtype, b, b.extract_value(sums, index), w_line, x_line)
            sums = b.insert_value(sums, acc, index)
        return sums

    @emits(types.UniTuple(F32x16, 1), tile)
    def together(b, sums):
        values = [b.extract_value(sums, index) for index in range(STREAM_LINES)]
        while len(values) > 1:
            values = [b.fadd(left, right) for left, right in zip(values[::2], values[1::2])]
        return b.insert_value(ir.Constant(ir.ArrayType(VF32, 1), ir.Undefined), values[0], 0)

    return lines, together


def block_times_row(isa: Isa, weight_dtype: str):
    """Function: the 16 output features of one block for one row, the weights read as one stream."""
    start, store = zeros(STREAM_LINES), finish_dots(1, 1)
    lines, together = stream_step(isa, weight_dtype)
    line, part = tile_step(isa, weight_dtype, 1, 1)
    item_bytes = 2 if weight_dtype == "bf16" else 4
    line_items = 64 // item_bytes

    @helper
    def multiply(weight, w_stride, x, x_stride, inputs, bias, out, out_stride, accumulate):
        whole = inputs // line_items
        rest = inputs - whole * line_items
        for f in range(BLOCK_FEATURES):
            sums, w = start(), weight + f * w_stride
            index = 0
            while index + STREAM_LINES <= whole:
                sums = lines(sums, w + 64 * index, x + 64 * index)
                index += STREAM_LINES
            total = together(sums)
            while index < whole:
                total = line(total, w + 64 * index, w_stride, x + 64 * index, x_stride, w + w_stride + 64 * index)
                index += 1
            if rest:
                total = part(total, w + 64 * whole, w_stride, x + 64 * whole, x_stride, rest)
            store(total, bias + 4 * f if bias else 0, out + 4 * f, out_stride, accumulate)

    return multiply


def block_times_rows(isa: Isa, weight_dtype: str, features: int, rows: int):
    """Function: the 16 output features of one block for `rows` rows, `features` at a time."""
    start, store = zeros(features * rows), finish_dots(features, rows)
    line, part = tile_step(isa, weight_dtype, features, rows)
    item_bytes = 2 if weight_dtype == "bf16" else 4
    line_items = 64 // item_bytes

    @helper
    def multiply(weight, w_stride, x, x_stride, inputs, bias, out, out_stride, accumulate):
        whole = inputs // line_items
        rest = inputs - whole * line_items
        for f in range(0, BLOCK_FEATURES, features):
            sums, w = start(), weight + f * w_stride
            ahead = w + features * w_stride
            for index in range(whole):
                at = ahead + 64 * features * index
                sums = line(sums, w + 64 * index, w_stride, x + 64 * index, x_stride, at)
            if rest:
                sums = part(sums, w + 64 * whole, w_stride, x + 64 * whole, x_stride, rest)
            store(sums, bias + 4 * f if bias else 0, out + 4 * f, out_stride, accumulate)

    return multiply


@helper
def round_rows(arguments):
    """Stage 0: the input rounded to bf16 in the scratch, rows of in_features padded to whole lines."""
    scratch, x, x_stride = parameter(arguments, 0), parameter(arguments, 1), parameter(arguments, 2)
    rows, in_features = parameter(arguments, 3), parameter(arguments, 4)
    row_bytes = ((in_features + 31) // 32 | 1) * 64
    segments = (in_features + SEGMENT_INPUTS - 1) // SEGMENT_INPUTS
    chunk = take(arguments, 0)
    while chunk < rows * segments:
        row, first = chunk // segments, chunk % segments * SEGMENT_INPUTS
        last = least(in_features, first + SEGMENT_INPUTS)
        source, to = x + row * x_stride, scratch + row * row_bytes
        i = first
        while i + 16 <= last:
            store_bf16(load_f32(source + 4 * i), to + 2 * i)
            i += 16
        if i < last:
            store_bf16_tail(load_f32_tail(source + 4 * i, last - i), to + 2 * i, last - i)
        finish(arguments, 0)
        chunk = take(arguments, 0)
    await_stage(arguments, 0, rows * segments)
    return scratch, row_bytes


@helper
def rows_as_they_are(arguments):
    """fp32 needs no rounding: the input itself."""
    return parameter(arguments, 1), parameter(arguments, 2)


def linear_dot(isa: Isa, weight_dtype: str, tile: int):
    """Kernel for any number of rows in panels of `tile` (6, 4 or 1) rows, then 2, then 1; parameters: linear.py."""
    prepare = round_rows if weight_dtype == "bf16" else rows_as_they_are
    item_bytes = 2 if weight_dtype == "bf16" else 4
    multiply_1 = block_times_row(isa, weight_dtype)
    multiply_2, multiply_tile = multiply_1, multiply_1
    if tile > 1:
        multiply_2 = block_times_rows(isa, weight_dtype, 4, 2)
        multiply_tile = block_times_rows(isa, weight_dtype, 4, tile)

    def kernel(arguments, thread):
        x, x_stride = prepare(arguments)
        rows, in_features = parameter(arguments, 3), parameter(arguments, 4)
        weight, num_blocks, block_bytes = parameter(arguments, 5), parameter(arguments, 6), parameter(arguments, 7)
        bias, out, out_stride = parameter(arguments, 8), parameter(arguments, 9), parameter(arguments, 10)
        accumulate, piece = parameter(arguments, 11), parameter(arguments, 12)
        smallest, parts = parameter(arguments, 13), parameter(arguments, 14)
        w_stride = in_features * item_bytes
        start, stop = take_range(arguments, 1, num_blocks, smallest, parts)
        while start < stop:
            for first in range(0, in_features, piece):
                inputs, add_to = least(piece, in_features - first), 1 if first else accumulate
                row = 0
                while row < rows:
                    size = tile if row + tile <= rows else 2 if tile > 2 and row + 2 <= rows else 1
                    from_x = x + row * x_stride + first * item_bytes
                    for block in range(start, stop):
                        w = weight + block * block_bytes + first * item_bytes
                        to = out + row * out_stride + 64 * block
                        offset = bias + 64 * block if bias and first == 0 else 0
                        if size == 1:
                            multiply_1(w, w_stride, from_x, x_stride, inputs, offset, to, out_stride, add_to)
                        elif size == 2:
                            multiply_2(w, w_stride, from_x, x_stride, inputs, offset, to, out_stride, add_to)
                        else:
                            multiply_tile(w, w_stride, from_x, x_stride, inputs, offset, to, out_stride, add_to)
                    row += size
            start, stop = take_range(arguments, 1, num_blocks, smallest, parts)

    return kernel
