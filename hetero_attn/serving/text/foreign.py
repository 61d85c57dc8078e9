"""Failures of tokenizers, which are other people's code over files of strangers, as errors of ours."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hetero_attn.errors import HeteroError

PANIC = "PanicException"  # of code in Rust; nothing that can be imported has the type, which is not an Exception


@contextmanager
def failures_told(make: Callable[[str], HeteroError]) -> Iterator[None]:
    """Raise what `make` makes of the first words of whatever is raised inside, but for what ends a program.

    A panic, which Python takes for such an end, is a failure like another.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != PANIC:
            raise
        raise make(first_line(error)) from error


def first_line(error: BaseException) -> str:
    """The type and the first words of an error that somebody else's code raised."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
