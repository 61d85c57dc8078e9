"""Keep what compiled code prints out of a program's own output.

HiGHS now and then writes a line of its own insides to file descriptor 1 whatever its options say (1.12:
"HighsMipSolverData::transformNewIntegerFeasibleSolution"), in the middle of what may be JSON for another program. What
it found is in its result, so while it runs descriptor 1 leads nowhere.
"""

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

STDOUT = 1
# Descriptors belong to the process: two threads that both turned one aside would restore it wrongly.
_ONE_AT_A_TIME = threading.Lock()


@contextmanager
def without_native_output() -> Iterator[None]:
    """Drop what is written to descriptor 1 meanwhile; always restores it.

    Does nothing where descriptor 1 is closed. Python's own buffered output is written when it is flushed, so before or
    after.
    """
    with _ONE_AT_A_TIME:
        try:
            kept = os.dup(STDOUT)
        except OSError:
            yield
            return
        try:
            _flush_c_buffers()
            _drop()
            yield
        finally:
            _flush_c_buffers()
            os.dup2(kept, STDOUT)
            os.close(kept)


def _drop() -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, STDOUT)
    os.close(nowhere)


def _flush_c_buffers() -> None:
    """What C still holds belongs where descriptor 1 points now, not where it will."""
    if os.name == "posix":
        ctypes.CDLL(None).fflush(None)
