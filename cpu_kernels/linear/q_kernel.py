"""linear for coded weights: y[r,f] = sum_g xs[r,g] (scale[f,g] sum_i q[f,i] xq[r,i] + min[f,g] sum_i xq[r,i]).

Stage 0 quantises the input per row and group of 64 to int8 and lays it out in panels of up to `row_tile` rows, one
record per group (records.py). Stage 1 hands out ranges of
blocks; for each, every panel of rows passes over the block's superblocks. Dot products are exact int32 inside a group;
the 16 features of a block are the 16 lanes, so nothing is ever summed across lanes.
"""

from functools import reduce

from numba import types

from cpu_kernels.formats import GROUP_INPUTS, LINE_BYTES, WeightFormat, format_of
from cpu_kernels.formats.weights import SUPERBLOCK_LINES
from cpu_kernels.linear.forms.line_order import header_leader
from cpu_kernels.linear.forms.step import form_step
from cpu_kernels.linear.forms.subnormal_codes import keeping_subnormals
from cpu_kernels.linear.panels.over_range import panels_over_range
from cpu_kernels.linear.panels.places import spread_area
from cpu_kernels.linear.records import panel_of, row_quantiser
from cpu_kernels.linear.sizes import FILLED_ROWS, FLIPPED_PLANES, SEGMENT_GROUPS, SPREAD_PLANES, record_bytes
from cpu_kernels.team.arguments import LINEAR
from cpu_kernels.team.chunks import await_stage, finish, parameter, take, take_range
from cpu_kernels.vectors.code_sums import CodeSums
from cpu_kernels.vectors.compiler import helper
from cpu_kernels.vectors.isa import Isa
from cpu_kernels.vectors.scalar import least, touch
from cpu_kernels.vectors.tiles import finish_features, zeros
from cpu_kernels.vectors.vector import (
    F32,
    I32,
    VF32,
    VHALF,
    VI32,
    F32x16,
    constant,
    emits,
    fma_value,
    intp,
    load_as,
    prefetch_value,
    splat_value,
)

ROW_AHEAD_BYTES = 1536  # ahead of the weight stream, of one row on AVX2
BYTES_AHEAD_BYTES = 3072  # the same, of whole bytes with 512-bit dot products
AHEAD_BYTES = 2048  # ahead of the weight stream, of a few rows
FAR_AHEAD_BYTES = 6144  # where the dot products are: 8 rows of q8 gain a half, 4 of q4 as much, fewer rows lose a third
FAR_ROWS = {"q8": 8}  # from so many rows on they are; 4 for the others


def ahead_bytes(isa: Isa, item: WeightFormat, rows: int) -> int:
    """How far ahead of the weight stream is asked for, 0 for nothing.

    One row is as fast as its lines come, and what is asked for 2 KB ahead holds the first level's few miss buffers
    longer than the CPU's own streams do: on Zen 4 without them a thread reads q5_k at 24 instead of 15 GB/s. Where an
    older CPU `asks_ahead`, 1.5 KB are best; whole bytes, whose lines follow each other, are as fast without. A Zen 4
    with AVX-512 reads those in 0.96 to 0.98 of the time when it asks 3 KB ahead. Codes that were spread are in the
    cache.
    """
    if item.plane in (*SPREAD_PLANES.values(), *FLIPPED_PLANES.values()):
        return 0
    if rows == 1 and isa.name == "avx512" and item.plane == "i8":
        return BYTES_AHEAD_BYTES
    if rows == 1:
        return ROW_AHEAD_BYTES if isa.asks_ahead and item.plane != "i8" else 0
    return FAR_AHEAD_BYTES if rows >= FAR_ROWS.get(item.name, 4) else AHEAD_BYTES


def inputs_of(b, record, row, offset):
    """Four codes of a row in every lane."""
    return splat_value(b, load_as(b, record, I32, GROUP_INPUTS * row + offset))


def factor_of(b, record, rows, row, field, scalar=F32):
    """A number of a row that stands behind its codes, in every lane."""
    return splat_value(b, load_as(b, record, scalar, rows * (GROUP_INPUTS + 4 * field) + 4 * row))


