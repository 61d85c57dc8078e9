"""linear for fp32, fp16 and bf16 weights: y[r, f] = sum_i w[f, i] x[r, i], float32 accumulation, weights row-major.

Both operands run along the inputs, so a register tile of `features` x `rows` vectors collects partial sums that are
added across lanes once per output. Stage 0 (bf16 only) rounds the input rows to bf16; without an instruction that
multiplies bf16 it also widens them, even inputs apart from odd ones, so that only weights are widened in the loop.
Stage 1 hands out ranges of blocks. At few rows a thread reads the weights as one linear stream; at many, panels of rows
pass over a range kept in cache.
"""

from typing import NamedTuple

from llvmlite import ir
from numba import types

from cpu_kernels.formats.weights import BLOCK_FEATURES
from cpu_kernels.linear.sizes import SEGMENT_INPUTS
from cpu_kernels.team.arguments import LINEAR
from cpu_kernels.team.chunks import await_stage, finish, parameter, take, take_range
from cpu_kernels.vectors.compiler import helper
from cpu_kernels.vectors.dot import line_products
from cpu_kernels.vectors.isa import Isa
from cpu_kernels.vectors.scalar import least
from cpu_kernels.vectors.tiles import finish_dots, masked_line, zeros
from cpu_kernels.vectors.vector import (
    I64,
    LANES,
    VF32,
    VHALF,
    VI16,
    VI32,
    F32x16,
    emits,
    intp,
    lanes_below,
    load_as,
    load_f32,
    load_f32_tail,
    masked_load,
    picked,
    prefetch_value,
    round_to_bf16,
    store_as,
    store_bf16,
    store_bf16_tail,
    widen_halves,
)

STREAM_LINES = 4  # lines of one feature per step when rows are few: as many independent sums


class Line(NamedTuple):
    """How a line of weights meets the inputs: its items, and the bytes of one item and of one line of inputs."""

    items: int
    item_bytes: int
    x_bytes: int

    @property
    def w_bytes(self) -> int:
        """Bytes of a line of weights: 64, but of float16, which meets unrounded inputs, 32."""
        return self.items * self.item_bytes

    @property
    def x_item_bytes(self) -> int:
        """Bytes of one input."""
        return self.x_bytes // self.items

    @property
    def is_widened(self) -> bool:
        """Whether the inputs of a line of weights take more than one."""
        return self.x_bytes > 64


def line_of(isa: Isa, weight_dtype: str) -> Line:
    """fp32, fp16: 16 weights and inputs; bf16: 32, widened in two lines where the CPU cannot multiply bf16."""
    if weight_dtype in ("fp32", "fp16"):
        return Line(16, 4 if weight_dtype == "fp32" else 2, 64)
    return Line(32, 2, 64 if isa.has_bf16 else 128)


def weight_line(shape: Line, b, address, index: int = 0):
    """Line `index` of weights."""
    return load_as(b, address, VI32 if shape.w_bytes == 64 else VHALF, shape.w_bytes * index)


def weight_line_tail(shape: Line, b, address, items):
    """The first items of a line of weights, zeros behind them."""
    if shape.w_bytes == 64:
        return masked_line(b, address, items, shape.item_bytes)
    return b.bitcast(masked_load(b, address, VI16, lanes_below(b, items), "v16i16"), VHALF)


def whole_line(b, address, offset):
    """64 bytes of inputs."""
    return load_as(b, address, VI32, offset)


