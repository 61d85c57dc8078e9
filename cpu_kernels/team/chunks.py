"""How kernels read their parameters and share work: chunks handed out by an atomic counter, stage after stage.

A stage is finished when all its chunks are, whoever did them, so a member that arrives late, or that the system has put
aside, delays nobody unless it holds a chunk. Intrinsics and not functions, because numba would compile a function once
for every constant it is called with.
"""

from llvmlite import ir
from numba import types

from cpu_kernels.team.words import DONE, FAILURE, NEXT, PARAMETERS, STAGE_BYTES
from cpu_kernels.vectors.compiler import helper
from cpu_kernels.vectors.scalar import least, load_acquire, pause, yield_core
from cpu_kernels.vectors.vector import F64, I64, emits, intp, pointer


def _field(builder, arguments, index, stride, offset):
    """Address of arguments[offset + stride * index]."""
    return builder.add(arguments, builder.add(builder.mul(index, ir.Constant(I64, stride)), ir.Constant(I64, offset)))


@emits(types.int64, intp, intp)
def take(b, arguments, stage):
    """The next chunk of this stage; at or past the stage's count there is none left."""
    counter = pointer(b, _field(b, arguments, stage, STAGE_BYTES, NEXT), I64)
    return b.atomic_rmw("add", counter, ir.Constant(I64, 1), "seq_cst")


@emits(types.void, intp, intp)
def finish(b, arguments, stage):
    """Report one taken chunk of this stage as done; its writes are visible to whoever awaits the stage."""
    counter = pointer(b, _field(b, arguments, stage, STAGE_BYTES, DONE), I64)
    b.atomic_rmw("add", counter, ir.Constant(I64, 1), "seq_cst")


@emits(types.int64, intp, intp)
def parameter(b, arguments, index):
    """The word at a place of the call's block (arguments.py), an integer."""
    return b.load(pointer(b, _field(b, arguments, index, 8, PARAMETERS), I64), align=8)


@emits(types.float64, intp, intp)
def real_parameter(b, arguments, index):
    """The word at a place of the call's block, a float."""
    return b.load(pointer(b, _field(b, arguments, index, 8, PARAMETERS), F64), align=8)


@emits(types.void, intp, types.int64)
def fail(b, arguments, code):
    """Make the call return this code: an argument's content is wrong, and the wrapper says which."""
    b.store(code, pointer(b, arguments, I64, FAILURE), align=8)


@helper
def await_stage(arguments, stage, count):
    """Wait until `count` chunks of this stage are done."""
    spins = 0
    while load_acquire(arguments + STAGE_BYTES * stage + DONE) < count:
        pause()
        spins += 1
        if spins > 2000:
            yield_core()


@helper
def take_range(arguments, stage, count, smallest, parts):
    """The next range [first, last) of `count` items; empty when none is left.

    Each range is 1 / parts of what the ranges before it left, at least `smallest` (guided self-scheduling,
    Polychronopoulos and Kuck 1987): long streams at first, short ones to end together.
    """
    index, first = take(arguments, stage), 0
    while index > 0 and (count - first) // parts > smallest:
        first += (count - first) // parts
        index -= 1
    first = least(count, first + index * smallest)
    size = (count - first) // parts
    return first, least(count, first + (size if size > smallest else smallest))
