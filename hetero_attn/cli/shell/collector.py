"""Python's garbage collector at a start and at the end: what it would look through is not garbage."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_at_rest() -> Iterator[None]:
    """No collection while modules are imported and a model is loaded: what is made then stays until the end.

    It took a tenth of torch's import. Afterwards collections leave alone what is there.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def leave_garbage() -> None:
    """Let the interpreter end without a last look through everything, which takes a third of a second after torch."""
    gc.freeze()
