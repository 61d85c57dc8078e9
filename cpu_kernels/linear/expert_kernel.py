"""expert_linear: the picks of every expert, sorted by expert, times that expert's packed weight.

Stage 0 rounds the picks' inputs, each into its place in the sorted order, for coded formats in panels of the rows of
one expert (records.py). Stage 1 hands out ranges of blocks over the experts that have picks, expert after expert, and
no other weight is read: few picks are one stream over scattered runs, many are panels of rows that pass over a range
kept in cache. Threads own blocks of outputs and nothing is summed between them, so an expert that has most of the rows
is shared like any other.

Which experts and how many rows are memory contents: a recorded call follows whatever the router has written.
"""

from cpu_kernels.formats import GROUP_INPUTS, WeightFormat, format_of
from cpu_kernels.linear.dot_blocks import line_of
from cpu_kernels.linear.dot_kernel import keep_rounded, keep_widened, no_rows, padded_row_bytes, rows_over_range
from cpu_kernels.linear.forms.subnormal_codes import keeping_subnormals
from cpu_kernels.linear.panels.over_range import panels_over_range
from cpu_kernels.linear.panels.places import spread_area
from cpu_kernels.linear.panels.turned import turned_rows
from cpu_kernels.linear.q_kernel import groups_times_panel
from cpu_kernels.linear.records import panel_of, row_quantiser
from cpu_kernels.linear.sizes import SEGMENT_GROUPS, record_bytes, spread_rows, turns_rows
from cpu_kernels.small.picks import busy_expert, busy_experts, expert_of
from cpu_kernels.team.arguments import EXPERT_LINEAR
from cpu_kernels.team.chunks import await_stage, finish, parameter, take, take_range
from cpu_kernels.vectors.compiler import helper
from cpu_kernels.vectors.isa import Isa
from cpu_kernels.vectors.scalar import least, load_i32, most
from cpu_kernels.vectors.tiles import finish_features, sums_so_far
from cpu_kernels.vectors.vector import load_f32_tail, store_f32_tail

LEAST_PIECES = 32  # of a thread's share, where an expert has more rows than a panel


@helper
def source_row(arguments, place):
    """Address of the input of the pick at a place."""
    x, stride, sources = (
        parameter(arguments, EXPERT_LINEAR.x),
        parameter(arguments, EXPERT_LINEAR.x_row),
        parameter(arguments, EXPERT_LINEAR.sources),
    )
    return x + (load_i32(sources + 4 * place) if sources else place) * stride


