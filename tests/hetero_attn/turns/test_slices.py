"""Steps of `generate`, many of which the steps' thread takes one after the other, and what ends such a slice."""

import signal
import threading

import pytest

from hetero_attn.serving.scheduling import turns
from tests.support.models.turns import PROMPTS, greedy, is_at_rest


@pytest.fixture
def slices(llm, monkeypatch):
    """One entry for each time that the main thread waits for the steps' thread."""
    made, put = [], llm._turns._stepper.put
    monkeypatch.setattr(llm._turns._stepper, "put", lambda job: made.append(job) or put(job))
    return made


@pytest.mark.parametrize(("slice_s", "least", "most"), [(0.0, 40, 60), (1e9, 1, 3)])
def test_steps_share_a_slice_as_long_as_it_lasts(llm, monkeypatch, slices, slice_s, least, most):
    expected = llm.generate(PROMPTS[0], greedy(40))[0].token_ids
    slices.clear()
    monkeypatch.setattr(turns, "SLICE_S", slice_s)
    assert llm.generate(PROMPTS[0], greedy(40))[0].token_ids == expected
    assert least <= len(slices) <= most


def test_a_slice_ends_where_another_thread_waits_for_its_turn(llm, monkeypatch, slices):
    monkeypatch.setattr(turns, "SLICE_S", 1e9)
    own, is_inside, go_on = llm.engine.decode_step, threading.Event(), threading.Event()

    def held(*arguments, **options):
        is_inside.set()
        assert go_on.wait(60)
        return own(*arguments, **options)

    def step():
        assert is_inside.wait(60)
        threading.Timer(0.3, go_on.set).start()  # until this thread waits
        llm.step()

    monkeypatch.setattr(llm.engine, "decode_step", held)
    other = threading.Thread(target=step)
    other.start()
    llm.generate(PROMPTS[0], greedy(40))
    other.join(60)

    assert not other.is_alive()
    assert len(slices) >= 2  # of the steps, in one of which the other thread came
    assert is_at_rest(llm)


@pytest.mark.usefixtures("no_alarms_after")
def test_an_interrupted_slice_ends_with_its_requests(llm, monkeypatch):
    """However long it may last: what is raised in the main thread comes out within seconds, and nothing goes on."""
    monkeypatch.setattr(turns, "SLICE_S", 1e9)
    monkeypatch.setattr(turns, "SETTLE_WAIT_S", 0.05)

    class Interruption(Exception):
        pass

    def handler(*_):
        raise Interruption

    signal.signal(signal.SIGALRM, handler)
    own = llm.engine.decode_step

    def step_with_signal(*arguments, **options):
        if not llm._scheduler._running[0].token_ids[3:]:
            return own(*arguments, **options)
        signal.setitimer(signal.ITIMER_REAL, 1e-4)
        monkeypatch.setattr(llm.engine, "decode_step", own)
        return own(*arguments, **options)

    monkeypatch.setattr(llm.engine, "decode_step", step_with_signal)
    with pytest.raises(Interruption):
        llm.generate(PROMPTS[1], greedy(90))
    assert is_at_rest(llm)
