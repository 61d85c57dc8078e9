"""Where things of a call are: a thread's working memory, a block of weights, its outputs and bias, a panel's record."""

from cpu_kernels.formats import GROUP_INPUTS, LINE_BYTES
from cpu_kernels.linear.sizes import SPREAD_BYTES
from cpu_kernels.team.arguments import LINEAR
from cpu_kernels.team.chunks import parameter
from cpu_kernels.vectors.compiler import helper


@helper
def spread_area(arguments, thread):
    """A thread's working memory for what is made of codes, SPREAD_BYTES; 0 where the call has too few rows."""
    offset = parameter(arguments, LINEAR.spread)
    return parameter(arguments, LINEAR.scratch) + offset + SPREAD_BYTES * thread if offset else 0


@helper
def block_of(arguments, weight, block):
    """Address of a block of a weight."""
    unit, inside = block // parameter(arguments, LINEAR.run), block % parameter(arguments, LINEAR.run)
    return weight + unit * parameter(arguments, LINEAR.weight_run) + inside * parameter(arguments, LINEAR.block_bytes)


@helper
def outputs_of(arguments, block, row, first):
    """(address of a row's outputs of a block, that of its bias or 0), for the groups of inputs from `first` on."""
    unit, inside = block // parameter(arguments, LINEAR.run), block % parameter(arguments, LINEAR.run)
    column = unit * parameter(arguments, LINEAR.out_run) + LINE_BYTES * inside
    bias = parameter(arguments, LINEAR.bias)
    out = parameter(arguments, LINEAR.out) + row * parameter(arguments, LINEAR.out_row) + column
    return out, bias + column if bias and first == 0 else 0


@helper
def groups_of(arguments):
    """How many groups of 64 inputs there are."""
    return (parameter(arguments, LINEAR.in_features) + GROUP_INPUTS - 1) // GROUP_INPUTS


@helper
def record_of(arguments, records, row_bytes, row, size, group):
    """Address of the record of a group of inputs, of a panel of `size` rows from `row` on, of `row_bytes` each."""
    return records + (row * groups_of(arguments) + size * group) * row_bytes
