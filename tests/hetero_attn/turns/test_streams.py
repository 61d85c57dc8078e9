"""Calls that come at any time and from anywhere: no text is lost, and nothing waits for itself."""

import gc
import threading
import time
from collections import Counter

import pytest
from hypothesis import strategies as st

from hetero_attn.errors import BusyError, MemoryBudgetError
from tests.support.models.turns import PROMPTS, during_a_step, greedy, is_at_rest, joined
from tests.support.suite.few_examples import drawn


@pytest.mark.parametrize("count", [2, 3, 5])
def test_streams_read_in_turn_in_one_thread_are_whole(llm, alone, count):
    streams, pieces = [llm.stream(prompt, greedy()) for prompt in PROMPTS[:count]], [[] for _ in range(count)]
    for _ in range(100):
        for stream, got in zip(streams, pieces, strict=True):
            got += filter(None, [next(stream, None)])

    assert [joined(got) for got in pieces] == alone[:count]
    assert all(got[-1].finish_reason == "length" for got in pieces)
    assert is_at_rest(llm)


def test_more_streams_than_places_nested_in_one_thread_wait_and_are_whole(llm, alone):
    def nest(depth):
        stream = llm.stream(PROMPTS[depth % len(PROMPTS)], greedy())
        pieces = [next(stream)]
        inner = nest(depth + 1) if depth < 9 else []
        return [joined([*pieces, *stream]), *inner]

    assert nest(0) == [*alone, *alone]
    assert is_at_rest(llm)


def test_generate_inside_a_stream_takes_nothing_from_it(llm, alone):
    pieces, inner = [], []
    for piece in llm.stream(PROMPTS[0], greedy()):
        pieces.append(piece)
        inner.append(llm.generate(PROMPTS[1], greedy())[0].token_ids)

    assert joined(pieces) == alone[0]
    assert set(inner) == {alone[1][1]}


def test_a_slow_reader_beside_a_thread_that_steps_misses_nothing(llm, alone):
    ended = threading.Event()

    def step():
        while not ended.is_set():
            llm.step()

    thread = threading.Thread(target=step)
    thread.start()
    try:
        for index, prompt in enumerate(PROMPTS):
            pieces = []
            for piece in llm.stream(prompt, greedy()):
                pieces.append(piece)
                time.sleep(0.002)
            assert joined(pieces) == alone[index]
    finally:
        ended.set()
        thread.join(60)


def test_two_threads_that_share_a_stream_share_its_text(llm, alone):
    stream, pieces = llm.stream(PROMPTS[0], greedy()), []

    def read():
        pieces.extend(stream)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    assert Counter("".join(piece.text for piece in pieces)) == Counter(alone[0][0])
    assert Counter(sum((piece.token_ids for piece in pieces), ())) == Counter(alone[0][1])


MOVES = st.lists(
    st.tuples(
        st.sampled_from(
            ["next", "next", "next", "open", "step", "generate", "logits", "add", "abort", "drop", "collect"]
        ),
        st.integers(0, 9),
    ),
    min_size=4,
    max_size=40,
)


@drawn(few=6, many=24, moves=MOVES)
def test_any_order_of_calls_delivers_every_text_once(llm, alone, moves):
    streams, requests = [], []
    for move, number in moves:
        which = number % len(PROMPTS)
        if move == "open" or (move in ("next", "abort", "drop") and not streams):
            streams.append([which, llm.stream(PROMPTS[which], greedy()), []])
        elif move == "next":
            got = streams[number % len(streams)]
            got[2] += filter(None, [next(got[1], None)])
        elif move == "step":
            llm.step()
        elif move == "generate":
            assert llm.generate(PROMPTS[which], greedy())[0].token_ids == alone[which][1]
        elif move == "logits":
            assert llm.logits([4 + number, 5]).shape[0] == 2
        elif move == "add":
            requests.append((which, llm.add(PROMPTS[which], greedy())))
        elif move == "abort":
            dropped = streams.pop(number % len(streams))
            dropped[1].close()
            assert next(dropped[1], None) is None
        elif move == "drop":
            streams.pop(number % len(streams))
        else:
            gc.collect()
    for which, stream, pieces in streams:
        pieces += stream
        assert joined(pieces) == alone[which]
    while not is_at_rest(llm):
        pass

    for which, request in requests:
        assert (request.output().text, request.output().token_ids) == alone[which]


def test_threads_that_stream_generate_and_step_at_once_are_each_whole(llm, alone):
    wrong = []

    def stream(index):
        for _ in range(3):
            if joined(list(llm.stream(PROMPTS[index], greedy()))) != alone[index]:
                wrong.append(index)

    def generate(index):
        for _ in range(3):
            if llm.generate(PROMPTS[index], greedy())[0].token_ids != alone[index][1]:
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(5) for work in (stream, generate)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)

    assert not wrong
    assert is_at_rest(llm)


