"""Who may use the engine when: one step at a time, whoever asks, and wishes that anybody may leave at any moment.

Python may run a finaliser between any two bytecodes, also in the middle of a step and in the thread that takes it. So
`add`, `abort` and `close` leave a note, which needs no lock. Notes are taken up before and after every step, and at
once where nobody is in one. The lock lets its own thread in again; `_is_inside` then tells a call from inside a step,
which gets a BusyError where it would have to wait for that step.

Signal handlers run in the main thread, and what they raise comes between any two bytecodes of it. So the main thread
takes no step itself: a thread of its own does, and the main one waits, as long as no handler raises something.
"""

import atexit
import os
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

from hetero_attn.engine.engine import Engine
from hetero_attn.errors import BusyError, EngineDeadError
from hetero_attn.lanes.host_worker import HostWorker
from hetero_attn.serving.request import Request, RequestOutput
from hetero_attn.serving.scheduling.scheduler import Scheduler

CLOSE_WAIT_S = 30.0  # for a step; one that lasts longer closes when it ends
SLICE_S = 0.02  # of steps one after the other, for a caller who has nothing to look at in between
SETTLE_WAIT_S = 1.0  # for notes to be taken up, where nobody is in a step
Result = TypeVar("Result")


class Turns:
    """Turns at one engine, and its end. Nothing here waits for a step, except `alone` and, for a while, `close`."""

    def __init__(self, engine: Engine, scheduler: Scheduler) -> None:
        self._engine = engine
        self._scheduler = scheduler
        self._lock = threading.RLock()
        self._is_inside = False
        self._queue: deque[int] = deque()  # threads that wait for their turn
        self._arrivals: deque[Request] = deque()
        self._departures: deque[Request] = deque()
        self._beside: Counter[int] = Counter()  # threads in calls beside the steps, by their number
        self._has_ended = False
        self._is_closing = self._is_closed = False
        self._pid = os.getpid()
        self._stepper = HostWorker("hetero-attn-steps")
        self._stepper.submit(int)  # starts the thread
        weakref.finalize(self, self._stepper.shutdown).atexit = False
        atexit.register(self._end_with_process)

    @property
    def waiting(self) -> int:
        """Requests that wait for a place."""
        return len(self._arrivals) + self._scheduler.waiting

    def check(self) -> None:
        """Raise EngineDeadError where no step can be taken any more: after close, in a forked child, after a fault."""
        self._check_process()
        self.wait_for_the_end()
        if self._is_closed or self._is_closing:
            raise EngineDeadError(self._closed_message)
        self._engine.check_alive()

    def wait_for_the_end(self) -> None:
        """Where the interpreter ends, never to return, for any thread but the one that ends it."""
        if self._has_ended and threading.current_thread() is not threading.main_thread():
            self._beside.pop(threading.get_ident(), None)
            threading.Event().wait()

    def output_of(self, request: Request) -> RequestOutput:
        """As `Request.output`; what ends with the interpreter is an error to nobody, whose thread would print it."""
        if request.error is not None:
            self.wait_for_the_end()
        return request.output()

    @contextmanager
    def beside_steps(self) -> Iterator[None]:
        """For a call's work that needs no turn, in torch's or the tokenizer's code; needs no lock either.

        A daemon thread that gets back from such code while the interpreter goes down ends the process with an abort. So
        the end waits for those that are here, and who comes later waits for the end.
        """
        thread = threading.get_ident()
        self._beside[thread] += 1
        try:
            self.wait_for_the_end()
            yield
        finally:
            self._beside[thread] -= 1
            if not self._beside[thread]:  # a signal handler may come and go in between
                self._beside.pop(thread, None)

    def add(self, request: Request) -> None:
        """Queue a request for the next step; returns at once."""
        self._arrivals.append(request)

    def leave(self, request: Request) -> None:
        """Ask that a request be ended by the next step. For finalisers: nothing else happens now."""
        self._departures.append(request)

    def abort(self, request: Request) -> None:
        """End a request: now, or after the step that runs."""
        self.leave(request)
        self.settle()

    def alone(self, work: Callable[[], Result]) -> Result:
        """Call `work` while no step is under way.

        Raises EngineDeadError as `check`, and BusyError when called from inside a step or from inside such a `work`.
        """
        self._check_process()
        return self._off_main(partial(self._alone, work))

    def slice_for(self, requests: Sequence[Request], step: Callable[[], object]) -> bool:
        """Take steps as `alone` does, until the requests have ended, SLICE_S are over or others wait for their turn.

        Returns whether any of them goes on. Going to another thread and back for each step takes as long as a tenth of
        a small model's step.
        """
        self._check_process()
        return self._off_main(partial(self._slice_for, requests, step))

    def settle(self) -> None:
        """Take up notes, unless a step is under way: whoever takes it does so when it ends."""
        if self._has_notes and not self._is_inside and os.getpid() == self._pid:
            self._off_main(self._settle, SETTLE_WAIT_S)

    def close(self) -> None:
        """End every request with an EngineDeadError and close the engine: now, or after the step that runs.

        Waits for another thread's step, up to CLOSE_WAIT_S. No effect in a forked child.
        """
        self._is_closing = True
        if self._wants_end and os.getpid() == self._pid:
            self._off_main(self._close, CLOSE_WAIT_S)

    def close_soon(self) -> None:
        """As `close`, without waiting for a step; for finalisers."""
        self._is_closing = True
        self.settle()

    def _off_main(self, work: Callable[[], Result], wait_s: float = -1) -> Result | None:
        """What `work` returns or raises, called by a thread that no signal handler interrupts; None after `wait_s`."""
        if self._is_closed or threading.current_thread() is not threading.main_thread():
            return work()
        outcome, ended = deque(), threading.Lock()
        ended.acquire()

        def job() -> None:
            try:
                outcome.append((work(), None))
            except BaseException as failure:
                outcome.append((None, failure))
            finally:
                ended.release()

        self._stepper.put(job)
        try:
            if not ended.acquire(timeout=wait_s):
                return None
        except BaseException:
            if not outcome:
                ended.acquire(timeout=SETTLE_WAIT_S)  # so that what the caller does next rarely meets a step
            raise
        result, failure = outcome.pop()
        try:
            if failure is not None:
                raise failure
            return result
        finally:
            del failure  # its traceback holds this frame

    def _slice_for(self, requests: Sequence[Request], step: Callable[[], object]) -> bool:
        stop = time.monotonic() + SLICE_S
        with self._engine.lanes.torch_at_rest():  # each step would bring it there and back
            while _go_on(requests):
                self._alone(step)
                if self._queue or time.monotonic() >= stop:
                    break
        return _go_on(requests)

    def _alone(self, work: Callable[[], Result]) -> Result:
        try:
            self._await_turn()
            try:
                if self._is_inside:
                    raise BusyError(
                        f"{self._engine.plan.model}: this call came from inside a step, out of a callback or a "
                        "finaliser, and would wait for itself; there, use add, abort or close"
                    )
                return self._inside(work)
            finally:
                self._lock.release()
        finally:
            self._settle()

    def _await_turn(self) -> None:
        """Take the lock."""
        if not self._lock.acquire(blocking=False):
            self._queue.append(threading.get_ident())
            try:
                self._lock.acquire()
            finally:
                self._queue.pop()

    def _settle(self) -> None:
        while self._has_notes and self._lock.acquire(blocking=False):
            try:
                if self._is_inside:
                    return
                self._inside(None)
            finally:
                self._lock.release()

    def _close(self) -> None:
        if self._lock.acquire(timeout=CLOSE_WAIT_S):
            self._lock.release()
        self._settle()

    @property
    def _has_notes(self) -> bool:
        return bool(self._departures) or self._wants_end

    @property
    def _wants_end(self) -> bool:
        return self._is_closing and not self._is_closed

    @property
    def _closed_message(self) -> str:
        return f"this LLM of {self._engine.plan.model} is closed; make a new one"

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise EngineDeadError(
                f"this LLM of {self._engine.plan.model} was made before a fork, and its threads are in the parent; "
                "load the model in the child, or start processes with multiprocessing's spawn method"
            )

    def _inside(self, work: Callable[[], Result] | None) -> Result | None:
        """Take up notes, work, take up notes; without work, whatever the state of the engine."""
        try:
            self._is_inside = True
            self._take_notes()
            if work is None:
                return None
            self.check()
            result = work()
            self._take_notes()
            return result
        finally:
            self._is_inside = False

    def _take_notes(self) -> None:
        """A note is dropped only once it has had its effect, so that an interruption loses none."""
        while self._arrivals:
            self._scheduler.add(self._arrivals[0])
            self._arrivals.popleft()
        while self._departures:
            self._scheduler.abort(self._departures[0])
            self._departures.popleft()
        if self._wants_end:
            self._end()

    def _end(self) -> None:
        self._scheduler.abort_all(EngineDeadError(self._closed_message))
        self._scheduler.close()
        self._engine.close()
        self._is_closed = True
        atexit.unregister(self._end_with_process)

    def _end_with_process(self) -> None:
        """Close when the interpreter ends, and keep the lock: a daemon thread that generates then waits for its end.

        Such a thread must not be in torch's code while the interpreter tears it down; that would abort the process.
        """
        if os.getpid() == self._pid and self._lock.acquire(timeout=2 * CLOSE_WAIT_S):
            self._has_ended = True
            self._end()
            stop = time.monotonic() + CLOSE_WAIT_S
            while self._is_anybody_beside and time.monotonic() < stop:
                time.sleep(0.001)

    @property
    def _is_anybody_beside(self) -> bool:
        return bool(self._beside.keys() - {threading.get_ident()})


def _go_on(requests: Sequence[Request]) -> bool:
    return any(request.finish_reason is None for request in requests)
