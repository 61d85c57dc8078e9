"""The thread that owns a model: it loads it, takes its steps and ends what clients gave up.

The event loop never waits for it. `enter` and `leave` note what is to be done; the thread takes the notes up between
two steps. After a step one call on the loop wakes those whose requests moved, and counts what they made. First tokens
and ends are told at once; between them clients are told at most CHUNKS_PER_S times a second all together, because what
a chunk takes of the interpreter is taken from the steps. A chunk that comes later holds what came meanwhile.
"""

from __future__ import annotations

import asyncio
import enum
import gc
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import suppress
from typing import TYPE_CHECKING

from hetero_attn.errors import EngineDeadError, HeteroError, PromptError
from hetero_attn.server.failures import LOG
from hetero_attn.server.generation import Generation
from hetero_attn.server.metrics import ServerMetrics
from hetero_attn.serving.sampling_params import SamplingParams

CHUNKS_PER_S = 400  # at some 80 us of the interpreter each they take 3 % of the steps' time
NEW_OBJECTS = 50_000
LONGEST_HOLD_S = 0.05

if TYPE_CHECKING:  # they need torch, whose import would keep a server from answering while it loads
    from hetero_attn.llm import LLM
    from hetero_attn.serving.request import Request


class State(enum.Enum):
    """What a server is doing. FAILED: the model could not be loaded, or its engine is dead."""

    LOADING = "loading"
    READY = "ready"
    STOPPING = "stopping"
    FAILED = "failed"


