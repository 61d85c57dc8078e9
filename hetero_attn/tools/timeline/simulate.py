"""Steps of a plan on a machine that is not there: how long they take, and which lane decides when."""

import json
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hetero_attn.engine.timed_steps import fill
from hetero_attn.errors import UnsupportedModelError
from hetero_attn.spec.config import ModelConfig
from hetero_attn.tools.timeline.blank_engine import blank_engine
from hetero_attn.tools.timeline.clocks import Clocks, OrderError, Span, critical_path
from hetero_attn.tools.timeline.durations import Durations
from hetero_attn.tools.timeline.recording import COPIES, LANES
from hetero_attn.tools.whole_file import write_whole
from placement.machine.hardware import HardwareProfile
from placement.plan.plan import Plan
from placement.plan.workload import row_tier


@dataclass(frozen=True, slots=True)
class Timeline:
    """What every lane did in one step or prompt. tokens: computed; seconds: all of it, Python around it included."""

    name: str
    tokens: int
    seconds: float
    spans: list[Span]

    @property
    def busy_s(self) -> dict[str, float]:
        """Seconds of work by lane."""
        busy: dict[str, float] = dict.fromkeys(LANES, 0.0)
        for span in self.spans:
            if span.entry.kind == "work":
                busy[span.entry.lane] += span.stop - span.start
        return busy

    @property
    def path(self) -> list[tuple[str, str, float]]:
        """The critical path as (lane, what, seconds): the time from one span's end to the next one's; what does not
        add to it is left out."""
        found, before = [], 0.0
        for span in critical_path(self.spans):
            if span.stop > before:
                found.append((span.entry.lane, span.entry.name, span.stop - before))
                before = span.stop
        return found

    @property
    def path_s(self) -> dict[tuple[str, str], tuple[int, float]]:
        """The critical path summed by lane and kind of operation: how often, and seconds."""
        counts, seconds = Counter[tuple[str, str]](), defaultdict[tuple[str, str], float](float)
        for lane, name, taken in self.path:
            kind = name if name.startswith("wait") else name.partition(" ")[0]
            counts[lane, kind] += 1
            seconds[lane, kind] += taken
        return {key: (counts[key], seconds[key]) for key in sorted(seconds, key=lambda key: -seconds[key])}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        path = [
            {"lane": lane, "what": what, "times": times, "seconds": taken}
            for (lane, what), (times, taken) in self.path_s.items()
        ]
        return {
            "name": self.name,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "tokens_per_s": self.tokens / self.seconds,
            "busy_s": self.busy_s,
            "critical_path": path,
        }


class Simulation:
    """A plan on a machine; every call simulates one step or prompt of one sequence.

    Raises UnsupportedModelError for a model whose sequences have states of fixed size: torch computes what its prompts
    make of them, and a recording holds operations of ours alone.
    """

    def __init__(self, config: ModelConfig, plan: Plan, hardware: HardwareProfile) -> None:
        if plan.workload.states:
            raise UnsupportedModelError(
                f"{config.architecture} is not simulated: prompts of layers with a state of fixed size are computed by "
                "torch, which is not recorded; `plan` predicts its speed"
            )
        self._engine, self.recording = blank_engine(config, plan)
        self._hardware, self._vocab = hardware, config.vocab_size
        self._durations = Durations(hardware, config.heads_per_kv_head, config.head_dim)
        self._plan = plan

    def decode(self, context: int) -> Timeline:
        """A captured step of one token after `context` cached ones."""
        engine, sequence = self._engine, self._engine.kv_cache.open()
        fill(engine, sequence, context)
        for _ in range(2):  # plainly, then captured and replayed
            self.recording.clear()
            engine.decode_step([sequence], [1])
            assert engine.kv_cache.rewind(sequence, context)
        engine.kv_cache.close(sequence)
        self._check_streamed({row_tier(1): 1}, {row_tier(1): 1})
        return self._timeline(f"decode at {context}", 1)

    def prompt(self, tokens: int) -> Timeline:
        """A prompt from its beginning, in the plan's chunks, up to the logits of its last token."""
        engine, sequence = self._engine, self._engine.kv_cache.open()
        self.recording.clear()
        for start in range(0, tokens, engine.prefill_chunk):
            rows = min(engine.prefill_chunk, tokens - start)
            engine.prefill(sequence, [1] * rows, logits=start + rows == tokens)
        engine.kv_cache.close(sequence)
        chunks = Counter(
            row_tier(min(engine.prefill_chunk, tokens - start)) for start in range(0, tokens, engine.prefill_chunk)
        )
        self._check_streamed(chunks, {row_tier(1): 1})
        return self._timeline(f"prompt of {tokens}", tokens)

    def _check_streamed(self, passes: dict[int, int], head_passes: dict[int, int]) -> None:
        """Raise OrderError unless the pieces of every linear were all that the plan streams of it, once a pass."""
        copied = Counter[str]()
        for entry in self.recording.lanes[COPIES]:
            if entry.kind == "work":
                copied[entry.name.partition(" ")[2]] += entry.arguments["nbytes"]
        for shard, placement in zip(self._plan.workload.linears, self._plan.linears, strict=True):
            counts = head_passes if shard.is_head else passes
            planned = sum(times * placement.stream_units[tier] * shard.unit_bytes for tier, times in counts.items())
            if copied[shard.name] != planned:
                raise OrderError(
                    f"{shard.name}: {copied[shard.name]} bytes are streamed in pieces, where the plan streams {planned}"
                )

    def _timeline(self, name: str, tokens: int) -> Timeline:
        hardware, durations = self._hardware, self._durations
        shares = hardware.cpu_slowdown_while_copying, hardware.copy_slowdown_while_computing
        clocks = Clocks(self.recording.lanes, durations.seconds, durations.reads_dram, durations.flag_s, *shares)
        spans = clocks.run()
        around = hardware.step_overhead_s + self._vocab * hardware.logits_s_per_token
        return Timeline(name, tokens, clocks.now + around, spans)


def chrome_trace(timelines: list[Timeline]) -> dict[str, Any]:
    """The trace viewer's JSON, one process a timeline, every lane a named thread, times in microseconds."""
    events: list[dict[str, Any]] = []
    for process, timeline in enumerate(timelines):
        events.append({"ph": "M", "name": "process_name", "pid": process, "args": {"name": timeline.name}})
        for thread, lane in enumerate(LANES):
            about = {"ph": "M", "name": "thread_name", "pid": process, "tid": thread, "args": {"name": lane}}
            events.append(about)
        for span in timeline.spans:
            if span.stop > span.start:
                times = {"ts": 1e6 * span.start, "dur": 1e6 * (span.stop - span.start)}
                thread = LANES.index(span.entry.lane)
                events.append({"ph": "X", "name": span.entry.name, "pid": process, "tid": thread} | times)
    return {"traceEvents": events}


def save_trace(timelines: list[Timeline], path: Path) -> None:
    """Write the timelines for chrome://tracing or Perfetto."""
    write_whole(path, json.dumps(chrome_trace(timelines)))
