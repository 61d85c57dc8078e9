"""One call of a function beside this process, in a second one that is a fork of it: both have their own Python's lock.

A fork has no threads but the one that forked, and the solver of the planner leaves work to threads that it starts with
its first program. So a process is forked only while the solver is not yet imported, else, and where a system has no
forks that may go on, the function is called in this process.
"""

import os
import pickle
import signal
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NoReturn

SOLVER = "scipy.optimize"


class SecondProcess:
    """A function that is called once: meanwhile, or in this process when its result is asked for.

    modules: those that it needs beside the solver; they are imported before the fork, so that both have them.
    """

    def __init__(self, function: Callable[..., Any], modules: Sequence[str] = ()) -> None:
        self._function, self._modules = function, modules
        self._arguments: tuple[Any, ...] = ()
        self._process: int | None = None

    def __enter__(self) -> "SecondProcess":
        return self

    def __exit__(self, *error: object) -> None:
        """End the second process, where nobody asked for its result."""
        if self._process is not None:
            os.kill(self._process, signal.SIGKILL)
            self._left()

    def fork(self) -> None:
        """Start the process, once; it waits until it is called."""
        if self._process is not None or SOLVER in sys.modules or not _may_run_beside():
            return
        for name in (SOLVER, *self._modules):
            import_module(name)
        asked, self._asks = os.pipe()
        self._answers, answers = os.pipe()
        self._process = os.fork()
        if not self._process:
            os.close(self._asks)
            os.close(self._answers)
            _answer(self._function, asked, answers)
        os.close(asked)
        os.close(answers)

    def call(self, *arguments: Any) -> None:
        """Have the function called with these arguments, which are pickled."""
        self._arguments = arguments
        if self._process is None:
            return
        try:
            with os.fdopen(os.dup(self._asks), "wb") as asks:
                pickle.dump(arguments, asks)
        except OSError:
            self._left()

    def result(self) -> Any:
        """What the function gives; found here where the second process has failed, which raises what it raises."""
        if self._process is None:
            return self._function(*self._arguments)
        try:
            with os.fdopen(os.dup(self._answers), "rb") as answers:
                found = pickle.load(answers)
        except (EOFError, pickle.UnpicklingError):
            self._left()
            return self._function(*self._arguments)
        self._left()
        return found

    def _left(self) -> None:
        """Close what leads to the second process, which ends then, and wait for that."""
        assert self._process is not None
        os.close(self._asks)
        os.close(self._answers)
        os.waitpid(self._process, 0)
        self._process = None


def _may_run_beside() -> bool:
    """Whether this system has forks that may go on, and this process a second CPU to run on."""
    return sys.platform == "linux" and len(os.sched_getaffinity(0)) > 1


def _answer(function: Callable[..., Any], asked: int, answers: int) -> NoReturn:
    """The second process: one call, then its end, without what this process does at its own."""
    try:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        with os.fdopen(asked, "rb") as source, os.fdopen(answers, "wb") as target:
            pickle.dump(function(*pickle.load(source)), target)
    finally:
        os._exit(0)
