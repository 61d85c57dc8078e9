"""What drafts are worth: a pass that also computes several guesses of what comes next, beside passes of one row.

A pass of w rows of one sequence emits E(w) = 1 + a + ... + a^(w-1) tokens where the next guess is right with
probability a (Leviathan et al., arXiv 2211.17192, section 3.1). It takes T(w), and its w - 1 guesses take the drafter
one step each and one more, for the token that the large model chose itself.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from placement.cost.model import predict
from placement.machine.hardware import HardwareProfile
from placement.plan.plan import Plan

WORTH = 1.03  # of the rate of one row; what gains less is not worth a drafter


@dataclass(frozen=True, slots=True)
class WidthRate:
    """A width of passes: seconds of the pass and of its drafts, tokens that it emits, and what follows."""

    rows: int
    pass_s: float
    drafts_s: float
    tokens: float

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second at this width."""
        return self.tokens / (self.pass_s + self.drafts_s)


@dataclass(frozen=True, slots=True)
class DraftRates:
    """What each width of passes gives, one row without drafts first. acceptance: how likely the next draft is right."""

    acceptance: float
    widths: tuple[WidthRate, ...]

    @property
    def best(self) -> WidthRate:
        """The width with the best rate; one row where no other gains enough."""
        best = max(self.widths, key=lambda width: width.tokens_per_s)
        return best if best.tokens_per_s >= WORTH * self.widths[0].tokens_per_s else self.widths[0]

    def lines(self) -> list[str]:
        """The same as lines of text, 80 columns wide at most."""
        plain, best = self.widths[0].tokens_per_s, self.best
        rows = [
            f"{width.rows:4d} {1e3 * width.pass_s:10.2f} {1e3 * width.drafts_s:10.2f} {width.tokens:13.2f} "
            f"{width.tokens_per_s:10.2f} {width.tokens_per_s / plain:7.2f}"
            for width in self.widths
        ]
        said = f"best: {best.rows} rows, {best.tokens_per_s:.2f} tokens/s"
        if best.rows == 1:
            said = f"drafts do not pay: no width gains {WORTH - 1:.0%}"
        elif best is not self.widths[-1]:
            wider = self.widths[self.widths.index(best) + 1]
            more_s = wider.pass_s + wider.drafts_s - best.pass_s - best.drafts_s
            said += (
                f"; {wider.rows} rows take {1e3 * more_s:.2f} ms more for {wider.tokens - best.tokens:.2f} tokens more"
            )
        heading = "rows    pass ms  drafts ms  tokens a pass   tokens/s    gain"
        return [heading, *rows, said]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        widths = [asdict(width) | {"tokens_per_s": width.tokens_per_s} for width in self.widths]
        return {"acceptance": self.acceptance, "best_rows": self.best.rows, "widths": widths}


def expected_tokens(acceptance: float, width: int) -> float:
    """Tokens that a pass of `width` rows emits: its own one and the drafts that are right."""
    return sum(acceptance**exponent for exponent in range(width))


def pass_s(plan: Plan, hardware: HardwareProfile, rows: int, context: int | None = None) -> float:
    """Predicted seconds of a pass of so many rows of one sequence, at half of the longest context if none is given."""
    context = max(1, min(context or plan.max_context // 2, plan.workload.full_tokens // rows))
    on_gpu = plan.device != "cpu"
    arguments = (plan.workload, plan.linears, plan.kv, hardware)
    return predict(*arguments, phase="decode", rows=rows, context=context, on_gpu=on_gpu).seconds


def draft_rates(
    plan: Plan, hardware: HardwareProfile, step_s: float, acceptance: float, widths: Sequence[int]
) -> DraftRates:
    """What passes of these widths give, and passes of one row. step_s: of the drafter, 0 for one that needs no pass."""
    rates = [WidthRate(1, pass_s(plan, hardware, 1), 0.0, 1.0)]
    for rows in widths:
        tokens = expected_tokens(acceptance, rows)
        rates.append(WidthRate(rows, pass_s(plan, hardware, rows), rows * step_s, tokens))
    return DraftRates(acceptance, tuple(rates))
