"""Steps taken to be measured: a long context in seconds, and a step's seconds by kind of work."""

from collections.abc import Callable, Sequence

import torch

from hetero_attn.cache.pool import SequenceState
from hetero_attn.engine.engine import Engine
from hetero_attn.engine.replays.replay import DecodeReplay
from hetero_attn.lanes import observe
from hetero_attn.lanes.stopwatch import Stopwatch, time_recorded
from hetero_attn.ops.step import make_step
from hetero_attn.ops.step_rows import Rows


@torch.inference_mode()
def fill(engine: Engine, sequence: SequenceState, tokens: int) -> None:
    """Append tokens with random keys and values, nothing computed: a long context in seconds, for measurements."""
    lanes, forward = engine.lanes, engine.forward
    with lanes.torch_at_rest():
        forward.drain()
        forward.randomise()
    stop = sequence.length + tokens
    while sequence.length < stop:
        rows = min(engine.prefill_chunk, stop - sequence.length)
        with forward.guard, lanes.torch_at_rest():
            chunk = Rows(sequence, range(rows), 0, is_chunk=True)
            forward.store(make_step(lanes, engine.kv_cache, [chunk]))
        sequence.length += rows


@torch.inference_mode()
def decode_terms(engine: Engine, sequence: SequenceState, token_id: int) -> dict[str, float]:
    """Seconds of the next decode step by kind of work (placement.plan.phase.TERMS), each by itself.

    The sequence does not grow; the step's KV entries and activations are left with values of no meaning.
    """
    lanes, forward = engine.lanes, engine.forward
    forward.drain()
    step = make_step(lanes, engine.kv_cache, [Rows(sequence, [token_id])])
    if lanes.device is not None or forward.replay is None:
        stopwatch = Stopwatch()
        with lanes.torch_at_rest(), observe.watched(lanes, stopwatch):
            forward.run(step)
        return stopwatch.seconds

    def replay_of(term: str | None) -> Callable[[], None]:
        replay = DecodeReplay(lanes.host_ops, forward.decode)
        with observe.only(lanes, term):
            replay.run(step)
        return lambda: replay.run(step)

    with lanes.torch_at_rest():
        return time_recorded(replay_of)


@torch.inference_mode()
def prefill_terms(engine: Engine, sequence: SequenceState, token_ids: Sequence[int]) -> dict[str, float]:
    """As `decode_terms`, of a prompt of at most `prefill_chunk` tokens with the logits of its last one."""
    lanes, forward = engine.lanes, engine.forward
    forward.drain()
    stopwatch = Stopwatch()
    with lanes.torch_at_rest(), observe.watched(lanes, stopwatch):
        step = make_step(lanes, engine.kv_cache, [Rows(sequence, token_ids, is_chunk=True)])
        forward.run(step)
        forward.logits_of(step.rows - 1, step.rows)
    return stopwatch.seconds
