"""The import of torch without what nobody reads of it: each of its operators notes the file and line that declares it,
and `inspect` looks through every module that there is for the text of that line too, a tenth of a second in all.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType


@contextmanager
def without_source_text() -> Iterator[None]:
    """Inside, `inspect.getframeinfo` tells file, line and function of a frame, and no text of the line."""
    whole = inspect.getframeinfo

    def places_alone(frame: FrameType | TracebackType, context: int = 0) -> inspect.Traceback:
        return whole(frame, 0)

    inspect.getframeinfo = places_alone
    try:
        yield
    finally:
        inspect.getframeinfo = whole