def test_logits_wait_while_every_place_is_taken(llm, alone):
    expected = llm.logits([3, 4, 5])
    streams = [llm.stream(prompt, greedy()) for prompt in PROMPTS[:3]]
    first = [next(stream) for stream in streams]
    assert llm.engine.kv_cache.free_sequences == 0

    assert llm.logits([3, 4, 5]).equal(expected)
    assert [joined([piece, *stream]) for piece, stream in zip(first, streams, strict=True)] == alone[:3]


def test_a_wait_that_could_never_end_is_a_named_error(llm):
    """Somebody holds every place outside of any request, so no step makes room."""
    cache = llm.engine.kv_cache
    sequences = [cache.open(4) for _ in range(cache.free_sequences)]
    try:
        for call in (lambda: llm.logits([3, 4]), lambda: llm.generate("x", greedy()), lambda: next(llm.stream("x"))):
            with pytest.raises(MemoryBudgetError, match="no room for a sequence"):
                call()
    finally:
        for sequence in sequences:
            cache.close(sequence)
    assert is_at_rest(llm)


def test_a_stream_collected_inside_a_step_waits_for_nobody(llm, alone, monkeypatch):
    stream = llm.stream(PROMPTS[0], greedy())
    next(stream)
    cycle = [stream]
    cycle.append(cycle)
    del stream, cycle
    during_a_step(llm, monkeypatch, gc.collect)

    assert llm.generate(PROMPTS[1], greedy())[0].token_ids == alone[1][1]
    assert is_at_rest(llm)


@pytest.mark.parametrize("device", ["cpu", pytest.param("emulated", marks=pytest.mark.matrix)], indirect=True)
def test_many_streams_in_cycles_leave_nothing(llm, alone):
    for number in range(100):
        cycle = [llm.stream(PROMPTS[number % 5], greedy())]
        cycle.append(cycle)
        next(cycle[0])
    del cycle
    gc.collect()

    assert llm.generate(PROMPTS[2], greedy())[0].token_ids == alone[2][1]
    assert is_at_rest(llm)


def test_calls_from_inside_a_step_leave_a_note_or_say_so(llm, alone, monkeypatch):
    """As a callback, a finaliser or a signal handler makes them."""
    victim, added, refused = llm.add(PROMPTS[2], greedy(64)), [], []

    def calls():
        llm.abort(victim)
        added.append(llm.add(PROMPTS[3], greedy()))
        stream = llm.stream("x", greedy())
        for call in (llm.step, lambda: llm.generate("x"), lambda: llm.logits([3]), lambda: next(stream)):
            with pytest.raises(BusyError, match="inside a step"):
                call()
            refused.append(call)

    during_a_step(llm, monkeypatch, calls)
    assert llm.generate(PROMPTS[1], greedy())[0].token_ids == alone[1][1]
    while added[0].finish_reason is None:
        llm.step()

    assert len(refused) == 4
    assert victim.finish_reason == "abort"
    assert added[0].output().token_ids == alone[3][1]
    assert is_at_rest(llm)


def test_an_abort_beside_another_threads_step_returns_at_once(llm, monkeypatch):
    inside, go_on = threading.Event(), threading.Event()

    def hold():
        inside.set()
        assert go_on.wait(60)

    request = llm.add(PROMPTS[0], greedy(64))
    during_a_step(llm, monkeypatch, hold)
    thread = threading.Thread(target=lambda: [llm.step() for _ in range(3)])
    thread.start()
    assert inside.wait(60)
    llm.abort(request)
    llm.add("x", greedy(1))
    assert request.finish_reason is None
    go_on.set()
    thread.join(60)

    assert request.finish_reason == "abort"
    while llm.step():
        pass
    assert is_at_rest(llm)


def test_a_running_request_has_no_finish_reason(llm):
    request = llm.add("x", greedy())
    waiting = request.output()
    llm.step()
    running = request.output()
    while llm.step():
        pass

    assert (waiting.finish_reason, waiting.token_ids) == (None, ())
    assert (running.finish_reason, len(running.token_ids)) == (None, 1)
    assert request.output().finish_reason == "length"


def test_a_stream_that_is_left_has_what_came_also_while_a_step_is_under_way(llm):
    """Its request ends only with that step."""
    stream = llm.stream("x", greedy())
    pieces = [next(stream), next(stream)]
    request = stream._request
    during = []
    step = llm._scheduler.step

    def watched():
        threading.Thread(target=stream.close).start()
        while stream._shown.finish_reason is None:
            time.sleep(0.001)
        during.append((request.finish_reason, stream.output()))
        return step()

    llm._scheduler.step = watched
    try:
        llm.step()
    finally:
        llm._scheduler.step = step
    ((not_yet, left),) = during

    assert not_yet is None and left.finish_reason == "abort"
    assert left.token_ids == tuple(each for piece in pieces for each in piece.token_ids)
    while request.finish_reason is None:
        llm.step()
    assert stream.output().finish_reason == "abort"
