"""One thread for jobs: those of the CPU lane, or steps.

Why not `concurrent.futures.ThreadPoolExecutor`: the interpreter stops every such pool before it waits for the other
threads of a program, so a thread that still generates when the main one has returned would be refused. This thread is a
daemon, and whoever owns the lanes stops it.
"""

import os
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from queue import SimpleQueue
from typing import Any


class HostWorker(Executor):
    """Runs jobs one after another on a thread of this name, started with the first of them."""

    def __init__(self, name: str = "hetero-attn-host") -> None:
        self._name = name
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._is_shut = False
        self._pid = os.getpid()

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **keywords: Any) -> Future:
        """Queue a call; RuntimeError after `shutdown`."""
        future: Future = Future()
        self.put(lambda: _fulfil(future, lambda: function(*arguments, **keywords)))
        return future

    def put(self, job: Callable[[], None]) -> None:
        """As `submit`, of a job that raises nothing and says itself when it has ended: a future costs a tenth of a
        hand-over."""
        if self._is_shut:
            raise RuntimeError("this worker is shut down; make a new one")
        self._jobs.put(job)
        if self._thread is None:
            self._thread = threading.Thread(target=_work, args=(self._jobs,), name=self._name, daemon=True)
            self._thread.start()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more jobs, finish those that there are, and end the thread; idempotent, nothing in a forked child."""
        self._is_shut = True
        if self._thread is None or os.getpid() != self._pid:
            return
        self._jobs.put(None)
        if wait and threading.current_thread() is not self._thread:
            self._thread.join()


def _work(jobs: "SimpleQueue[Callable[[], None] | None]") -> None:
    while (job := jobs.get()) is not None:
        job()
        del job  # it would keep the tensors of the last job alive while this waits


def _fulfil(future: Future, call: Callable[[], Any]) -> None:
    try:
        future.set_result(call())
    except BaseException as failure:
        future.set_exception(failure)
