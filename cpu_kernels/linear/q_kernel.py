"""linear for coded weights: y[r,f] = sum_g xs[r,g] (scale[f,g] sum_i q[f,i] xq[r,i] + min[f,g] sum_i xq[r,i]).

Stage 0 quantises the input per row and group of 64 to int8 and lays it out in panels of up to `row_tile` rows, one
record per group, so that the inner loop reads it from one pointer at constant offsets. Stage 1 hands out ranges of
blocks; for each, every panel of rows passes over the block's superblocks. Dot products are exact int32 inside a group;
the 16 features of a block are the 16 lanes, so nothing is ever summed across lanes.

Record of a panel of R rows (76 R bytes): R x 64 int8, R float32 scales, R corrections, R second corrections, which are
q4: scale * sum(xq) as float32, unused;  q8: -128 * sum(xq) as int32 of inputs 0..31, then of 32..63;
other formats: sums of 16 inputs as int16 pairs, of inputs 0..31, then of 32..63 (form_kernel.py).
"""

from functools import reduce

from llvmlite import ir
from numba import types

from cpu_kernels.formats import GROUP_INPUTS, LINE_BYTES, format_of
from cpu_kernels.formats.weights import SUPERBLOCK_LINES
from cpu_kernels.linear.form_kernel import form_step, header_ahead, store_sums_of_16
from cpu_kernels.linear.sizes import RECORD_BYTES, SEGMENT_GROUPS
from cpu_kernels.team.arguments import LINEAR
from cpu_kernels.team.chunks import await_stage, finish, parameter, take, take_range
from cpu_kernels.vectors.code_sums import CodeSums
from cpu_kernels.vectors.compiler import helper
from cpu_kernels.vectors.dot import V8I32, in_parts, together
from cpu_kernels.vectors.isa import Isa
from cpu_kernels.vectors.scalar import least
from cpu_kernels.vectors.tiles import finish_features, zeros
from cpu_kernels.vectors.vector import (
    F32,
    I32,
    VF32,
    VHALF,
    VI8,
    VI32,
    F32x16,
    call_llvm,
    constant,
    emits,
    fma_value,
    intp,
    load_as,
    load_f32_tail,
    prefetch_value,
    splat_value,
    store_as,
)

AHEAD_BYTES = 2048  # ahead of the weight stream, of a few rows
FAR_AHEAD_BYTES = 6144  # where the dot products are: 8 rows of q8 gain a half, 4 of q4 as much, fewer rows lose a third
FAR_ROWS = {"q8": 8}  # from so many rows on they are; 4 for the others


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
def panel_of(row, rows, tile):
    """(first row, number of rows) of the panel that holds `row`: panels of `tile`, then its halves for the rest."""
    first, size = 0, tile
    while True:
        whole = (rows - first) // size * size
        if row < first + whole:
            return first + (row - first) // size * size, size
        first += whole
        size //= 2


def ahead_bytes(weight_dtype: str, rows: int) -> int:
    """How far ahead of the weight stream is asked for, 0 for nothing.

    One row is as fast as its lines come, and what is asked for holds the first level's few miss buffers longer than the
    CPU's own streams do: on Zen 4 without them a thread reads q5_k at 24 instead of 15 GB/s, with AVX2 q4_k at 28
    instead of 15.
    """
    if rows == 1:
        return 0
    return FAR_AHEAD_BYTES if rows >= FAR_ROWS.get(weight_dtype, 4) else AHEAD_BYTES


