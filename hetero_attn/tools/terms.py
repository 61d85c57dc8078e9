"""Predicted and measured seconds of each kind of work in a step, so that a wrong prediction says where it is wrong."""

from collections.abc import Mapping
from dataclasses import dataclass

from placement.plan.phase import TERM_WORDS, PhaseCost

# Terms below this share of the time are shown, but their error says nothing.
SMALL_SHARE = 0.02


@dataclass(frozen=True, slots=True)
class Term:
    """Seconds of one kind of work in one step or prompt, by itself; the lanes' terms overlap. measured_s: None where
    the runtime cannot tell it apart."""

    name: str
    predicted_s: float
    measured_s: float | None
    share: float

    @property
    def error(self) -> float | None:
        """(predicted - measured) / measured; None where nothing was measured."""
        return self.predicted_s / self.measured_s - 1 if self.measured_s else None

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return {
            "name": self.name,
            "predicted_s": self.predicted_s,
            "measured_s": self.measured_s,
            "error": self.error,
            "share": self.share,
        }


def compare_terms(
    cost: PhaseCost, measured: Mapping[str, float], seconds: float, handover_s: float, on_cpu: bool
) -> tuple[Term, ...]:
    """Put the measured seconds of each kind of work beside a prediction of the same pass.

    seconds: of the whole pass, measured as it runs; handover_s: of these, waiting for hand-overs as the lanes report
    it.
    """
    found: dict[str, float | None] = {name: measured.get(name, 0.0) for name, _ in cost.terms}
    found["handovers"] += handover_s
    # Alone, the CPU's terms follow one another and what is left is Python; beside a GPU the lanes hide part of it.
    found["step"] = max(0.0, seconds - sum(found.values())) if on_cpu else None
    return tuple(
        Term(name, predicted, found[name], (found[name] or predicted) / seconds)
        for name, predicted in cost.terms
        if predicted or found[name]
    )


def term_lines(label: str, terms: tuple[Term, ...]) -> list[str]:
    """A heading and one line a term: predicted and measured milliseconds, the error and the share of the time."""
    lines = [
        f"{label}: work by kind, ms (lanes work side by side, so these need not add up)",
        f"  {'':22s}{'predicted':>12s}{'measured':>12s}{'error':>8s}{'of time':>9s}",
    ]
    for term in terms:
        measured = "-" if term.measured_s is None else f"{1e3 * term.measured_s:.3f}"
        error = "-" if term.error is None or term.share < SMALL_SHARE else f"{term.error:+.0%}"
        lines.append(
            f"  {TERM_WORDS[term.name]:22s}{1e3 * term.predicted_s:12.3f}{measured:>12s}{error:>8s}{term.share:9.0%}"
        )
    return lines
