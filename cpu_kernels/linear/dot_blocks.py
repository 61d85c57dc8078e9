"""One block of row-major weights, 16 features, times one row or a panel of rows: what linear_dot repeats."""

from typing import NamedTuple

from llvmlite import ir
from numba import types

from cpu_kernels.formats.weights import BLOCK_FEATURES
from cpu_kernels.vectors.compiler import helper
from cpu_kernels.vectors.dot import emit_dot_bf16, in_parts, line_products
from cpu_kernels.vectors.isa import Isa
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
    float_vector,
    intp,
    lanes_below,
    load_as,
    masked_load,
    prefetch_value,
    unknown,
)

STREAM_LINES = 4  # lines of one feature per step when rows are few: as many independent sums
SHORT_BYTES = 1024  # features of no more are short
NATIVE_AHEAD_BYTES = 3072  # ahead of bf16 that the CPU multiplies itself
SHORT_AHEAD_BYTES = 1024  # ahead of short features on AVX2: 512 gain less, of longer ones every distance costs


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


def line_of(isa: Isa, weight_dtype: str, tile: int) -> Line:
    """fp32, fp16: 16 weights and inputs; bf16: 32, widened in two lines where the CPU cannot multiply bf16.

    tile: rows of a kernel's largest. On x86 a kernel of one row widens inputs in its loop, where memory leaves it time:
    8192 of them, widened, are as large as the first level.
    """
    if weight_dtype in ("fp32", "fp16"):
        return Line(16, 4 if weight_dtype == "fp32" else 2, 64)
    return Line(32, 2, 64 if isa.has_bf16 or tile == 1 and (isa.has_avx2 or isa.has_avx512) else 128)


def products_of(isa: Isa, weight_dtype: str, shape: Line):
    """As `line_products`, of inputs that are widened or not."""
    if weight_dtype == "bf16" and not shape.is_widened:
        return [(lambda b, line: line, lambda b, acc, line, x: emit_dot_bf16(isa, b, acc, line, x))]
    return line_products(isa, weight_dtype)


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


def lanes_of_sums(isa: Isa, features: int, rows: int) -> int:
    """16, or on AVX2, where two of its 16 registers hold 16, the 8 of one where so many sums would not fit."""
    return 8 if isa.has_avx2 and 2 * features * rows > 12 else LANES


def tile_step(isa: Isa, weight_dtype: str, features: int, rows: int, shape: Line):
    """Intrinsics (sums, w, w_stride, x, x_stride[, items]) -> sums: one 64-byte line, whole or its first items."""
    lanes = lanes_of_sums(isa, features, rows)
    tile = types.UniTuple(float_vector(lanes), features * rows)
    products = products_of(isa, weight_dtype, shape)

    def in_lanes(b, vector):
        return in_parts(b, vector, ir.VectorType(vector.type.element, lanes))

    def accumulate(b, sums, weights_of, x_rows, load):
        """weights_of: the lines of weights for a place of `products`. A part of an input line is read once for all
        features."""
        for place, (select, add_product) in enumerate(products):
            for part, words in enumerate(zip(*(in_lanes(b, line) for line in weights_of(place)))):
                ws = [select(b, w) for w in words]
                for row, address in enumerate(x_rows):
                    x = in_lanes(b, load(b, address, 64 * place))[part]
                    for f, w in enumerate(ws):
                        index = row * features + f
                        sums = b.insert_value(sums, add_product(b, b.extract_value(sums, index), w, x), index)
        return sums

    def addresses(b, base, stride, count):
        return [b.add(base, b.mul(stride, ir.Constant(I64, index))) for index in range(count)]

    @emits(tile, tile, intp, intp, intp, intp)
    def line(b, sums, w, w_stride, x, x_stride):
        w_rows = addresses(b, w, w_stride, features)

        def weights_of(place):
            """Read once more for a further product where no register is left to keep them."""
            again = (unknown(b, address) if place and lanes < LANES else address for address in w_rows)
            return [weight_line(shape, b, address) for address in again]

        return accumulate(b, sums, weights_of, addresses(b, x, x_stride, rows), whole_line)

    @emits(tile, tile, intp, intp, intp, intp, intp)
    def part(b, sums, w, w_stride, x, x_stride, items):
        ws = [weight_line_tail(shape, b, address, items) for address in addresses(b, w, w_stride, features)]

        def first_items(b, address, offset):
            return masked_line(b, address, items, shape.x_item_bytes)

        load = whole_line if shape.is_widened else first_items  # widened inputs are padded with zeros
        return accumulate(b, sums, lambda place: ws, addresses(b, x, x_stride, rows), load)

    return line, part


