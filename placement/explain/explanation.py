"""What an explanation says: predicted speeds of other plans and machines beside those of a plan, as text and JSON."""

import textwrap
from dataclasses import dataclass
from typing import Any

from placement.cost.objective import MODEL_ERROR
from placement.plan.plan import Plan
from placement.plan.units import digits

SAME = 1e-3  # what the search may miss
SHOWN = 0.005  # a smaller difference is shown as none
LABEL_COLUMNS = 38
LESS_WORDS = "should other programs hold 2 GiB of GPU memory, and DRAM have half its rate (one channel of two)"


@dataclass(frozen=True, slots=True)
class Estimate:
    """Predicted speed of another plan or another machine.

    decode_tokens_per_s, prefill_tokens_per_s: None when it cannot run; note then says why, else what the figures do
    not: what both are worse for, or what a plan that lost is slower at. objective_s: the seconds that its plan was
    chosen by, None for what is no plan of ours.
    """

    label: str
    decode_tokens_per_s: float | None
    prefill_tokens_per_s: float | None
    note: str = ""
    objective_s: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "label": self.label,
            "decode_tokens_per_s": self.decode_tokens_per_s,
            "prefill_tokens_per_s": self.prefill_tokens_per_s,
            "note": self.note,
        }


@dataclass(frozen=True, slots=True)
class Explanation:
    """A plan with its bottleneck sentences, the value of more hardware, and the nearest rejected alternatives."""

    plan: Plan
    bottleneck: str
    gains: tuple[Estimate, ...]
    losses: tuple[Estimate, ...]
    alternatives: tuple[Estimate, ...]
    notes: tuple[str, ...]

    @property
    def within_error(self) -> tuple[Estimate, ...]:
        """Alternatives that the model takes for faster, by less than its own error: the simpler plan was chosen."""
        return tuple(other for other in self.alternatives if self._is_faster(other))

    def _is_faster(self, other: Estimate) -> bool:
        return other.objective_s is not None and other.objective_s < self.plan.predicted.objective_s * (1 - SAME)

    def lines(self) -> list[str]:
        """The explanation as text, one line each, no row of a table wider than 80 columns."""
        lines = [self.bottleneck, *self.notes]
        beaten = [other for other in self.alternatives if not self._is_faster(other)]
        for title, estimates in (
            ("what more hardware would bring, planned again", self.gains),
            (LESS_WORDS, self.losses),
            ("alternatives that were weighed and rejected", beaten),
            (f"faster by less than the model's own error of {MODEL_ERROR:.0%}, so not taken", self.within_error),
        ):
            if estimates:
                lines.append(f"{title} (tokens/s):")
                lines.append(f"  {'':{LABEL_COLUMNS}s}{'decode':>9s} {'':8s}{'prefill':>11s}")
                lines += [line for estimate in estimates for line in self._row(estimate)]
        return lines

    def _row(self, estimate: Estimate) -> list[str]:
        """An estimate as a row of a table; what its label is too long for goes before it."""
        *before, label = textwrap.wrap(estimate.label, LABEL_COLUMNS)
        decode, prefill = estimate.decode_tokens_per_s, estimate.prefill_tokens_per_s
        if decode is None or prefill is None:
            figures = f"  {estimate.note}"
        else:
            planned = self.plan.predicted
            changes = [
                _difference(value / cost.tokens_per_s)
                for value, cost in ((decode, planned.decode), (prefill, planned.prefill))
            ]
            figures = f"{digits(decode):>9s} {changes[0]:8s}{digits(prefill):>11s} {changes[1]}".rstrip()
        rows = [*(f"  {part}" for part in before), f"  {label:{LABEL_COLUMNS}s}{figures}"]
        return rows if decode is None or not estimate.note else [*rows, f"    {estimate.note}"]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: those of the plan, and beside them why."""
        return self.plan.to_dict() | {
            "bottleneck": self.bottleneck,
            "notes": list(self.notes),
            "gains": [gain.to_dict() for gain in self.gains],
            "losses": [loss.to_dict() for loss in self.losses],
            "alternatives": [other.to_dict() for other in self.alternatives],
        }


def _difference(ratio: float) -> str:
    return "(same)" if abs(ratio - 1) < SHOWN else f"({ratio - 1:+.0%})"
