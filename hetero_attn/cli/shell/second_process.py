"""One call of a function beside this process, in a second one that is a fork of it: both have their own Python's lock.

A fork has no threads but the one that forked, and the solver of the planner leaves work to threads that it starts with
its first program. So a process is forked only while the solver is not yet imported, else, and where a system has no
forks that may go on, the function is called in this process.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.process import BaseProcess

SOLVER = "scipy.optimize"


class SecondProcess:
    """A function that is called once: meanwhile, or in this process when its result is asked for.

    modules: those that it needs beside the solver; they are imported before the fork, so that both have them.
    """

    def __init__(self, function: Callable[..., Any], modules: Sequence[str] = ()) -> None:
        self._function, self._modules = function, modules
        self._arguments: tuple[Any, ...] = ()
        self._process: BaseProcess | None = None

    def __enter__(self) -> SecondProcess:
        return self

    def __exit__(self, *error: object) -> None:
        """End the second process, where nobody asked for its result."""
        self._end()

    def fork(self) -> None:
        """Start the process, once; it waits until it is called."""
        if self._process is not None or SOLVER in sys.modules or not _may_run_beside():
            return
        import multiprocessing

        for name in (SOLVER, *self._modules):
            import_module(name)
        context = multiprocessing.get_context("fork")
        self._connection, there = context.Pipe()
        self._process = context.Process(target=_answer, args=(self._function, there, self._connection), daemon=True)
        self._process.start()
        there.close()

    def call(self, *arguments: Any) -> None:
        """Have the function called with these arguments."""
        self._arguments = arguments
        if self._process is not None:
            try:
                self._connection.send(arguments)
            except OSError:
                self._end()

    def result(self) -> Any:
        """What the function gives; found here where the second process has failed, which raises what it raises."""
        if self._process is not None:
            with suppress(EOFError, OSError):
                return self._connection.recv()
        return self._function(*self._arguments)

    def _end(self) -> None:
        if self._process is not None:
            self._connection.close()
            self._process.kill()
            self._process.join()
            self._process = None


def _may_run_beside() -> bool:
    """Whether this process may be forked, and has a second CPU."""
    return sys.platform == "linux" and len(os.sched_getaffinity(0)) > 1


def _answer(function: Callable[..., Any], here: Connection, there: Connection) -> None:
    """The second process: one call. What fails here is told by the connection's end, and found again over there."""
    there.close()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    with suppress(Exception), here:
        here.send(function(*here.recv()))