@helper
def fair_range(blocks, work, largest, threads):
    """At most so many blocks that a range of the expert with most picks, which may be handed out last, is a small piece
    of a thread's share; work: picks times blocks of all experts."""
    return max(1, min(blocks, work // (LEAST_PIECES * threads * largest)))


@helper
def weight_of(arguments, expert):
    """Address of the weight of an expert, counted from the first one that the call has."""
    return parameter(arguments, EXPERT_LINEAR.weight) + expert * parameter(arguments, EXPERT_LINEAR.expert_bytes)


def shared_ranges(multiply):
    """Stage 1: `multiply(arguments, prepared, expert, place, picks, start, stop)` for every range of an expert's
    blocks."""

    @helper
    def over_ranges(arguments, prepared, tile):
        starts, first, count = (
            parameter(arguments, EXPERT_LINEAR.starts),
            parameter(arguments, EXPERT_LINEAR.first),
            parameter(arguments, EXPERT_LINEAR.count),
        )
        num_blocks, threads = (
            parameter(arguments, EXPERT_LINEAR.num_blocks),
            parameter(arguments, EXPERT_LINEAR.threads),
        )
        busy, largest = busy_experts(starts, first, count)
        total, picks = busy * num_blocks, load_i32(starts + 4 * (first + count)) - load_i32(starts + 4 * first)
        smallest = most(1, least(parameter(arguments, EXPERT_LINEAR.smallest), (total + threads - 1) // threads))
        if largest > tile:
            smallest = fair_range(smallest, picks * num_blocks, largest, threads)
        parts = most(1, 2 * threads if largest <= tile else total)
        before, e = 0, first  # experts with picks before e; ranges come in order
        start, stop = take_range(arguments, 1, total, smallest, parts)
        while start < stop:
            e = busy_expert(starts, e, start // num_blocks - before)
            before = start // num_blocks
            place = load_i32(starts + 4 * e)
            picks = load_i32(starts + 4 * e + 4) - place
            last = least(stop, (before + 1) * num_blocks)
            multiply(
                arguments, prepared, e - first, place, picks, start - before * num_blocks, last - before * num_blocks
            )
            start = last
            if start == stop:
                start, stop = take_range(arguments, 1, total, smallest, parts)

    return over_ranges


def further_panel(isa: Isa, item: WeightFormat, rows: int):
    """Function: 16 output features of `rows` rows over groups that follow, if `goes_on`, those that are in `out`.

    A sum is one chain over all groups, so that its bits depend on no piece of them (gpu_kernels/experts/ordered.py).
    """
    begin, store = sums_so_far(rows), finish_features(rows)
    over_groups = groups_times_panel(isa, item, rows)

    @helper
    def multiply(weight, record, groups, bias, out, out_stride, goes_on, kept):
        store(over_groups(begin(out, out_stride, goes_on), weight, record, groups), 0, out, out_stride, 0, kept)

    return multiply


def expert_linear_q(isa: Isa, weight_dtype: str, tile: int):
    """Kernel for coded weights, in panels of up to `tile` rows."""
    item = format_of(weight_dtype)
    quantize_row, row_bytes = row_quantiser(isa, item), record_bytes(item)
    over_rows = panels_over_range(isa, weight_dtype, tile, further_panel, 0, goes_on=True)
    least_rows = spread_rows(isa, item)

    @helper
    def quantize(arguments):
        records, starts = parameter(arguments, EXPERT_LINEAR.scratch), parameter(arguments, EXPERT_LINEAR.starts)
        first, count, in_features = (
            parameter(arguments, EXPERT_LINEAR.first),
            parameter(arguments, EXPERT_LINEAR.count),
            parameter(arguments, EXPERT_LINEAR.in_features),
        )
        groups = (in_features + GROUP_INPUTS - 1) // GROUP_INPUTS
        segments = (groups + SEGMENT_GROUPS - 1) // SEGMENT_GROUPS
        begin, end = load_i32(starts + 4 * first), load_i32(starts + 4 * (first + count))
        chunk = take(arguments, 0)
        while chunk < (end - begin) * segments:
            place, segment = begin + chunk // segments, chunk % segments
            e = expert_of(starts, first, count, place)
            own = load_i32(starts + 4 * e)
            row, size = panel_of(place - own, load_i32(starts + 4 * e + 4) - own, tile, 0)
            panel, source = records + (own + row) * groups * row_bytes, source_row(arguments, place)
            last = least(groups, (segment + 1) * SEGMENT_GROUPS)
            quantize_row(source, in_features, segment * SEGMENT_GROUPS, last, panel, place - own - row, size)
            finish(arguments, 0)
            chunk = take(arguments, 0)
        await_stage(arguments, 0, (end - begin) * segments)
        return records

    @helper
    def multiply(arguments, prepared, expert, place, picks, start, stop):
        records, area = prepared
        area = area if picks >= least_rows else 0
        over_rows(arguments, records, weight_of(arguments, expert), place, picks, start, stop, area)

    over_ranges = shared_ranges(multiply)

    def kernel(arguments, thread):
        over_ranges(arguments, (quantize(arguments), spread_area(arguments, thread)), tile)

    return keeping_subnormals(isa, item, kernel)


@helper
def keep_as_it_is(x, count, to):
    """The next 16 inputs, or the first `count` and zeros."""
    store_f32_tail(load_f32_tail(x, count), to, 16)


def expert_linear_dot(isa: Isa, weight_dtype: str, features: int, tile: int):
    """Kernel for row-major weights, in panels of `tile` rows, then 2, then 1."""
    shape = line_of(isa, weight_dtype, tile)
    items, _, x_bytes = shape
    is_bf16 = weight_dtype == "bf16"
    keep = (keep_widened if shape.is_widened else keep_rounded) if is_bf16 else keep_as_it_is
    over_rows = rows_over_range(isa, weight_dtype, features, tile)
    turned = turned_rows(isa) if turns_rows(isa, weight_dtype) else no_rows

    @helper
    def row_bytes_of(in_features):
        if is_bf16:
            return padded_row_bytes(in_features, x_bytes)
        return ((in_features + 15) // 16 | 1) * 64

    @helper
    def gather(arguments):
        scratch, starts = parameter(arguments, EXPERT_LINEAR.scratch), parameter(arguments, EXPERT_LINEAR.starts)
        first, count, in_features = (
            parameter(arguments, EXPERT_LINEAR.first),
            parameter(arguments, EXPERT_LINEAR.count),
            parameter(arguments, EXPERT_LINEAR.in_features),
        )
        begin, end = load_i32(starts + 4 * first), load_i32(starts + 4 * (first + count))
        chunk = take(arguments, 0)
        while chunk < end - begin:
            place = begin + chunk
            source, to = source_row(arguments, place), scratch + place * row_bytes_of(in_features)
            for i in range(0, in_features, items):
                keep(source + 4 * i, in_features - i, to + i // items * x_bytes)
            finish(arguments, 0)
            chunk = take(arguments, 0)
        await_stage(arguments, 0, end - begin)
        return scratch

    @helper
    def multiply(arguments, prepared, expert, place, picks, start, stop):
        x, area = prepared
        x_stride, weight = row_bytes_of(parameter(arguments, EXPERT_LINEAR.in_features)), weight_of(arguments, expert)
        done = turned(arguments, x, x_stride, weight, place, picks, start, stop, area)
        over_rows(arguments, x, x_stride, weight, place + done, picks - done, start, stop)

    over_ranges = shared_ranges(multiply)

    def kernel(arguments, thread):
        over_ranges(arguments, (gather(arguments), spread_area(arguments, thread)), tile)

    return kernel
