"""Where the time of a loaded model's steps went: wall time by phase, how busy the CPU lane was, what was streamed."""

import io
import time
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, field, fields
from operator import add, sub

from hetero_attn.lanes.lanes import Lanes
from placement.plan.workload import row_tier

PHASES = ("prefill", "decode")


@dataclass(slots=True)
class PhaseTimes:
    """Totals of one phase. wall_s: of its steps; cpu_lane_s: CPU kernels at work; waited_s: for the CPU lane to finish.
    handover_s: waking the worker and noticing its end.

    tokens: rows computed; streamed_bytes: weights, and older keys and values, copied to the GPU ahead of use.
    """

    steps: int = 0
    tokens: int = 0
    wall_s: float = 0.0
    cpu_lane_s: float = 0.0
    waited_s: float = 0.0
    handover_s: float = 0.0
    streamed_bytes: float = 0

    def add(self, tokens: int, spent: Sequence[float]) -> None:
        """Count one step; spent: wall_s and what follows it, in that order."""
        wall_s, cpu_lane_s, waited_s, handover_s, streamed_bytes = spent
        self.steps += 1
        self.tokens += tokens
        self.wall_s += wall_s
        self.cpu_lane_s += cpu_lane_s
        self.waited_s += waited_s
        self.handover_s += handover_s
        self.streamed_bytes += streamed_bytes

    def since(self, earlier: "PhaseTimes") -> "PhaseTimes":
        """What came after `earlier` was copied from these totals."""
        return PhaseTimes(*(getattr(self, entry.name) - getattr(earlier, entry.name) for entry in fields(self)))


@dataclass(slots=True)
class DraftCounts:
    """Speculative decoding: passes of requests with drafts (one step of four requests is four), drafts, right drafts.

    wrong: passes that ended at a wrong draft. by_count: passes by how many drafts each had. reason: what was decided
    last, and why; empty where nobody asked for drafts. decisions: how often each was taken, by a few words.
    """

    passes: int = 0
    drafted: int = 0
    accepted: int = 0
    wrong: int = 0
    by_count: dict[int, int] = field(default_factory=dict)
    reason: str = ""
    decisions: dict[str, int] = field(default_factory=dict)

    @property
    def acceptance(self) -> float | None:
        """How likely a draft was right, given that those before it were; None before any was judged."""
        judged = self.accepted + self.wrong
        return self.accepted / judged if judged else None

    def judge(self, drafted: int, accepted: int) -> None:
        """Count one request's share of a pass."""
        self.passes += 1
        self.drafted += drafted
        self.accepted += accepted
        self.wrong += accepted < drafted
        self.by_count[drafted] = self.by_count.get(drafted, 0) + 1

    def line(self) -> str:
        """For people, in one line."""
        share = f" ({self.accepted / self.drafted:.0%})" if self.drafted else ""
        passes = f"{self.passes} passes of requests"
        return f"drafts: {self.accepted} of {self.drafted} right{share} in {passes}; now {self.reason}"


@dataclass(slots=True)
class ExpertCounts:
    """Experts over all layers with expert slots and the last rows of all steps: picks, those of experts in slots, and
    copies of experts into slots."""

    steps: int = 0
    picks: int = 0
    hits: int = 0
    inserts: int = 0

    @property
    def hit_rate(self) -> float:
        """The share of the picks in expert slots."""
        return self.hits / max(1, self.picks)

    def line(self) -> str:
        """For people, in one line."""
        return (
            f"experts: {self.hit_rate:.0%} of the picks in expert slots, {self.inserts / self.steps:.1f} copied a step"
        )


@dataclass(slots=True)
class StreamedExpertCounts:
    """Passes that streamed experts by heat, those that were waited for, over their layers: picks, those of streamed
    experts; experts that were streamed, and all in DRAM."""

    picks: int = 0
    streamed_picks: int = 0
    streamed: int = 0
    in_dram: int = 0

    @property
    def served(self) -> float:
        """The share of the picks that streamed experts served."""
        return self.streamed_picks / max(1, self.picks)

    def line(self) -> str:
        """For people, in one line."""
        share = self.streamed / max(1, self.in_dram)
        return f"experts of prompts: {share:.0%} of those in DRAM streamed by heat, for {self.served:.0%} of the picks"