def tile_step(isa: Isa, weight_dtype: str, features: int, rows: int):
    """Intrinsics (sums, w, w_stride, x, x_stride[, items]) -> sums: one 64-byte line, whole or its first items."""
    tile = types.UniTuple(F32x16, features * rows)
    shape, parts = line_of(isa, weight_dtype), line_products(isa, weight_dtype)

    def accumulate(b, sums, w_lines, x_rows, load):
        for part, (select, add_product) in enumerate(parts):
            ws = [select(b, w) for w in w_lines]
            for row, address in enumerate(x_rows):
                x = load(b, address, 64 * part)
                for f, w in enumerate(ws):
                    index = row * features + f
                    sums = b.insert_value(sums, add_product(b, b.extract_value(sums, index), w, x), index)
        return sums

    def addresses(b, base, stride, count):
        return [b.add(base, b.mul(stride, ir.Constant(I64, index))) for index in range(count)]

    @emits(tile, tile, intp, intp, intp, intp, intp)
    def line(b, sums, w, w_stride, x, x_stride, ahead):
        for index in range(features):
            prefetch_value(b, ahead, 64 * index)
        ws = [weight_line(shape, b, address) for address in addresses(b, w, w_stride, features)]
        return accumulate(b, sums, ws, addresses(b, x, x_stride, rows), whole_line)

    @emits(tile, tile, intp, intp, intp, intp, intp)
    def part(b, sums, w, w_stride, x, x_stride, items):
        ws = [weight_line_tail(shape, b, address, items) for address in addresses(b, w, w_stride, features)]

        def first_items(b, address, offset):
            return masked_line(b, address, items, shape.x_item_bytes)

        load = whole_line if shape.is_widened else first_items  # widened inputs are padded with zeros
        return accumulate(b, sums, ws, addresses(b, x, x_stride, rows), load)

    return line, part


def stream_step(isa: Isa, weight_dtype: str):
    """Intrinsic (sums, w, x) -> sums: STREAM_LINES lines of one feature, one row.

    Nothing is asked for ahead: the CPU's own streams hold no miss buffers of the first level (see q_kernel.py).
    """
    tile = types.UniTuple(F32x16, STREAM_LINES)
    shape, parts = line_of(isa, weight_dtype), line_products(isa, weight_dtype)

    @emits(tile, tile, intp, intp)
    def lines(b, sums, w, x):
        for index in range(STREAM_LINES):
            w_line, acc = weight_line(shape, b, w, index), b.extract_value(sums, index)
            for part, (select, add_product) in enumerate(parts):
                x_line = load_as(b, x, VI32, shape.x_bytes * index + 64 * part)
                acc = add_product(b, acc, select(b, w_line), x_line)
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
    line_items, _, x_bytes = line_of(isa, weight_dtype)
    w_bytes = line_of(isa, weight_dtype).w_bytes

    @helper
    def multiply(weight, w_stride, x, x_stride, inputs, bias, out, out_stride, accumulate):
        whole = inputs // line_items
        rest = inputs - whole * line_items
        for f in range(BLOCK_FEATURES):
            sums, w = start(), weight + f * w_stride
            index = 0
            while index + STREAM_LINES <= whole:
                sums = lines(sums, w + w_bytes * index, x + x_bytes * index)
                index += STREAM_LINES
            total = together(sums)
            while index < whole:
                at = w + w_bytes * index
                total = line(total, at, w_stride, x + x_bytes * index, x_stride, at + w_stride)
                index += 1
            if rest:
                total = part(total, w + w_bytes * whole, w_stride, x + x_bytes * whole, x_stride, rest)
            store(total, bias + 4 * f if bias else 0, out + 4 * f, out_stride, accumulate)

    return multiply


def block_times_rows(isa: Isa, weight_dtype: str, features: int, rows: int):
    """Function: the 16 output features of one block for `rows` rows, `features` at a time."""
    start, store = zeros(features * rows), finish_dots(features, rows)
    line, part = tile_step(isa, weight_dtype, features, rows)
    line_items, _, x_bytes = line_of(isa, weight_dtype)
    w_bytes = line_of(isa, weight_dtype).w_bytes

    @helper
    def multiply(weight, w_stride, x, x_stride, inputs, bias, out, out_stride, accumulate):
        whole = inputs // line_items
        rest = inputs - whole * line_items
        for f in range(0, BLOCK_FEATURES, features):
            sums, w = start(), weight + f * w_stride
            ahead = w + features * w_stride
            for index in range(whole):
                at = ahead + 64 * features * index
                sums = line(sums, w + w_bytes * index, w_stride, x + x_bytes * index, x_stride, at)
            if rest:
                sums = part(sums, w + w_bytes * whole, w_stride, x + x_bytes * whole, x_stride, rest)
            store(sums, bias + 4 * f if bias else 0, out + 4 * f, out_stride, accumulate)

    return multiply


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


