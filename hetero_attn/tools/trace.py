"""A timeline of some steps, lane by lane, in the format of Chrome's trace viewer (chrome://tracing, Perfetto).

    main thread   the steps, and inside them every call that queues work for the GPU
    GPU compute   kernels and copies of activations, by the device's own clock where it has one
    copies        weights, and older keys and values, on their way to the GPU
    CPU lane      operations of the host worker, or of the caller where it has none

Traced steps take the plain path: what is inside a captured or recorded step has no calls to time.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hetero_attn.engine.engine import Engine
from hetero_attn.lanes import observe
from hetero_attn.tools.trace_names import ShardNames
from hetero_attn.tools.whole_file import write_whole

LANES = ("main thread", "GPU compute", "copies", "CPU lane")
DECODE_TOKENS = 4


@dataclass(frozen=True, slots=True)
class Span:
    """What one lane did from `start` to `stop`, seconds since the trace began."""

    lane: str
    name: str
    start: float
    stop: float


class Trace:
    """Spans of the lanes of one engine. device: None for the CPU alone. shards: names what an operation works on."""

    def __init__(self, device: Any, shards: ShardNames) -> None:
        self.shards = shards
        self._spans: list[Span] = []
        self._queued: list[tuple[str, str, Any, Any]] = []
        self._device = device
        self._zero_mark = None if device is None else self._settled_mark()
        self._zero = time.perf_counter()

    @property
    def spans(self) -> list[Span]:
        """All spans so far; the device must have finished."""
        if self._device is None:
            return list(self._spans)
        since = self._device.driver.seconds_between
        queued = [
            Span(lane, name, since(self._zero_mark, start), since(self._zero_mark, stop))
            for lane, name, start, stop in self._queued
        ]
        return self._spans + queued

    @contextmanager
    def span(self, lane: str, name: str) -> Iterator[None]:
        """Time the enclosed work by the host's clock."""
        start = time.perf_counter() - self._zero
        try:
            yield
        finally:
            self._spans.append(Span(lane, name, start, time.perf_counter() - self._zero))

    def queue(self, lane: str, stream: Any, name: str, work: Callable[[], object]) -> None:
        """Queue work on a stream of the device, timed by the device, and its queueing by the host."""
        with self.span("main thread", name):
            start = self._device.driver.mark(stream)
            work()
            self._queued.append((lane, name, start, self._device.driver.mark(stream)))

    def to_dict(self) -> dict[str, Any]:
        """The trace viewer's JSON: every lane a named thread, times in microseconds."""
        threads = {lane: number for number, lane in enumerate(LANES)}
        names = [
            {"ph": "M", "name": "thread_name", "pid": 0, "tid": number, "args": {"name": lane}}
            for lane, number in threads.items()
        ]
        return {"traceEvents": names + [_event(span, threads[span.lane]) for span in self.spans]}

    def save(self, path: Path) -> None:
        """Write the JSON file."""
        write_whole(path, json.dumps(self.to_dict()))

    def _settled_mark(self) -> Any:
        self._device.synchronize(self._device.record(self._device.compute))
        mark = self._device.driver.mark(self._device.compute)
        self._device.synchronize(self._device.record(self._device.compute))
        return mark


def tokens_traced(prompt_tokens: int, decode_tokens: int = DECODE_TOKENS) -> int:
    """The tokens that a traced sequence holds at its end: the context that `trace_steps` needs."""
    return max(1, prompt_tokens) + decode_tokens


def trace_steps(engine: Engine, prompt_tokens: int, decode_tokens: int = DECODE_TOKENS) -> Trace:
    """The timeline of a prompt, of one token at least, and of some decode steps; each ran once before, untimed.

    Raises MemoryBudgetError where the cache has no room for `tokens_traced`.
    """
    for _ in range(2):
        sequence = engine.kv_cache.open(tokens_traced(prompt_tokens, decode_tokens))
        trace = Trace(engine.lanes.device, ShardNames(engine))
        with observe.traced(engine.lanes, trace):
            for start in range(0, max(1, prompt_tokens), engine.prefill_chunk):
                rows = min(engine.prefill_chunk, max(1, prompt_tokens) - start)
                with trace.span("main thread", f"prefill {rows}"):
                    engine.prefill(sequence, [1] * rows)
            for _ in range(decode_tokens):
                with trace.span("main thread", "decode"):
                    engine.decode_step([sequence], [1])
        engine.kv_cache.close(sequence)
    return trace


def _event(span: Span, thread: int) -> dict[str, Any]:
    start, duration = 1e6 * span.start, 1e6 * (span.stop - span.start)
    return {"ph": "X", "name": span.name, "pid": 0, "tid": thread, "ts": start, "dur": duration}