def lines_ahead(features: int):
    """Intrinsic (address): ask for so many lines from there on."""

    @emits(types.void, intp)
    def ask(b, address):
        for index in range(features):
            prefetch_value(b, address, 64 * index)

    return ask


def stream_step(isa: Isa, weight_dtype: str, shape: Line, ahead: int = 0):
    """Intrinsic (sums, w, x) -> sums: STREAM_LINES lines of one feature, one row; asks for those `ahead` bytes on."""
    tile = types.UniTuple(F32x16, STREAM_LINES)
    parts = products_of(isa, weight_dtype, shape)

    @emits(tile, tile, intp, intp)
    def lines(b, sums, w, x):
        for index in range(STREAM_LINES):
            if ahead:
                prefetch_value(b, w, ahead + shape.w_bytes * index)
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


def block_times_row(isa: Isa, weight_dtype: str, shape: Line):
    """Function: the 16 output features of one block for one row, the weights read as one stream; shape: `line_of`.

    Little is asked for ahead: the CPU's own streams hold no miss buffers of the first level (see q_kernel.py). But
    the sums of short features come between their lines, and a Zen 3 then runs too little ahead by itself; and bf16 that
    a Zen 4 multiplies itself waits for its lines between blocks: a step takes 5 % less with them, of float32 3 % more.
    """
    start, store = zeros(STREAM_LINES), finish_dots(1, 1)
    is_native = isa.has_bf16 and weight_dtype == "bf16"
    lines, together = stream_step(isa, weight_dtype, shape, NATIVE_AHEAD_BYTES if is_native else 0)
    lines_of_short = stream_step(isa, weight_dtype, shape, SHORT_AHEAD_BYTES if isa.name == "avx2" else 0)[0]
    line, part = tile_step(isa, weight_dtype, 1, 1, shape)
    line_items, _, x_bytes = shape
    w_bytes = shape.w_bytes

    @helper
    def multiply(weight, w_stride, x, x_stride, inputs, bias, out, out_stride, accumulate, kept, is_first):
        whole = inputs // line_items
        rest = inputs - whole * line_items
        for f in range(BLOCK_FEATURES):
            sums, w = start(), weight + f * w_stride
            index = 0
            while index + STREAM_LINES <= whole:
                if w_bytes * whole <= SHORT_BYTES:
                    sums = lines_of_short(sums, w + w_bytes * index, x + x_bytes * index)
                else:
                    sums = lines(sums, w + w_bytes * index, x + x_bytes * index)
                index += STREAM_LINES
            total = together(sums)
            while index < whole:
                total = line(total, w + w_bytes * index, w_stride, x + x_bytes * index, x_stride)
                index += 1
            if rest:
                total = part(total, w + w_bytes * whole, w_stride, x + x_bytes * whole, x_stride, rest)
            store(total, bias + 4 * f if bias else 0, out + 4 * f, out_stride, accumulate, kept)

    return multiply


def block_times_rows(isa: Isa, weight_dtype: str, features: int, rows: int, shape: Line):
    """Function: the 16 output features of one block for `rows` rows, `features` at a time.

    is_first: whether no rows before these have read the weights, so that the next ones are asked for.
    """
    lanes = lanes_of_sums(isa, features, rows)
    start, store = zeros(features * rows, lanes), finish_dots(features, rows, lanes)
    line, part = tile_step(isa, weight_dtype, features, rows, shape)
    ask = lines_ahead(features)
    line_items, _, x_bytes = shape
    w_bytes = shape.w_bytes

    @helper
    def multiply(weight, w_stride, x, x_stride, inputs, bias, out, out_stride, accumulate, kept, is_first):
        whole = inputs // line_items
        rest = inputs - whole * line_items
        for f in range(0, BLOCK_FEATURES, features):
            sums, w = start(), weight + f * w_stride
            ahead = w + features * w_stride
            for index in range(whole):
                if is_first:
                    ask(ahead + 64 * features * index)
                sums = line(sums, w + w_bytes * index, w_stride, x + x_bytes * index, x_stride)
            if rest:
                sums = part(sums, w + w_bytes * whole, w_stride, x + x_bytes * whole, x_stride, rest)
            store(sums, bias + 4 * f if bias else 0, out + 4 * f, out_stride, accumulate, kept)

    return multiply
