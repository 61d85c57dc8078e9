"""Keep what compiled code prints out of a program's own output.

HiGHS now and then writes a line to file descriptor 1 whatever its options say, in the middle of what may be JSON for
another program. While it runs, descriptor 1 is the standard error: nothing is lost and nothing is mixed.
"""

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

STDOUT, STDERR = 1, 2
# Descriptors belong to the process: two threads that both turned one aside would restore it wrongly.
_ONE_AT_A_TIME = threading.Lock()


@contextmanager
def native_output_to_stderr() -> Iterator[None]:
    """Send what is written to descriptor 1 meanwhile to descriptor 2; always restores it.

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
            _redirect(STDERR)
            yield
        finally:
            _flush_c_buffers()
            os.dup2(kept, STDOUT)
            os.close(kept)


def _redirect(to: int) -> None:
    try:
        os.dup2(to, STDOUT)
    except OSError:
        # Without a standard error the line is better lost than in the output.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, STDOUT)
        os.close(nowhere)


def _flush_c_buffers() -> None:
    """What C still holds belongs where descriptor 1 points now, not where it will."""
    if os.name == "posix":
        ctypes.CDLL(None).fflush(None)