def rounded_rows(isa: Isa):
    """Stage 0: the input rounded to bf16 in the scratch, rows of in_features padded to whole lines."""
    items, _, x_bytes = line_of(isa, "bf16")
    keep = keep_widened if line_of(isa, "bf16").is_widened else keep_rounded

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
        chunk = take(arguments, 0)
        while chunk < rows * segments:
            row, first = chunk // segments, chunk % segments * SEGMENT_INPUTS
            source, to = x + row * x_stride, scratch + row * row_bytes
            for i in range(first, least(in_features, first + SEGMENT_INPUTS), items):
                keep(source + 4 * i, in_features - i, to + i // items * x_bytes)
            finish(arguments, 0)
            chunk = take(arguments, 0)
        await_stage(arguments, 0, rows * segments)
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


def linear_dot(isa: Isa, weight_dtype: str, features: int, tile: int):
    """Kernel for any number of rows in panels of `tile` rows, then 2, then 1."""
    prepare = rounded_rows(isa) if weight_dtype == "bf16" else rows_as_they_are
    item_bytes, x_item_bytes = line_of(isa, weight_dtype).item_bytes, line_of(isa, weight_dtype).x_item_bytes
    multiply_1 = block_times_row(isa, weight_dtype)
    multiply_2, multiply_tile = multiply_1, multiply_1
    if tile > 1:
        multiply_2 = block_times_rows(isa, weight_dtype, features, 2)
        multiply_tile = block_times_rows(isa, weight_dtype, features, tile)

    def kernel(arguments, thread):
        x, x_stride = prepare(arguments)
        rows, in_features = parameter(arguments, LINEAR.rows), parameter(arguments, LINEAR.in_features)
        weight, num_blocks, block_bytes = (
            parameter(arguments, LINEAR.weight),
            parameter(arguments, LINEAR.num_blocks),
            parameter(arguments, LINEAR.block_bytes),
        )
        bias, out, out_stride = (
            parameter(arguments, LINEAR.bias),
            parameter(arguments, LINEAR.out),
            parameter(arguments, LINEAR.out_row),
        )
        accumulate, piece = parameter(arguments, LINEAR.accumulate), parameter(arguments, LINEAR.piece)
        smallest, parts = parameter(arguments, LINEAR.smallest), parameter(arguments, LINEAR.parts)
        run, weight_run, out_run = (
            parameter(arguments, LINEAR.run),
            parameter(arguments, LINEAR.weight_run),
            parameter(arguments, LINEAR.out_run),
        )
        w_stride = in_features * item_bytes
        start, stop = take_range(arguments, 1, num_blocks, smallest, parts)
        while start < stop:
            for first in range(0, in_features, piece):
                inputs, add_to = least(piece, in_features - first), 1 if first else accumulate
                row = 0
                while row < rows:
                    size = tile if row + tile <= rows else 2 if tile > 2 and row + 2 <= rows else 1
                    from_x = x + row * x_stride + first * x_item_bytes
                    for block in range(start, stop):
                        unit, inside = block // run, block % run
                        w = weight + unit * weight_run + inside * block_bytes + first * item_bytes
                        column = unit * out_run + 64 * inside
                        to, offset = out + row * out_stride + column, bias + column if bias and first == 0 else 0
                        if size == 1:
                            multiply_1(w, w_stride, from_x, x_stride, inputs, offset, to, out_stride, add_to)
                        elif size == 2:
                            multiply_2(w, w_stride, from_x, x_stride, inputs, offset, to, out_stride, add_to)
                        else:
                            multiply_tile(w, w_stride, from_x, x_stride, inputs, offset, to, out_stride, add_to)
                    row += size
            start, stop = take_range(arguments, 1, num_blocks, smallest, parts)

    return kernel
