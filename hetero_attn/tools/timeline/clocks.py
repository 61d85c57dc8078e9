"""Run recorded lanes by their durations: when everything happens, what decided it, and whether all of it is in order.

Every lane does its entries one after another. Work begins when the main thread has queued it; an `await` ends when its
key is reached. Copies and work of the CPU lane that reads DRAM go on at a share of their speed while both run. Each
lane carries a vector clock of what has happened before (Lamport 1978; Mattern 1989): two entries of different lanes
that touch the same bytes, one of them writing, must be ordered by queueing, events and flags, however the times fall.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hetero_attn.tools.timeline.recording import COPIES, CPU, LANES, MAIN, Entry, Region

Clock = dict[str, int]


class OrderError(RuntimeError):
    """Lanes wait for each other for ever, or two of them touch the same bytes and nothing orders them."""


@dataclass(slots=True, eq=False)
class Span:
    """An entry as it ran, seconds from the step's beginning. cause: the span that ended when this one could begin."""

    entry: Entry
    start: float
    stop: float
    cause: "Span | None"


@dataclass(slots=True)
class _Lane:
    entries: list[Entry]
    at: int = 0
    left_s: float | None = None
    started: float = 0.0
    clock: Clock = field(default_factory=dict)
    last: Span | None = None
    cause: Span | None = None


class Clocks:
    """One run of a recording. seconds, reads_dram: of an entry. flag_s: until a flag that is written is seen on the
    other side. cpu_share, copy_share: speed of either while both run."""

    def __init__(
        self,
        lanes: dict[str, list[Entry]],
        seconds: Callable[[Entry], float],
        reads_dram: Callable[[Entry], bool],
        flag_s: float,
        cpu_share: float,
        copy_share: float,
    ) -> None:
        self._lanes = {name: _Lane(lanes[name]) for name in LANES}
        self._seconds, self._reads_dram, self._flag_s = seconds, reads_dram, flag_s
        self._shares = {CPU: cpu_share, COPIES: copy_share}
        self._reached: dict[Any, tuple[float, Clock, Span]] = {}
        self._queued: list[tuple[float, Clock, Span | None]] = [(0.0, {}, None)]
        self._touched: dict[int, dict[tuple[Region, str, bool], tuple[int, str]]] = {}
        self.now = 0.0
        self.spans: list[Span] = []

    def run(self) -> list[Span]:
        """All spans of work and of waiting, in the order they end; raises OrderError."""
        while any(lane.at < len(lane.entries) for lane in self._lanes.values()):
            while any(self._advance(name) for name in LANES):
                pass
            self._pass_time()
        return self.spans

    def _advance(self, name: str) -> bool:
        """Let a lane take what it can without time passing; whether it took anything."""
        lane = self._lanes[name]
        if lane.at == len(lane.entries) or lane.left_s is not None:
            return False
        entry = lane.entries[lane.at]
        if entry.issued >= len(self._queued):
            return False
        queued_at, queued_clock, queued_by = self._queued[entry.issued]
        _merge(lane.clock, queued_clock)
        if entry.kind == "await":
            return self._await(name, lane, entry)
        lane.started = self.now
        lane.cause = lane.last
        if queued_by is not None and (lane.last is None or queued_at > lane.last.stop):
            lane.cause = queued_by
        lane.left_s = self._seconds(entry) if entry.kind == "work" else 0.0
        lane.clock[name] = lane.at + 1
        self._check(name, lane, entry)
        if lane.left_s == 0.0:
            self._finish(name, lane)
        return True

    def _await(self, name: str, lane: _Lane, entry: Entry) -> bool:
        if entry.key not in self._reached:
            return False
        reached_at, clock, span = self._reached[entry.key]
        seen_at = reached_at + (self._flag_s if isinstance(entry.key, tuple) and entry.key[0] != "job" else 0.0)
        _merge(lane.clock, clock)
        began = lane.last.stop if lane.last else 0.0
        lane.started, lane.cause = began, span if seen_at > began else lane.last
        lane.left_s = max(0.0, seen_at - self.now)
        if lane.left_s == 0.0:
            self._finish(name, lane)
        return True

    def _finish(self, name: str, lane: _Lane) -> None:
        entry = lane.entries[lane.at]
        span = Span(entry, lane.started, self.now, lane.cause)
        lane.at, lane.left_s, lane.last = lane.at + 1, None, span
        self.spans.append(span)
        if entry.kind == "post":
            self._reached[entry.key] = (self.now, dict(lane.clock), span)
        if name == MAIN:
            self._queued.append((self.now, dict(lane.clock), span))

    def _pass_time(self) -> None:
        """Go on to the next end of work."""
        running = {name: lane for name, lane in self._lanes.items() if lane.left_s is not None}
        if not running:
            waiting = [
                f"{name}: {lane.entries[lane.at].name}"
                for name, lane in self._lanes.items()
                if lane.at < len(lane.entries)
            ]
            if waiting:
                raise OrderError("lanes wait for what nobody will do: " + "; ".join(waiting))
            return
        speeds = dict.fromkeys(running, 1.0)
        if self._slow_each_other(running):
            speeds |= self._shares
        step = min(lane.left_s / speeds[name] for name, lane in running.items())
        self.now += step
        for name, lane in running.items():
            lane.left_s -= step * speeds[name]
            if lane.left_s <= 1e-12:
                self._finish(name, lane)

    def _slow_each_other(self, running: dict[str, _Lane]) -> bool:
        if not {CPU, COPIES} <= set(running):
            return False
        cpu, copy = (running[name].entries[running[name].at] for name in (CPU, COPIES))
        return cpu.kind == copy.kind == "work" and self._reads_dram(cpu)

    def _check(self, name: str, lane: _Lane, entry: Entry) -> None:
        """Raise OrderError for bytes that another lane touched and that nothing orders before this."""
        for regions, writes in ((entry.reads, False), (entry.writes, True)):
            for region in regions:
                touched = self._touched.setdefault(region.storage, {})
                for (other, by, wrote), (number, what) in touched.items():
                    is_conflict = by != name and (writes or wrote) and number > lane.clock.get(by, 0)
                    if is_conflict and region.meets(other):
                        raise OrderError(
                            f"{name}: {entry.name} {'writes' if writes else 'reads'} what {by}: {what} "
                            f"{'wrote' if wrote else 'reads'}, and nothing orders the two"
                        )
                touched[region, name, writes] = (lane.at + 1, entry.name)


def critical_path(spans: list[Span]) -> list[Span]:
    """From the span that ends last back to the first, each the one that the next began with; in the order of time."""
    path: list[Span] = []
    span: Span | None = max(spans, key=lambda each: each.stop, default=None)
    while span is not None:
        path.append(span)
        span = span.cause
    return path[::-1]


def _merge(into: Clock, other: Clock) -> None:
    for lane, number in other.items():
        if into.get(lane, 0) < number:
            into[lane] = number
