"""Recorded steps of the CPU lane: what is written over them is what a step made anew would say, bit for bit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hetero_attn.cache.pages import PagedStore
from hetero_attn.engine.engine import Engine
from hetero_attn.engine.replays.renewal import Renewal
from hetero_attn.engine.replays.replay import own_copy
from hetero_attn.ops.step import Step, make_step
from hetero_attn.ops.step_rows import Rows
from tests.support.models.runtime import cpu_plan, make_engine, toy_workload
from tests.support.models.toy import make_checkpoint

CONTEXT = 48


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """Layers with a window and layers without, so two pools of the cache."""
    path = make_checkpoint(tmp_path_factory.mktemp("toy"), "gemma2", layers=4, num_kv_heads=2, sliding_window=9)
    engine = make_engine(path, cpu_plan(toy_workload(path, max_context=CONTEXT, max_batch=3)))
    assert len(engine.kv_cache.pools) == 2
    yield engine
    engine.close()


def tensors(step: Step) -> list[torch.Tensor]:
    found = [step.token_ids, step.positions.host]
    for pool in step.pools:
        found += [pool.slots.host, *(tensor for part in pool.parts for tensor in part.host)]
    return found


class Sequences:
    """Sequences that grow, go back, fork and end, and a recorded step for each number of rows."""

    def __init__(self, engine: Engine) -> None:
        self.lanes, self.cache = engine.lanes, engine.kv_cache
        self.open = [self.cache.open() for _ in range(2)]
        self.recorded: dict[int, tuple[Step, Renewal]] = {}

    def step(self, counts: list[int]) -> None:
        work = [
            Rows(sequence, list(range(7, 7 + count)))
            for sequence, count in zip(self.open, counts, strict=False)
            if count and sequence.length + count <= CONTEXT
        ]
        if not work:
            return
        rows = sum(len(each.token_ids) for each in work)
        if rows in self.recorded:
            step, renewal = self.recorded[rows]
            renewal.write(self.cache, work)
            expected = make_step(self.lanes, self.cache, work)

            assert all(map(torch.equal, tensors(step), tensors(expected)))
        else:
            step = own_copy(make_step(self.lanes, self.cache, work))
            self.recorded[rows] = step, Renewal(step)
        for each in work:
            each.sequence.length += len(each.token_ids)

    def go_back(self, index: int, tokens: int) -> None:
        sequence = self.open[index % len(self.open)]
        self.cache.rewind(sequence, max(0, sequence.length - tokens))

    def begin_anew(self, index: int) -> None:
        self.cache.close(self.open.pop(index % len(self.open)))
        self.open.append(self.cache.open())

    def fork(self, index: int) -> None:
        if len(self.open) == 3:
            self.cache.close(self.open.pop())
        self.open.append(self.cache.fork(self.open[index % len(self.open)]))

    def close(self) -> None:
        for sequence in self.open:
            self.cache.close(sequence)


index = st.integers(0, 2)
EVENTS = st.one_of(
    st.tuples(st.just("step"), st.lists(st.integers(0, 3), min_size=1, max_size=3)),
    st.tuples(st.just("step"), st.lists(st.integers(1, 1), min_size=1, max_size=3)),
    st.tuples(st.just("go_back"), index, st.integers(1, 6)),
    st.tuples(st.just("begin_anew"), index),
    st.tuples(st.just("fork"), index),
)


def play(engine: Engine, events: list) -> None:
    sequences = Sequences(engine)
    try:
        for name, *arguments in events:
            getattr(sequences, name)(*arguments)
    finally:
        sequences.close()


@given(st.lists(EVENTS, max_size=40))
def test_a_renewed_step_is_the_one_that_would_be_made(engine, events):
    play(engine, events)


GROWING = [("step", [1, 1])] * 20


def test_growing_sequences_take_new_pages_and_pass_their_window(engine):
    play(engine, GROWING)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("placed", lambda store, sequence_id: 0),
        ("write_slots", lambda store, sequence_id, position, into: into.fill(0)),
        ("write_table", lambda store, sequence_id, into: None),
    ],
)
def test_a_line_that_is_not_brought_up_to_date_is_caught(engine, monkeypatch, name, wrong):
    monkeypatch.setattr(PagedStore, name, wrong)

    with pytest.raises(AssertionError):
        play(engine, GROWING)


@pytest.mark.parametrize(
    ("family", "dtype"), [("llama", "fp32"), ("llama", "bf16"), ("llama", "q8"), ("gemma2", "fp32")]
)
def test_replayed_steps_give_the_bits_of_plain_ones(tmp_path, family, dtype):
    """From the embedding on, which the recorded program computes, scaled where the family does."""
    path = make_checkpoint(tmp_path, family, layers=2)
    workload = toy_workload(path, dtype)
    logits = []
    for replay in (True, False):
        engine = make_engine(path, cpu_plan(workload))
        if not replay:
            engine.forward.replay = None
        sequences = [engine.kv_cache.open() for _ in range(2)]
        for sequence, prompt in zip(sequences, ([5, 6, 7], [9, 8]), strict=True):
            engine.prefill(sequence, prompt)
        steps = [engine.decode_step(sequences, [20 + step, 40 + step]) for step in range(6)]
        steps += [engine.decode_step(sequences[1:], [60 + step]) for step in range(3)]
        logits.append(torch.cat(steps))
        engine.close()

    assert torch.equal(*logits)


def test_a_step_with_fewer_logits_than_rows_is_replayed_too(engine):
    """A chain of drafts wants all logits, its caller may want the last ones only."""
    found = []
    for _ in range(3):
        sequence = engine.kv_cache.open()
        engine.prefill(sequence, [5, 6, 7])
        found.append(engine.run([Rows(sequence, [9, 10, 11], 2)])[0])
        engine.kv_cache.close(sequence)

    assert found[0].shape[0] == 2
    assert torch.equal(found[0], found[1]) and torch.equal(found[1], found[2])
