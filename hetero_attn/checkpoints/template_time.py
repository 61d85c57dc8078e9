"""A bound on how long a chat template may run: it is a program from a stranger's file, and may loop for ever."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from hetero_attn.errors import PromptError

MOST_SECONDS = 10.0  # of this thread's CPU time; conversations of megabytes take less than one
TEMPLATE = "<template>"  # the file name of what jinja compiles


@contextmanager
def bounded_template() -> Iterator[None]:
    """Raise PromptError inside a template's own code once that has run for MOST_SECONDS.

    Python calls a hook at every line of such code, and at no other. Under a debugger, which has that hook, there is no
    bound.
    """
    if sys.gettrace() is not None:
        yield
        return
    limit = time.thread_time() + MOST_SECONDS

    def at_line(frame: FrameType, event: str, argument: Any) -> Any:
        if time.thread_time() > limit:
            raise PromptError(
                f"the chat template has run for {MOST_SECONDS:g} s and has not ended; the file is damaged or hostile, "
                "give the model's own chat_template.jinja"
            )
        return at_line

    def at_call(frame: FrameType, event: str, argument: Any) -> Any:
        return at_line if frame.f_code.co_filename == TEMPLATE else None

    sys.settrace(at_call)
    try:
        yield
    finally:
        sys.settrace(None)