def halves_of(b, weight, offset):
    """Sixteen float16 of a header as float32."""
    return b.fpext(load_as(b, weight, VHALF, offset), VF32)


def ask_ahead(b, isa: Isa, weight_dtype: str, rows: int, weight):
    """Prefetch the lines of a superblock that comes later."""
    distance = ahead_bytes(isa, format_of(weight_dtype), rows)
    for line in range(SUPERBLOCK_LINES[weight_dtype] if distance else 0):
        prefetch_value(b, weight, distance + LINE_BYTES * line)


def superblock_q4(isa: Isa, rows: int):
    """Intrinsic (sums, weight address, record address) -> sums: one superblock of q4 times one record."""
    tile, codes = types.UniTuple(F32x16, rows), CodeSums(isa, format_of("q4").largest_code)

    @emits(tile, tile, intp, intp)
    def step(b, sums, weight, record):
        chains = 2 if rows <= 2 else 1
        dots = [[codes.sum(b, constant(VI32, 0)) for _ in range(chains)] for _ in range(rows)]
        ask_ahead(b, isa, "q4", rows, weight)
        for line in range(8):
            packed = load_as(b, weight, VI32, LINE_BYTES * (1 + line))
            low = codes.operand(b, b.and_(packed, constant(VI32, 0x0F0F0F0F)))
            high = codes.operand(b, b.and_(b.lshr(packed, constant(VI32, 4)), constant(VI32, 0x0F0F0F0F)))
            words = [(0, low, 8 * line), (-1, high, 8 * line + 4)]
            for turn in [words[:1], words[1:]] if codes.takes_scales and rows > 1 else [words]:
                for row in range(rows):
                    for chain, word, offset in turn:
                        dots[row][chain].add(word, inputs_of(b, record, row, offset))
                if rows > 1:
                    codes.settle(b, [chains[turn[0][0]] for chains in dots])
        scale, minimum = halves_of(b, weight, 0), halves_of(b, weight, 32)
        for row in range(rows):
            total = reduce(b.add, (chain.total() for chain in dots[row]))
            scaled = b.fmul(b.sitofp(total, VF32), scale)
            acc = fma_value(b, scaled, factor_of(b, record, rows, row, 0), b.extract_value(sums, row))
            sums = b.insert_value(sums, fma_value(b, minimum, factor_of(b, record, rows, row, 1), acc), row)
        return sums

    return step


