"""linear for fp32 and bf16 weights: y[r, f] = sum_i w[f, i] x[r, i], float32 accumulation, weights row-major.

Both operands run along the inputs, so a register tile of `features` x `rows` vectors collects partial sums that are
added across lanes once per output. Stage 0 (bf16 only) rounds the input rows to bf16; stage 1 hands out ranges of blocks.
At few rows a thread reads the weights as one linear stream; at many, panels of rows pass over a range kept in cache.
"""

from llvmlite import ir
from numba import njit, types

from .chunks import await_stage, finish, parameter, take
from .dot import emit_dot_bf16
from .isa import Isa
from .layout import BLOCK_FEATURES
from .linear_layout import SEGMENT_INPUTS
from .tiles import finish_dots, masked_line, zeros
from .vector import (
    I8,
    I32,
    I64,
    VF32,
    VI32,
    F32x16,
    call_llvm,
    emits,
    fma_value,
    intp,
    load_as,
    load_f32,
    load_f32_tail,
    store_bf16,
    store_bf16_tail,
)

PREFETCH_BYTES = 2048


def dot_step(isa: Isa, weight_dtype: str, features: int, rows: int):
    """Intrinsics (sums, w, w_stride, x, x_stride[, bytes]) -> sums: one 64-byte line, whole or its first bytes."""
    tile = types.UniTuple(F32x16, features * rows)

    def accumulate(b, sums, ws, xs):
        for row, x in enumerate(xs):
            for f, w in enumerate(ws):
                index = row * features + f
                acc = b.extract_value(sums, index)
                if weight_dtype == "bf16":
                    acc = emit_dot_bf16(isa, b, acc, w, x)
                else:
                    acc = fma_value(b, b.bitcast(w, VF32), b.bitcast(x, VF32), acc)
                sums = b.insert_value(sums, acc, index)
        return sums

    def addresses(b, base, stride, count):
        return [b.add(base, b.mul(stride, ir.Constant(I64, index))) for index in range(count)]

    @emits(tile, tile, intp, intp, intp, intp)
    def line(b, sums, w, w_stride, x, x_stride):
        at = addresses(b, w, w_stride, features)
        if rows <= 2:
            for address in at:
                ahead = b.gep(b.inttoptr(address, I8.as_pointer()), [ir.Constant(I64, PREFETCH_BYTES)])
                call_llvm(b, "llvm.prefetch.p0", ir.VoidType(), ahead, *(ir.Constant(I32, v) for v in (0, 3, 1)))
        ws = [load_as(b, address, VI32) for address in at]
        return accumulate(b, sums, ws, [load_as(b, address, VI32) for address in addresses(b, x, x_stride, rows)])

    @emits(tile, tile, intp, intp, intp, intp, intp)
    def part(b, sums, w, w_stride, x, x_stride, count):
        def load(address):
            return masked_line(b, address, count, 2 if weight_dtype == "bf16" else 4)

        ws = [load(address) for address in addresses(b, w, w_stride, features)]
        return accumulate(b, sums, ws, [load(address) for address in addresses(b, x, x_stride, rows)])

    return line, part


def block_times_rows(isa: Isa, weight_dtype: str, features: int, rows: int):
    """Function: the 16 output features of one block for `rows` rows, `features` at a time."""
    start, store = zeros(features * rows), finish_dots(features, rows)
    line, part = dot_step(isa, weight_dtype, features, rows)
    item_bytes = 2 if weight_dtype == "bf16" else 4
    line_items = 64 // item_bytes

    @njit
    def multiply(weight, x, x_stride, in_features, bias, out, out_stride, accumulate):
        w_stride = in_features * item_bytes
        lines = in_features // line_items
        rest = in_features - lines * line_items
        for f in range(0, BLOCK_FEATURES, features):
            sums = start()
            w = weight + f * w_stride
            for index in range(lines):
                sums = line(sums, w + 64 * index, w_stride, x + 64 * index, x_stride)
            if rest:
                sums = part(sums, w + 64 * lines, w_stride, x + 64 * lines, x_stride, rest)
            store(sums, bias + 4 * f if bias else 0, out + 4 * f, out_stride, accumulate)

    return multiply


@njit
def round_rows(arguments):
    """Stage 0: the input rounded to bf16 in the scratch, rows of in_features padded to whole lines."""
    scratch, x, x_stride = parameter(arguments, 0), parameter(arguments, 1), parameter(arguments, 2)
    rows, in_features = parameter(arguments, 3), parameter(arguments, 4)
    row_bytes = (in_features + 31) // 32 * 64
    segments = (in_features + SEGMENT_INPUTS - 1) // SEGMENT_INPUTS
    chunk = take(arguments, 0)
    while chunk < rows * segments:
        row, first = chunk // segments, chunk % segments * SEGMENT_INPUTS
        last = min(in_features, first + SEGMENT_INPUTS)
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


@njit
def rows_as_they_are(arguments):
    """fp32 needs no rounding: the input itself."""
    return parameter(arguments, 1), parameter(arguments, 2)


def linear_dot(isa: Isa, weight_dtype: str, tile: int):
    """Kernel for any number of rows in panels of `tile` (4 or 1) rows; parameters as in linear.py."""
    prepare = round_rows if weight_dtype == "bf16" else rows_as_they_are
    multiply_many = block_times_rows(isa, weight_dtype, 4, tile)
    multiply_1 = block_times_rows(isa, weight_dtype, 4, 1)

    def kernel(arguments, thread):
        x, x_stride = prepare(arguments)
        rows, in_features = parameter(arguments, 3), parameter(arguments, 4)
        weight, num_blocks, block_bytes = parameter(arguments, 5), parameter(arguments, 6), parameter(arguments, 7)
        bias, out, out_stride = parameter(arguments, 8), parameter(arguments, 9), parameter(arguments, 10)
        accumulate, blocks = parameter(arguments, 11), parameter(arguments, 12)
        chunk = take(arguments, 1)
        while chunk * blocks < num_blocks:
            last = min(num_blocks, (chunk + 1) * blocks)
            row = 0
            while row < rows:
                size = tile if row + tile <= rows else 1
                for block in range(chunk * blocks, last):
                    at, to = weight + block * block_bytes, out + row * out_stride + 64 * block
                    offset = bias + 64 * block if bias else 0
                    row_at = x + row * x_stride
                    if size == tile:
                        multiply_many(at, row_at, x_stride, in_features, offset, to, out_stride, accumulate)
                    else:
                        multiply_1(at, row_at, x_stride, in_features, offset, to, out_stride, accumulate)
                row += size
            chunk = take(arguments, 1)

    return kernel
