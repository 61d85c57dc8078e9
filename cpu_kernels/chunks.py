"""How kernels share work: chunks handed out by an atomic counter, stage after stage.

A stage is finished when all its chunks are, whoever did them, so a member that arrives late, or that the system has put
aside, delays nobody unless it holds a chunk.
"""

from numba import njit

from .team_layout import DONE, FAILURE, NEXT, PARAMETERS, STAGE_BYTES
from .vector import fetch_add, load_acquire, load_f64, load_i64, pause, store_i64, yield_core


@njit
def take(arguments, stage):
    """The next chunk of this stage; at or past the stage's count there is none left."""
    return fetch_add(arguments + STAGE_BYTES * stage + NEXT, 1)


@njit
def finish(arguments, stage):
    """Report one taken chunk of this stage as done; its writes are visible to whoever awaits the stage."""
    fetch_add(arguments + STAGE_BYTES * stage + DONE, 1)


@njit
def await_stage(arguments, stage, count):
    """Wait until `count` chunks of this stage are done."""
    spins = 0
    while load_acquire(arguments + STAGE_BYTES * stage + DONE) < count:
        pause()
        spins += 1
        if spins > 2000:
            yield_core()


@njit
def parameter(arguments, index):
    """Integer parameter `index` of the call."""
    return load_i64(arguments + PARAMETERS + 8 * index)


@njit
def real_parameter(arguments, index):
    """Float parameter `index` of the call."""
    return load_f64(arguments + PARAMETERS + 8 * index)


@njit
def fail(arguments, code):
    """Make the call return this code: an argument's content is wrong, and the wrapper says which."""
    store_i64(code, arguments + FAILURE)