@dataclass(slots=True)
class LaneReport:
    """Totals since a model was loaded, or since `reset`.

    tiers: by row tier, since the model was loaded. experts: of expert slots. streamed_experts: by heat. drafts: of
    speculative decoding; rows of drafts that were wrong count in no phase's tokens. forced_tokens: of answers, which a
    grammar left no choice for and which shared a pass with the one before.
    """

    phases: dict[str, PhaseTimes] = field(default_factory=lambda: {phase: PhaseTimes() for phase in PHASES})
    tiers: dict[int, PhaseTimes] = field(default_factory=dict)
    drafts: DraftCounts = field(default_factory=DraftCounts)
    experts: ExpertCounts = field(default_factory=ExpertCounts)
    streamed_experts: StreamedExpertCounts = field(default_factory=StreamedExpertCounts)
    forced_tokens: int = 0

    def count(self, tokens: dict[str, int], rows: int, before: tuple[float, ...], after: tuple[float, ...]) -> None:
        """Count one step of `rows` rows that has ended; before, after: `counters` around it.

        tokens: rows by phase. Phases that share a step share its time by their rows.
        """
        spent, counted = tuple(map(sub, after, before)), 0
        for phase, count in tokens.items():
            if count:
                counted += count
                self.phases[phase].add(count, spent if count == rows else [value * count / rows for value in spent])
        if counted:
            tier = row_tier(rows)
            if tier not in self.tiers:
                self.tiers[tier] = PhaseTimes()
            self.tiers[tier].add(rows, spent)

    def judged(self, drafted: int, accepted: int) -> None:
        """Count a request's drafts of one pass, already counted as rows, and those of them that were right."""
        self.drafts.judge(drafted, accepted)
        self.phases["decode"].tokens -= drafted - accepted

    def forced(self, drafted: int, accepted: int) -> None:
        """Count tokens that a grammar forced, already counted as rows, and those of them that were drawn."""
        self.forced_tokens += accepted
        self.phases["decode"].tokens -= drafted - accepted

    def routed(self, picks: int, hits: int, inserts: int) -> None:
        """Count what one step chose, where there are expert slots."""
        if picks:
            counts = self.experts
            self.experts = ExpertCounts(
                counts.steps + 1, counts.picks + picks, counts.hits + hits, counts.inserts + inserts
            )

    def streamed(self, counted: Sequence[int]) -> None:
        """Count what one pass streamed by heat; counted: as the fields of `StreamedExpertCounts`."""
        counts = self.streamed_experts
        self.streamed_experts = StreamedExpertCounts(*map(add, astuple(counts), counted))

    def expert_picks(self) -> dict[str, tuple[str, dict[str, int]]]:
        """Picks of experts by whether a copy in GPU memory served them, by what counts them: expert slots, and what
        prompts stream by heat; only what there is."""
        slots, streamed = self.experts, self.streamed_experts
        found = {
            "hetero_expert_slot_picks": (slots.picks, slots.hits),
            "hetero_streamed_expert_picks": (streamed.picks, streamed.streamed_picks),
        }
        return {
            name: ("served", {"yes": served, "no": picks - served}) for name, (picks, served) in found.items() if picks
        }

    def decided(self, reason: str, decision: str) -> None:
        """Keep why the next pass has as many drafts as it has; decision: the same as one of few words, to count."""
        drafts = self.drafts
        drafts.reason, drafts.decisions[decision] = reason, drafts.decisions.get(decision, 0) + 1

    def reset(self) -> None:
        """Forget everything counted so far, except what `tiers` holds for rebalancing."""
        self.phases = {phase: PhaseTimes() for phase in PHASES}
        self.drafts = DraftCounts(reason=self.drafts.reason)
        self.experts, self.streamed_experts = ExpertCounts(), StreamedExpertCounts()
        self.forced_tokens = 0

    def forget(self) -> None:
        """Forget everything, as if nothing had run."""
        self.reset()
        self.tiers = {}

    def to_dict(self) -> dict[str, dict[str, float]]:
        """Plain values for JSON."""
        return {phase: asdict(times) for phase, times in self.phases.items()}

    def table(self, width: int = 120) -> str:
        """Plain text for people."""
        from rich.console import Console
        from rich.table import Table

        table = Table("phase", box=None)
        for heading in (
            "steps",
            "tokens",
            "tokens/s",
            "ms/step",
            "CPU lane busy",
            "waiting for it",
            "hand-overs",
            "streamed GB/s",
        ):
            table.add_column(heading, justify="right")
        for phase, times in self.phases.items():
            if times.steps:
                table.add_row(phase, *_cells(times))
        console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False)
        console.print(table)
        lines = (
            self.drafts.line() if self.drafts.reason else "",
            self.experts.line() if self.experts.steps else "",
            self.streamed_experts.line() if self.streamed_experts.picks else "",
        )
        return console.file.getvalue() + "".join(f"{line}\n" for line in lines if line)


def counters(lanes: Lanes) -> tuple[float, ...]:
    """wall_s of `PhaseTimes` and what follows it, in that order."""
    return time.perf_counter(), lanes.cpu_lane_s, lanes.waited_s, lanes.handover_s, lanes.streamed_bytes


def _cells(times: PhaseTimes) -> tuple[str, ...]:
    return (
        str(times.steps),
        str(times.tokens),
        f"{times.tokens / times.wall_s:.1f}",
        f"{1e3 * times.wall_s / times.steps:.2f}",
        f"{times.cpu_lane_s / times.wall_s:.0%}",
        f"{times.waited_s / times.wall_s:.0%}",
        f"{times.handover_s / times.wall_s:.0%}",
        f"{times.streamed_bytes / times.wall_s / 1e9:.2f}",
    )
