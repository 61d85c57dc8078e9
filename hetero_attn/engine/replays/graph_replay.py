"""A decode step on three lanes, captured once for each batch size and replayed for every token.

What the GPU and the copy engine do is one CUDA graph; what the CPU lane does is one program that the host worker
runs beside it; flags in memory order the two (`flag_handover`). So a token costs one launch, however many layers there
are. The first step of a kind runs plainly, which also compiles its kernels; the plain path computes the same.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hetero_attn.engine.replays.replay import own_copy, refresh
from hetero_attn.lanes.lanes import Lanes
from hetero_attn.lanes.recorded_step import RecordedStep
from hetero_attn.ops.step import Step

Structure = tuple[int, bool, tuple[tuple[bool, bool, bool], ...]]


@dataclass(frozen=True, slots=True)
class CapturedStep:
    """A graph, its host jobs, the step whose host tensors they read, and the bytes that it streams."""

    step: Step
    graph: Any
    jobs: RecordedStep
    streamed_bytes: int


class GraphReplay:
    """Captured decode steps. `forward(step)` queues one step without its embedding, logits included."""

    def __init__(self, lanes: Lanes, forward: Callable[[Step], None]) -> None:
        self._lanes = lanes
        self._forward = forward
        self._captured: dict[Structure, CapturedStep | None] = {}

    def forget(self) -> None:
        """Capture anew; after weights or caches have moved."""
        captured, self._captured = self._captured, {}
        for each in filter(None, captured.values()):
            self._lanes.handover.forget(each.jobs)

    def has_captured(self, tier: int) -> bool:
        """Whether any step of a row tier was captured."""
        return any(each is not None and each.step.tier == tier for each in self._captured.values())

    def run(self, step: Step) -> None:
        """Queue a decode step whose embedded rows and tables are on their way."""
        structure = _structure(step)
        if structure not in self._captured:
            self._captured[structure] = None
            self._forward(step)
            return
        captured = self._captured[structure] = self._captured[structure] or self._capture(step)
        refresh(captured.step, step)
        self._lanes.handover.replay(captured.jobs)
        captured.graph.replay()
        if self._lanes.ring is not None:
            self._lanes.ring.copied_bytes += captured.streamed_bytes

    def _capture(self, step: Step) -> CapturedStep:
        lanes, own, before = self._lanes, own_copy(step), self._lanes.streamed_bytes
        with lanes.handover.record(ops_only=True) as jobs, lanes.device.capture() as graph, lanes.copies_beside():
            self._forward(own)
        streamed_bytes = lanes.streamed_bytes - before
        if lanes.ring is not None:
            lanes.ring.settle()
            lanes.ring.copied_bytes -= streamed_bytes
        return CapturedStep(own, graph, jobs, streamed_bytes)


def _structure(step: Step) -> Structure:
    """What decides which calls a step makes: its rows, whether some are drafts, and which segments there are."""
    parts = (part for pool in step.pools for part in pool.parts)
    return (
        step.rows,
        step.has_drafts,
        tuple((part.host is None, part.recent is None, part.spilled is None) for part in parts),
    )