class Driver:
    """One model and its thread. Everything but `_work` and what it calls happens on the event loop.

    load: makes the model; called by the thread. changed: called on the loop with every new state.
    """

    def __init__(self, load: Callable[[], LLM], metrics: ServerMetrics, changed: Callable[[State], None]) -> None:
        self.llm: LLM | None = None
        self.state = State.LOADING
        self.failure: BaseException | None = None
        self.live: dict[Request, Generation] = {}
        self._load, self._metrics, self._changed = load, metrics, changed
        self._notes: deque[tuple[Request, HeteroError | None]] = deque()  # to be ended by the thread
        self._wishes: deque[tuple[Future, Callable[[], object]]] = deque()  # to be done by the thread
        self._moved: deque[Request] = deque()  # for the loop to look at
        self._is_announced = False
        self._looked_at = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._wake = threading.Event()
        self._is_over = False
        self._lost: HeteroError | None = None  # what ends every turn
        self._thread = threading.Thread(target=self._work, name="hetero-attn-driver", daemon=True)

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start the thread, which loads the model first; `changed` and generations are told on this loop."""
        self._loop = loop
        self._thread.start()

    @property
    def running(self) -> int:
        """How many requests have a sequence in the cache; the others of `live` wait for one."""
        return sum(request.sequence is not None for request in self.live)

    def enter(self, generation: Generation) -> None:
        """Let requests that were added to the model be computed; beside others they may have ended already."""
        if self._lost is not None:
            generation.fail(self._lost)
            return
        for request in generation.requests:
            self.live[request] = generation
            self._count(request)
        self._wake.set()
        generation.wake()

    def leave(self, generation: Generation) -> None:
        """End the requests of a client that is gone; no effect on those that have ended."""
        self.give_up(request for request in generation.requests if request in self.live)

    def give_up(self, requests: Iterable[Request], error: HeteroError | None = None) -> None:
        """End requests where they stand, after the step that runs."""
        self._notes.extend((request, error) for request in requests if request.finish_reason is None)
        self._wake.set()

    def between_steps(self, work: Callable[[], object]) -> Future:
        """Have the thread do something while no step is under way; what comes of it."""
        outcome: Future = Future()
        self._wishes.append((outcome, work))
        self._wake.set()
        return outcome

    def stop(self) -> None:
        """Become STOPPING, in which nothing new is taken and what runs goes on; no effect on a failed driver."""
        if self.state is not State.FAILED:
            self._become(State.STOPPING)

    def lose(self, error: HeteroError) -> None:
        """End every turn with an error, also those to come; at once, whatever step is under way."""
        self._lost = error
        for request, generation in list(self.live.items()):
            del self.live[request]
            self._metrics.lost(request)
            generation.fail(error)

    def finish(self, wait_s: float) -> bool:
        """End the thread after the step that runs and close the model; waits a while. Returns whether it has ended.
        Idempotent."""
        self._is_over = True
        self._wake.set()
        self._thread.join(wait_s)
        return not self._thread.is_alive()

    def _become(self, state: State) -> None:
        self.state = state
        self._changed(state)

    def _dead(self) -> EngineDeadError:
        return EngineDeadError(f"the engine is dead: {type(self.failure).__name__}; the server has to be started again")

    def _work(self) -> None:
        try:
            llm = self._load()
        except BaseException as failure:
            self._call(self._fail, failure)
            return
        with llm:
            if self._is_over:
                return
            self.llm = llm
            self._call(self._ready)
            try:
                while not self._is_over:
                    self._step(llm)
            except BaseException as failure:
                self._call(self._fail, failure)

    def _step(self, llm: LLM) -> None:
        """One step, or a wait for something to do. A step that fails ends what took part, unless the engine is dead."""
        while self._notes:
            request, _ = note = self._notes.popleft()
            llm.abort(request)
            self._note_end(*note)
        while self._wishes:
            self._do(*self._wishes.popleft())
        try:
            moved = llm.step()
        except EngineDeadError:
            raise
        except HeteroError as error:
            LOG.error("a step failed: %s", type(error).__name__)
            for request in list(self.live):
                llm.abort(request)
                self._note_end(request, error)
            return
        if moved:
            self._announce(moved, any(_is_urgent(request) for request in moved))
        else:
            self._wake.wait()
            self._wake.clear()

    def _do(self, outcome: Future, work: Callable[[], object]) -> None:
        if not outcome.set_running_or_notify_cancel():
            return
        try:
            outcome.set_result(work())
        except Exception as error:
            outcome.set_exception(error)

    def _note_end(self, request: Request, error: HeteroError | None) -> None:
        if error is not None:
            request.error = request.error or error
        self._announce((request,), is_urgent=True)

    def _announce(self, requests: Iterable[Request], is_urgent: bool) -> None:
        self._moved.extend(requests)
        if is_urgent:
            self._call(self._look)
        elif not self._is_announced:
            self._is_announced = True
            self._call(self._look_in_time)

    def _call(self, function: Callable, *arguments: object) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop is closed, so nobody listens
            self._is_over = True

    def _look_in_time(self) -> None:
        """Look now, or when enough time has passed since the last time; on the loop."""
        hold_s = min(len(self.live) / CHUNKS_PER_S, LONGEST_HOLD_S)
        due = self._looked_at + hold_s
        if self._loop.time() >= due:
            self._look()
        elif self._timer is None:
            self._timer = self._loop.call_at(due, self._look)

    def _look(self) -> None:
        """Wake the clients of what moved; on the loop."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._looked_at, self._is_announced = None, self._loop.time(), False
        while self._moved:
            request = self._moved.popleft()
            if (generation := self.live.get(request)) is not None:
                self._count(request)
                generation.wake()

    def _count(self, request: Request) -> None:
        """Count what a live request made since the last time, and its end."""
        progress = request.progress  # a step that ends meanwhile is announced and counted by itself
        self._metrics.moved(request, progress.tokens)
        if progress.finish_reason is not None:
            del self.live[request]
            self._metrics.ended(request)

    def _ready(self) -> None:
        if self.state is State.LOADING:
            self._become(State.READY)

    def _fail(self, failure: BaseException) -> None:
        self.failure = failure
        while self._wishes:
            self._wishes.popleft()[0].set_exception(self._dead())
        if self.llm is not None:  # who could not load it is told by what the server ends with
            LOG.error("the model is lost: %s", type(failure).__name__)
        self.lose(self._dead())
        self._become(State.FAILED)


def _is_urgent(request: Request) -> bool:
    """Whether a client waits for just this: its first token or its end."""
    return request.progress.tokens == 1 or request.finish_reason is not None


def settled(llm: LLM) -> LLM:
    """The model, which the garbage collector does not look through again: among a thousand new connections it would,
    for 80 ms in which nobody is answered. New objects it looks through once in as many as those bring along and not
    after every 700, which took another 40 ms. For a process that ends with its server."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(NEW_OBJECTS)
    return llm


def warmed(llm: LLM) -> LLM:
    """The model with what its first client would wait for done: kernels compiled and loaded, its chat template compiled
    with all that takes to be imported."""
    begin = llm.engine.config.bos_token_id or 0
    llm.generate([[begin] * 4], SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True))
    llm.report().reset()
    if llm.tokenizer is not None and llm.tokenizer.chat_template:
        with suppress(PromptError):  # the template wants another conversation
            llm.tokenizer.encode_chat([{"role": "user", "content": "Hi"}])
    return llm