def superblock(isa: Isa, weight_dtype: str, rows: int):
    """Intrinsic (sums, weight address, record address) -> sums: one superblock of q4 or q8 times one record."""
    tile = types.UniTuple(F32x16, rows)

    def inputs(b, record, row, offset):
        return splat_value(b, load_as(b, record, I32, GROUP_INPUTS * row + offset))

    def factor(b, record, row, field, scalar=F32):
        return splat_value(b, load_as(b, record, scalar, rows * (GROUP_INPUTS + 4 * field) + 4 * row))

    def halves(b, weight, offset):
        return b.fpext(load_as(b, weight, VHALF, offset), VF32)

    def ahead(b, weight):
        distance = ahead_bytes(weight_dtype, rows)
        for line in range(SUPERBLOCK_LINES[weight_dtype] if distance else 0):
            prefetch_value(b, weight, distance + LINE_BYTES * line)

    codes = CodeSums(isa, format_of(weight_dtype).largest_code)

    @emits(tile, tile, intp, intp)
    def superblock_q4(b, sums, weight, record):
        chains = 2 if rows <= 2 else 1
        dots = [[codes.sum(b, constant(VI32, 0)) for _ in range(chains)] for _ in range(rows)]
        ahead(b, weight)
        for line in range(8):
            packed = load_as(b, weight, VI32, LINE_BYTES * (1 + line))
            low = codes.operand(b, b.and_(packed, constant(VI32, 0x0F0F0F0F)))
            high = codes.operand(b, b.and_(b.lshr(packed, constant(VI32, 4)), constant(VI32, 0x0F0F0F0F)))
            for row in range(rows):
                chain = dots[row]
                chain[0].add(low, inputs(b, record, row, 8 * line))
                chain[-1].add(high, inputs(b, record, row, 8 * line + 4))
        scale, minimum = halves(b, weight, 0), halves(b, weight, 32)
        for row in range(rows):
            total = reduce(b.add, (chain.total() for chain in dots[row]))
            scaled = b.fmul(b.sitofp(total, VF32), scale)
            acc = fma_value(b, scaled, factor(b, record, row, 0), b.extract_value(sums, row))
            sums = b.insert_value(sums, fma_value(b, minimum, factor(b, record, row, 1), acc), row)
        return sums

    line = VI32 if codes.pieces == 1 else V8I32  # what of a line of q8 is taken at once

    def piece_dots(b, weight, record, piece):
        """[row][half]: int32 sums of the features of one piece."""

        def start(row, half):
            return constant(line, 0) if codes.takes_128 else factor(b, record, row, 1 + half, I32)

        dots = [[codes.sum(b, start(row, half)) for half in range(2)] for row in range(rows)]
        for index in range(16):
            at = LINE_BYTES * (1 + index) + LINE_BYTES // codes.pieces * piece
            packed = codes.operand(b, load_as(b, weight, line, at))
            for row in range(rows):
                dots[row][index // 8].add(packed, in_parts(b, inputs(b, record, row, 4 * index), line)[0])
        return [[dot.total() for dot in halves] for halves in dots]

    @emits(tile, tile, intp, intp)
    def superblock_q8(b, sums, weight, record):
        ahead(b, weight)
        pieces = [piece_dots(b, weight, record, piece) for piece in range(codes.pieces)]
        dots = [[together(b, [part[row][half] for part in pieces]) for half in range(2)] for row in range(rows)]
        scales = [halves(b, weight, 32 * half) for half in range(2)]
        for row in range(rows):
            scaled = b.fmul(b.sitofp(dots[row][0], VF32), scales[0])
            scaled = fma_value(b, b.sitofp(dots[row][1], VF32), scales[1], scaled)
            sums = b.insert_value(
                sums, fma_value(b, scaled, factor(b, record, row, 0), b.extract_value(sums, row)), row
            )
        return sums

    return {"q4": superblock_q4, "q8": superblock_q8}[weight_dtype]


def block_times_panel(isa: Isa, weight_dtype: str, rows: int):
    """Function: 16 output features of `rows` rows, over `groups` of 64 inputs from the start of a superblock on."""
    start, store = zeros(rows), finish_features(rows)
    over_groups = groups_times_panel(isa, weight_dtype, rows)

    @helper
    def multiply(weight, record, groups, bias, out, out_stride, accumulate):
        store(over_groups(start(), weight, record, groups), bias, out, out_stride, accumulate)

    return multiply


def groups_times_panel(isa: Isa, weight_dtype: str, rows: int):
    """Function (sums, weight, record, groups) -> sums, each group added to those of the groups before it."""
    item = format_of(weight_dtype)
    record_bytes = rows * RECORD_BYTES
    superblock_bytes, header_bytes = item.superblock_bytes, item.header_lines * LINE_BYTES
    together, group_bytes = item.group_inputs // GROUP_INPUTS, item.code_lines * LINE_BYTES
    if weight_dtype in ("q4", "q8"):
        step = superblock(isa, weight_dtype, rows)

        @helper
        def add_groups(sums, weight, record, groups):
            for group in range(groups):
                sums = step(sums, weight + superblock_bytes * group, record + record_bytes * group)
            return sums

        return add_groups
    ahead = ahead_bytes(weight_dtype, rows)
    step_of_form, ask_for_header = form_step(isa, item, rows, ahead), header_ahead(item, ahead)

    @helper
    def add_groups_of_form(sums, weight, record, groups):
        at, group = weight, 0
        while group < groups:
            lines = at + header_bytes
            ask_for_header(at)
            for inside in range(least(together, groups - group)):
                sums = step_of_form(sums, at, inside, lines + group_bytes * inside, record)
                record += record_bytes
            at += superblock_bytes
            group += together
        return sums

    return add_groups_of_form


def row_quantiser(weight_dtype: str):
    """Function: the groups [group, last) of a row's inputs into its place in the records of a panel of `size` rows."""
    correct = {"q4": correct_q4, "q8": correct_q8}.get(weight_dtype, keep_sums)
    store_codes = store_group if weight_dtype in ("q4", "q8") else store_group_of_16

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


def linear_q(isa: Isa, weight_dtype: str, tile: int):
    """Kernel for any number of rows in panels of `tile` (8, 4 or 1) rows."""
    item = format_of(weight_dtype)
    quantize_row = row_quantiser(weight_dtype)
    multiply_8, multiply_4, multiply_2, multiply_1 = (
        block_times_panel(isa, weight_dtype, min(rows, tile)) for rows in (8, 4, 2, 1)
    )
    superblock_bytes, together = item.superblock_bytes, item.group_inputs // GROUP_INPUTS

    @helper
    def quantize(arguments):
        records, x, x_stride, rows, in_features = (
            parameter(arguments, LINEAR.scratch),
            parameter(arguments, LINEAR.x),
            parameter(arguments, LINEAR.x_row),
            parameter(arguments, LINEAR.rows),
            parameter(arguments, LINEAR.in_features),
        )
        groups = (in_features + GROUP_INPUTS - 1) // GROUP_INPUTS
        segments = (groups + SEGMENT_GROUPS - 1) // SEGMENT_GROUPS
        chunk = take(arguments, 0)
        while chunk < rows * segments:
            row, segment = chunk // segments, chunk % segments
            first, size = panel_of(row, rows, tile)
            last = least(groups, (segment + 1) * SEGMENT_GROUPS)
            panel = records + first * groups * RECORD_BYTES
            quantize_row(x + row * x_stride, in_features, segment * SEGMENT_GROUPS, last, panel, row - first, size)
            finish(arguments, 0)
            chunk = take(arguments, 0)
        await_stage(arguments, 0, rows * segments)

    def kernel(arguments, thread):
        quantize(arguments)
        records, rows = parameter(arguments, LINEAR.scratch), parameter(arguments, LINEAR.rows)
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
        accumulate, piece = (
            parameter(arguments, LINEAR.accumulate),
            (parameter(arguments, LINEAR.piece) + GROUP_INPUTS - 1) // GROUP_INPUTS,
        )
        smallest, parts = parameter(arguments, LINEAR.smallest), parameter(arguments, LINEAR.parts)
        run, weight_run, out_run = (
            parameter(arguments, LINEAR.run),
            parameter(arguments, LINEAR.weight_run),
            parameter(arguments, LINEAR.out_run),
        )
        groups = (parameter(arguments, LINEAR.in_features) + GROUP_INPUTS - 1) // GROUP_INPUTS
        start, stop = take_range(arguments, 1, num_blocks, smallest, parts)
        while start < stop:
            for first in range(0, groups, piece):
                count, add_to = least(piece, groups - first), 1 if first else accumulate
                row = 0
                while row < rows:
                    size = panel_of(row, rows, tile)[1]
                    panel = records + (row * groups + size * first) * RECORD_BYTES
                    for block in range(start, stop):
                        unit, inside = block // run, block % run
                        w = weight + unit * weight_run + inside * block_bytes + first // together * superblock_bytes
                        column = unit * out_run + 64 * inside
                        to, offset = out + row * out_stride + column, bias + column if bias and first == 0 else 0
                        if size == 8:
                            multiply_8(w, panel, count, offset, to, out_stride, add_to)
                        elif size == 4:
                            multiply_4(w, panel, count, offset, to, out_stride, add_to)
                        elif size == 2:
                            multiply_2(w, panel, count, offset, to, out_stride, add_to)
                        else:
                            multiply_1(w, panel, count, offset, to, out_stride, add_to)
                    row += size
            start, stop = take_range(arguments, 1, num_blocks, smallest, parts)

    return kernel