def superblock_q8(isa: Isa, rows: int):
    """Intrinsic (sums, weight address, record address) -> sums: one superblock of q8 times one record."""
    tile, codes = types.UniTuple(F32x16, rows), CodeSums(isa, format_of("q8").largest_code)

    @emits(tile, tile, intp, intp)
    def step(b, sums, weight, record):
        def start(row, half):
            return constant(VI32, 0) if codes.takes_128 else factor_of(b, record, rows, row, 1 + half, I32)

        ask_ahead(b, isa, "q8", rows, weight)
        dots = [[codes.sum(b, start(row, half)) for half in range(2)] for row in range(rows)]
        for index in range(16):
            packed = codes.operand(b, load_as(b, weight, VI32, LINE_BYTES * (1 + index)))
            for row in range(rows):
                dots[row][index // 8].add(packed, inputs_of(b, record, row, 4 * index))
            if rows > 1:
                codes.settle(b, [both[index // 8] for both in dots])
        scales = [halves_of(b, weight, 32 * half) for half in range(2)]
        for row in range(rows):
            scaled = b.fmul(b.sitofp(dots[row][0].total(), VF32), scales[0])
            scaled = fma_value(b, b.sitofp(dots[row][1].total(), VF32), scales[1], scaled)
            acc = fma_value(b, scaled, factor_of(b, record, rows, row, 0), b.extract_value(sums, row))
            sums = b.insert_value(sums, acc, row)
        return sums

    return step


SUPERBLOCKS = {("q4", "u4"): superblock_q4, ("q8", "i8"): superblock_q8}  # by name and plane


def block_times_panel(isa: Isa, item: WeightFormat, rows: int):
    """Function: 16 output features of `rows` rows, over `groups` of 64 inputs from the start of a superblock on."""
    start, store = zeros(rows), finish_features(rows)
    over_groups = groups_times_panel(isa, item, rows)

    @helper
    def multiply(weight, record, groups, bias, out, out_stride, accumulate, kept):
        store(over_groups(start(), weight, record, groups), bias, out, out_stride, accumulate, kept)

    return multiply


def groups_times_panel(isa: Isa, item: WeightFormat, rows: int):
    """Function (sums, weight, record, groups) -> sums, each group added to those of the groups before it.

    Lines of the last superblock's padding are read and dropped: where a stream skips eight lines in 25 KB, a Zen 4
    finds its way back so late that one row of MXFP4 with 2880 inputs takes half as long again.
    """
    panel_bytes = rows * record_bytes(item)
    superblock_bytes, header_bytes = item.superblock_bytes, item.header_lines * LINE_BYTES
    together, group_bytes = item.group_inputs // GROUP_INPUTS, item.code_lines * LINE_BYTES
    if (item.name, item.plane) in SUPERBLOCKS:
        step = SUPERBLOCKS[item.name, item.plane](isa, rows)

        @helper
        def add_groups(sums, weight, record, groups):
            for group in range(groups):
                sums = step(sums, weight + superblock_bytes * group, record + panel_bytes * group)
            return sums

        return add_groups
    ahead = ahead_bytes(isa, item, rows)
    step_of_form, lead_header = form_step(isa, item, rows, ahead), header_leader(isa, item, rows, ahead)

    @helper
    def add_groups_of_form(sums, weight, record, groups):
        at, group = weight, 0
        while group < groups:
            lines = at + header_bytes
            lead_header(at)
            for inside in range(least(together, groups - group)):
                sums = step_of_form(sums, at, inside, lines + group_bytes * inside, record)
                record += panel_bytes
            at += superblock_bytes
            group += together
        for line in range(at - group_bytes * (group - groups), at, LINE_BYTES):
            touch(line)
        return sums

    return add_groups_of_form


def linear_q(isa: Isa, weight_dtype: str, tile: int):
    """Kernel for any number of rows in panels of `tile` (8, 4 or 1) rows."""
    item = format_of(weight_dtype)
    quantize_row, row_bytes = row_quantiser(isa, item), record_bytes(item)
    most_filled = FILLED_ROWS.get(weight_dtype, 1)
    multiply = panels_over_range(isa, weight_dtype, tile, block_times_panel, most_filled)

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
        first, size = panel_of(rows - 1, rows, tile, most_filled)
        filled = first + size
        chunk = take(arguments, 0)
        while chunk < filled * segments:
            row, segment = chunk // segments, chunk % segments
            first, size = panel_of(least(row, rows - 1), rows, tile, most_filled)
            last, source = least(groups, (segment + 1) * SEGMENT_GROUPS), x + least(row, rows - 1) * x_stride
            panel = records + first * groups * row_bytes
            quantize_row(source, in_features, segment * SEGMENT_GROUPS, last, panel, row - first, size)
            finish(arguments, 0)
            chunk = take(arguments, 0)
        await_stage(arguments, 0, filled * segments)

    def kernel(arguments, thread):
        quantize(arguments)
        area = spread_area(arguments, thread)
        records, weight = parameter(arguments, LINEAR.scratch), parameter(arguments, LINEAR.weight)
        rows, num_blocks = parameter(arguments, LINEAR.rows), parameter(arguments, LINEAR.num_blocks)
        smallest, parts = parameter(arguments, LINEAR.smallest), parameter(arguments, LINEAR.parts)
        start, stop = take_range(arguments, 1, num_blocks, smallest, parts)
        while start < stop:
            multiply(arguments, records, weight, 0, rows, start, stop, area)
            start, stop = take_range(arguments, 1, num_blocks, smallest, parts)

    return keeping_subnormals(isa, item, kernel)
