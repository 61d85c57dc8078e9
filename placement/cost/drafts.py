"""What drafts are worth: a pass that also computes several guesses of what comes next, beside passes of one row.

A pass of w rows of one sequence emits E(w) tokens (placement.plan.drafting). It takes T(w), and its w - 1 guesses take
the drafter one step each and one more, for the token that the large model chose itself. A share c of the passes has
guesses:

    tokens/s = (c E(w) + 1 - c) / (c (T(w) + D(w)) + (1 - c) T(1))
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from placement.cost.model import predict
from placement.machine.hardware import HardwareProfile
from placement.plan.drafting import Guesses, expected_tokens
from placement.plan.plan import Plan

WORTH = 1.03  # of the rate of one row; what gains less is not worth a drafter


@dataclass(frozen=True, slots=True)
class WidthRate:
    """A width of passes: seconds of the pass and of its drafts, tokens that it emits, and the tokens a second where
    passes without drafts are mixed in."""

    rows: int
    pass_s: float
    drafts_s: float
    tokens: float
    tokens_per_s: float


@dataclass(frozen=True, slots=True)
class DraftRates:
    """What each width of passes gives, one row without drafts first."""

    guesses: Guesses
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
            more = wider.tokens - best.tokens
            said += f"; {wider.rows} rows take {1e3 * more_s:.2f} ms more for {more:.2f} tokens more"
        heading = "rows    pass ms  drafts ms  tokens a pass   tokens/s    gain"
        return [heading, *rows, said]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "acceptance": self.guesses.acceptance,
            "drafted_share": self.guesses.share,
            "is_measured": self.guesses.is_measured,
            "best_rows": self.best.rows,
            "widths": [asdict(width) for width in self.widths],
        }


def pass_s(plan: Plan, hardware: HardwareProfile, rows: int, context: int | None = None) -> float:
    """Predicted seconds of a pass of so many rows of one sequence, at half of the longest context if none is given."""
    context = context or max(1, plan.max_context // 2)
    on_gpu = plan.device != "cpu"
    arguments = (plan.workload, plan.linears, plan.kv, hardware)
    return predict(*arguments, phase="decode", rows=1, context=context, on_gpu=on_gpu, drafts=rows - 1).seconds


def draft_rates(
    plan: Plan, hardware: HardwareProfile, step_s: float, guesses: Guesses, widths: Sequence[int]
) -> DraftRates:
    """What passes of these widths give, and passes of one row. step_s: of the drafter, 0 for one that needs no pass."""
    plain_s, share = pass_s(plan, hardware, 1), guesses.share
    rates = [WidthRate(1, plain_s, 0.0, 1.0, 1.0 / plain_s)]
    for rows in widths:
        verify_s, drafts_s = pass_s(plan, hardware, rows), rows * step_s
        mean_s = share * (verify_s + drafts_s) + (1.0 - share) * plain_s
        tokens = expected_tokens(guesses.acceptance, rows)
        rates.append(WidthRate(rows, verify_s, drafts_s, tokens, guesses.tokens(rows) / mean_s))
    return DraftRates(guesses, tuple(rates))
