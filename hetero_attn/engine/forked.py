"""What a forked child has to know: torch's pool of threads stayed in the parent, and who waits for it waits for
ever."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_IMPORTED_BY = os.getpid()


@contextmanager
def torch_without_lost_threads() -> Iterator[None]:
    """In a child of the process that imported this: let torch compute on the calling thread. Else nothing."""
    threads = torch.get_num_threads()
    if os.getpid() != _IMPORTED_BY:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
