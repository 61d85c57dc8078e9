"""linear for fp32, fp16 and bf16 weights: y[r, f] = sum_i w[f, i] x[r, i], float32 accumulation, weights row-major.

Both operands run along the inputs, so a register tile of `features` x `rows` vectors collects partial sums that are
added across lanes once per output. Stage 0 (bf16 only) rounds the input rows to bf16; without an instruction that
multiplies bf16 it also widens them for several, even inputs apart from odd ones, so that only weights are widened in
the loop.
Stage 1 hands out ranges of blocks. At few rows a thread reads the weights as one linear stream; at many, panels of rows
pass over a range kept in cache, or, of bf16 that the CPU cannot multiply, over turned weights (panels/turned.py).
"""

from numba import types

from cpu_kernels.linear.dot_blocks import block_times_row, block_times_rows, line_of
from cpu_kernels.linear.panels.places import spread_area
from cpu_kernels.linear.panels.turned import turned_rows
from cpu_kernels.linear.sizes import SEGMENT_INPUTS, turns_rows
from cpu_kernels.team.arguments import LINEAR
from cpu_kernels.team.chunks import await_stage, finish, parameter, take, take_range
from cpu_kernels.vectors.compiler import helper
from cpu_kernels.vectors.isa import Isa
from cpu_kernels.vectors.scalar import least
from cpu_kernels.vectors.vector import (
    LANES,
    F32x16,
    emits,
    intp,
    load_f32,
    load_f32_tail,
    picked,
    round_to_bf16,
    store_as,
    store_bf16,
    store_bf16_tail,
    widen_halves,
)


@emits(types.void, F32x16, F32x16, intp)
def store_even_odd(b, first, second, to):
    """32 inputs rounded to bf16 and widened: a line of those with even places, then one of the odd ones."""
    for odd in (0, 1):
        lanes = picked(b, first, second, list(range(odd, 2 * LANES, 2)))
        store_as(b, widen_halves(b, round_to_bf16(b, lanes), 1), to, 64 * odd)


@helper
def keep_rounded(x, count, to):
    """The next 32 inputs, or the first `count` of them, rounded to bf16."""
    for half in range(0, least(count, 32), 16):
        if half + 16 <= count:
            store_bf16(load_f32(x + 4 * half), to + 2 * half)
        else:
            store_bf16_tail(load_f32_tail(x + 4 * half, count - half), to + 2 * half, count - half)


@helper
def keep_widened(x, count, to):
    """The next 32 inputs, or the first `count` and zeros, rounded to bf16 and widened, even ones apart from odd
    ones."""
    if count >= 32:
        store_even_odd(load_f32(x), load_f32(x + 64), to)
    else:
        store_even_odd(load_f32_tail(x, count), load_f32_tail(x + 64, count - 16), to)


@helper
def fills_tile(rows, tile):
    """Whether the last row comes twice, to make a tile of four whole: three rows are two panels otherwise."""
    return tile == 4 and rows % tile == 3


