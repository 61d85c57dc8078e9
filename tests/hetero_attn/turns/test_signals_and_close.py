"""Signals between any two bytecodes, and a model that is closed under its callers: no text is lost, closed is closed by name."""

import random
import signal
import threading
import time
from collections import Counter

import pytest

from hetero_attn.errors import EngineDeadError
from tests.support.models.turns import PROMPTS, during_a_step, greedy, is_at_rest, joined, load


@pytest.mark.parametrize("device", ["cpu", pytest.param("emulated", marks=pytest.mark.matrix)], indirect=True)
@pytest.mark.usefixtures("no_alarms_after")
def test_signal_handlers_may_add_and_abort_at_any_bytecode(llm, alone):
    storm, seen = [], Counter()

    def handler():
        seen["signals"] += 1
        if len(storm) > 20:
            llm.abort(storm.pop(seen["signals"] % 20))
        else:
            storm.append(llm.add([3, 4 + seen["signals"] % 50], greedy(40)))

    signal.signal(signal.SIGALRM, lambda *_: handler())
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0007)
    for number in range(12):
        index = number % len(PROMPTS)
        assert joined(list(llm.stream(PROMPTS[index], greedy()))) == alone[index]
    signal.setitimer(signal.ITIMER_REAL, 0)
    for request in storm:
        llm.abort(request)

    assert seen["signals"] > 5
    assert is_at_rest(llm)


class Interruption(Exception):
    """What a signal handler raises here, as Ctrl-C does KeyboardInterrupt."""


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # one came inside a finaliser
@pytest.mark.usefixtures("no_alarms_after")
def test_exceptions_of_signal_handlers_cost_no_text_and_no_place(path, device, alone):
    """Interrupted between any two bytecodes, steps are taken again; other requests do not notice."""
    armed = False

    def handler(*_):
        if armed:
            raise Interruption

    signal.signal(signal.SIGALRM, handler)
    delays_s = random.Random(1)
    with load(path, device) as llm:
        requests, interrupted = [], 0
        while interrupted < 25:
            if not llm._scheduler.has_work:
                requests += [llm.add(PROMPTS[number], greedy()) for number in range(5)]
            try:
                try:
                    signal.setitimer(signal.ITIMER_REAL, delays_s.uniform(1e-5, 3e-3))
                    armed = True
                    llm.step()
                finally:
                    armed = False
            except Interruption:
                interrupted += 1
        signal.setitimer(signal.ITIMER_REAL, 0)
        while llm.step():
            pass

        for number, request in enumerate(requests):
            assert (request.output().text, request.output().token_ids) == alone[number % 5]
        assert is_at_rest(llm)
        pages = [pool.free_pages for pool in llm.engine.kv_cache.pools]
        assert pages == [pool.capacity for pool in llm.engine.kv_cache.pools]
        llm.engine.kv_cache.forget_prefixes()
        stores = [store for pool in llm.engine.kv_cache.pools for store in pool.stores.values()]
        assert [store.free_pages for store in stores] == [store.num_pages for store in stores]


CLOSERS = {
    "generate": lambda llm: llm.generate("late", greedy()),
    "stream": lambda llm: next(llm.stream("late", greedy())),
    "add": lambda llm: llm.add("late", greedy()),
    "step": lambda llm: llm.step(),
    "logits": lambda llm: llm.logits([3, 4]),
    "resize": lambda llm: llm.resize("1MiB"),
}


def test_after_close_every_call_says_so(path, device):
    llm = load(path, device)
    stream, request, waiting = llm.stream("x", greedy()), llm.add("y", greedy(64)), llm.stream("never begun", greedy())
    next(stream)
    llm.close()
    llm.close()

    for call in (*CLOSERS.values(), lambda llm: next(stream), lambda llm: next(waiting), lambda llm: request.output()):
        with pytest.raises(EngineDeadError, match="closed"):
            call(llm)
    assert request.finish_reason == "abort"
    llm.abort(request)
    stream.close()


def test_text_that_was_complete_before_close_is_still_delivered(path, device, alone):
    with load(path, device) as llm:
        stream = llm.stream(PROMPTS[0], greedy())
        pieces = [next(stream)]
        llm.generate(PROMPTS[1], greedy(16))

    assert joined([*pieces, *stream]) == alone[0]


def test_a_model_closed_inside_a_step_is_closed_after_it(path, device, monkeypatch):
    llm = load(path, device)
    during_a_step(llm, monkeypatch, llm.close)
    with pytest.raises(EngineDeadError, match="closed"):
        llm.generate("x", greedy(64))
    with pytest.raises(EngineDeadError, match="closed"):
        llm.step()


@pytest.mark.usefixtures("no_alarms_after")
def test_a_signal_handler_may_close_the_model(path, device):
    llm = load(path, device)
    signal.signal(signal.SIGALRM, lambda *_: llm.close())
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    with pytest.raises(EngineDeadError, match="closed"):
        while True:
            llm.generate("x", greedy(64))


def test_close_ends_the_calls_of_other_threads_with_the_same_error(path, device):
    llm, errors, started = load(path, device), {}, threading.Barrier(4)

    def work(name):
        call = CLOSERS[name]
        started.wait(60)
        try:
            while True:
                call(llm)
        except Exception as error:
            errors[name] = error

    threads = [threading.Thread(target=work, args=(name,)) for name in ("generate", "stream", "logits")]
    for thread in threads:
        thread.start()
    started.wait(60)
    time.sleep(0.05)
    llm.close()
    for thread in threads:
        thread.join(60)

    assert {name: type(error) for name, error in errors.items()} == dict.fromkeys(
        ("generate", "stream", "logits"), EngineDeadError
    )
