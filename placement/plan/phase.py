"""The predicted cost of a phase: its time, and which resource decides it."""

from dataclasses import dataclass
from math import inf
from typing import Any

RESOURCES = ("steps", "cpu", "pcie", "dram", "gpu")
TERMS = (
    "cpu_linears",
    "gpu_linears",
    "copies",
    "cpu_attention",
    "gpu_attention",
    "handovers",
    "small_ops",
    "step",
)
TERM_WORDS = {
    "cpu_linears": "linears on the CPU",
    "gpu_linears": "linears on the GPU",
    "copies": "weights over PCIe",
    "cpu_attention": "attention on the CPU",
    "gpu_attention": "attention on the GPU",
    "handovers": "hand-overs",
    "small_ops": "small operations",
    "step": "once per step",
}
RESOURCE_WORDS = {
    "steps": "hand-overs and lanes that wait for each other",
    "cpu": "the CPU lane",
    "pcie": "PCIe",
    "dram": "DRAM bandwidth",
    "gpu": "the GPU",
    "python": "Python around each step",
}


@dataclass(frozen=True, slots=True)
class PhaseCost:
    """Predicted cost of a phase.

    phase: decode | prefill; rows: sequences of a decode step or tokens of a prompt; context: tokens cached before;
    seconds: of the step or of the whole prompt; lanes: seconds each resource needs when nothing waits. terms: seconds
    of each kind of work by itself (one of TERMS); lanes work side by side, so they sum to more than `seconds`.
    overlapped_s: seconds if lanes overlapped in full, at most `seconds`; 0 is unknown. batch_steps: how many
    steps a batch of copies into expert slots takes on the bus, beside what else is there, in the mean.
    """

    phase: str
    rows: int
    context: int
    seconds: float
    lanes: tuple[tuple[str, float], ...]
    terms: tuple[tuple[str, float], ...] = ()
    overlapped_s: float = 0.0
    batch_steps: float = 1

    @property
    def most_tokens_per_s(self) -> float:
        """Rows per second if all that can run side by side did: the upper end of what is predicted."""
        return self.rows / self.overlapped_s if self.overlapped_s > 0 else self.tokens_per_s

    @property
    def tokens_per_s(self) -> float:
        """Rows per second."""
        return self.rows / self.seconds if self.seconds > 0 else inf

    @property
    def busiest_s(self) -> float:
        """Seconds of the resource that has most to do, were nothing ever to wait: no step of this plan is shorter."""
        return max(seconds for name, seconds in self.lanes if name != "steps")

    @property
    def binding(self) -> str:
        """The resource that decides the time: the one that needs longest by itself, `steps` when waiting decides, or
        `python` when most of the time passes between the steps."""
        lanes, step_s = dict(self.lanes), dict(self.terms).get("step", 0.0)
        if step_s > 0.5 * self.seconds:
            return "python"
        alone = max((name for name in lanes if name != "steps"), key=lambda name: lanes[name])
        if lanes[alone] >= 0.9 * (self.seconds - step_s):
            return alone
        return max(alone, "steps", key=lambda name: lanes[name])

    @property
    def slack(self) -> dict[str, float]:
        """Share of the time for which each resource is idle, 0 to 1."""
        return {
            name: max(0.0, 1.0 - seconds / self.seconds) if self.seconds > 0 else 1.0
            for name, seconds in self.lanes
            if name != "steps"
        }

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return {
            "phase": self.phase,
            "rows": self.rows,
            "context": self.context,
            "seconds": self.seconds,
            "tokens_per_s": self.tokens_per_s,
            "most_tokens_per_s": self.most_tokens_per_s,
            "binding": self.binding,
            "slack": self.slack,
            "lanes_s": dict(self.lanes),
            "terms_s": dict(self.terms),
        }


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the cost model expects of a plan on a machine.

    decode, prefill: at the planner's reference context and prompt; decode_by_context: the same step at growing
    contexts. objective_s: the seconds that the planner minimised.
    """

    hardware: str
    objective: str
    objective_s: float
    decode: PhaseCost
    prefill: PhaseCost
    decode_by_context: tuple[PhaseCost, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "hardware": self.hardware,
            "objective": self.objective,
            "objective_s": self.objective_s,
            "decode": self.decode.to_dict(),
            "prefill": self.prefill.to_dict(),
            "decode_by_context": [cost.to_dict() for cost in self.decode_by_context],
        }