def rounded_rows(isa: Isa, tile: int):
    """Stage 0: the input rounded to bf16 in the scratch, rows of in_features padded to whole lines."""
    shape = line_of(isa, "bf16", tile)
    items, _, x_bytes = shape
    keep = keep_widened if shape.is_widened else keep_rounded

    @helper
    def round_rows(arguments):
        scratch, x, x_stride = (
            parameter(arguments, LINEAR.scratch),
            parameter(arguments, LINEAR.x),
            parameter(arguments, LINEAR.x_row),
        )
        rows, in_features = parameter(arguments, LINEAR.rows), parameter(arguments, LINEAR.in_features)
        row_bytes = padded_row_bytes(in_features, x_bytes)
        segments = (in_features + SEGMENT_INPUTS - 1) // SEGMENT_INPUTS
        filled = rows + 1 if fills_tile(rows, tile) else rows
        chunk = take(arguments, 0)
        while chunk < filled * segments:
            row, first = chunk // segments, chunk % segments * SEGMENT_INPUTS
            source, to = x + least(row, rows - 1) * x_stride, scratch + row * row_bytes
            for i in range(first, least(in_features, first + SEGMENT_INPUTS), items):
                keep(source + 4 * i, in_features - i, to + i // items * x_bytes)
            finish(arguments, 0)
            chunk = take(arguments, 0)
        await_stage(arguments, 0, filled * segments)
        return scratch, row_bytes

    return round_rows


@helper
def padded_row_bytes(in_features, x_bytes):
    """Bytes from one rounded row to the next, an odd number of lines: rows do not meet in one set of the cache."""
    return ((in_features + 31) // 32 * (x_bytes // 64) | 1) * 64


@helper
def rows_as_they_are(arguments):
    """fp32 and fp16 need no rounding: the input itself."""
    return parameter(arguments, LINEAR.x), parameter(arguments, LINEAR.x_row)


def rows_over_range(isa: Isa, weight_dtype: str, features: int, tile: int, fills: bool = False):
    """Function: a range of blocks times rows in panels of `tile` rows, then 2, then 1, piece after piece of the inputs.

    fills: whether what `fills_tile` says is one panel, behind whose rows the last one comes again. place: of the first
    row, in x and in out. start, stop: blocks of `weight`. The call's words are those that both kinds of linear have.
    """
    shape = line_of(isa, weight_dtype, tile)
    item_bytes, x_item_bytes = shape.item_bytes, shape.x_item_bytes
    multiply_1 = block_times_row(isa, weight_dtype, shape)
    multiply_2, multiply_tile = multiply_1, multiply_1
    if tile > 1:
        multiply_2 = block_times_rows(isa, weight_dtype, features, 2, shape)
        multiply_tile = block_times_rows(isa, weight_dtype, features, tile, shape)

    @helper
    def multiply(arguments, x, x_stride, weight, place, rows, start, stop):
        in_features, piece = parameter(arguments, LINEAR.in_features), parameter(arguments, LINEAR.piece)
        block_bytes, bias = parameter(arguments, LINEAR.block_bytes), parameter(arguments, LINEAR.bias)
        out, out_stride = parameter(arguments, LINEAR.out), parameter(arguments, LINEAR.out_row)
        run, weight_run, out_run = (
            parameter(arguments, LINEAR.run),
            parameter(arguments, LINEAR.weight_run),
            parameter(arguments, LINEAR.out_run),
        )
        w_stride = in_features * item_bytes
        for first in range(0, in_features, piece):
            inputs = least(piece, in_features - first)
            add_to, row = 1 if first else parameter(arguments, LINEAR.accumulate), 0
            while row < rows:
                size = tile if row + tile <= rows else 2 if tile > 2 and row + 2 <= rows else 1
                if fills and rows - row == 3 and fills_tile(rows, tile):
                    size = tile
                kept, is_first = least(size, rows - row), row == 0
                from_x = x + (place + row) * x_stride + first * x_item_bytes
                for block in range(start, stop):
                    unit, inside = block // run, block % run
                    w = weight + unit * weight_run + inside * block_bytes + first * item_bytes
                    column = unit * out_run + 64 * inside
                    to = out + (place + row) * out_stride + column
                    offset = bias + column if bias and first == 0 else 0
                    if size == 1:
                        multiply_1(
                            w, w_stride, from_x, x_stride, inputs, offset, to, out_stride, add_to, kept, is_first
                        )
                    elif size == 2:
                        multiply_2(
                            w, w_stride, from_x, x_stride, inputs, offset, to, out_stride, add_to, kept, is_first
                        )
                    else:
                        multiply_tile(
                            w, w_stride, from_x, x_stride, inputs, offset, to, out_stride, add_to, kept, is_first
                        )
                row += size

    return multiply


@helper
def no_rows(arguments, x, x_stride, weight, place, rows, start, stop, area):
    """Of weights that are multiplied as they lie, however many rows there are."""
    return 0


def linear_dot(isa: Isa, weight_dtype: str, features: int, tile: int):
    """Kernel for any number of rows in panels of `tile` rows, then 2, then 1."""
    is_rounded = weight_dtype == "bf16"
    prepare = rounded_rows(isa, tile) if is_rounded else rows_as_they_are
    multiply = rows_over_range(isa, weight_dtype, features, tile, is_rounded)

    turned = turned_rows(isa) if turns_rows(isa, weight_dtype) and tile > 1 else no_rows

    def kernel(arguments, thread):
        x, x_stride = prepare(arguments)
        area = spread_area(arguments, thread)
        weight, rows = parameter(arguments, LINEAR.weight), parameter(arguments, LINEAR.rows)
        num_blocks = parameter(arguments, LINEAR.num_blocks)
        smallest, parts = parameter(arguments, LINEAR.smallest), parameter(arguments, LINEAR.parts)
        start, stop = take_range(arguments, 1, num_blocks, smallest, parts)
        while start < stop:
            done = turned(arguments, x, x_stride, weight, 0, rows, start, stop, area)
            multiply(arguments, x, x_stride, weight, done, rows - done, start, stop)
            start, stop = take_range(arguments, 1, num_blocks, smallest, parts)

    return kernel
