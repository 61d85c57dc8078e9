"""What drafts gain on a loaded model, as tables: passes of several rows first, which bound everything below them."""

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from hetero_attn.llm import LLM
from hetero_attn.tools.drafts.passes import PassTime, ceiling, pass_times
from hetero_attn.tools.drafts.runs import TEXTS, TWIN, DraftsRow, acceptance_of, measure
from placement.plan.drafting import Guesses

ACCEPTANCES = (0.6, 0.8, 0.9)  # for which the ceiling is shown
TEXTS_DEPTH = 128  # tokens before the passes that are timed, about as many as before an answer
NOTE = "ceiling: with passes of the best width, drafts that cost nothing, some in every pass\n"


@dataclass(frozen=True, slots=True)
class DraftsReport:
    """A model, its passes by rows, and its answers with drafts and without."""

    model: str
    passes: tuple[PassTime, ...]
    rows: tuple[DraftsRow, ...]

    def table(self, width: int = 120) -> str:
        """Plain text for people."""
        console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False)
        console.print(_passes_table(self.passes))
        most = ", ".join(f"{share:g}: {ceiling(self.passes, share):.2f}" for share in ACCEPTANCES)
        console.print(f"ceiling of the gain by acceptance: {most}\n")
        console.print(_rows_table(self.rows))
        return f"{self.model}\n{console.file.getvalue()}{NOTE}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "model": self.model,
            "passes": [asdict(each) for each in self.passes],
            "ceilings": {f"{share:g}": ceiling(self.passes, share) for share in ACCEPTANCES},
            "rows": [row.to_dict() for row in self.rows],
        }


def found_guesses(rows: Sequence[DraftsRow]) -> dict[str, Guesses]:
    """How good the guesses of n-grams and models were over all texts, by who made them."""
    found = {}
    for wish in dict.fromkeys(row.drafts for row in rows if row.drafts not in ("plain", TWIN)):
        own = [row for row in rows if row.drafts == wish]
        accepted, wrong = sum(row.accepted for row in own), sum(row.wrong for row in own)
        passes = sum((Counter(row.passes) for row in own), Counter[int]())
        if accepted and acceptance_of(wish) is None:
            share = 1.0 - passes[1] / passes.total()
            found[wish] = Guesses(accepted / (accepted + wrong), share, is_measured=True)
    return found


def needed_tokens(tokens: int) -> int:
    """The context that `report` needs, whatever the tokenizer."""
    return max(map(len, TEXTS.values())) + tokens + 1


def report(llm: LLM, wishes: Sequence[str], tokens: int = 96, repetitions: int = 3) -> DraftsReport:
    """Measure a model; arguments of `runs.measure`."""
    times = pass_times(llm.planned, llm.engine, min(TEXTS_DEPTH, llm.plan.max_context // 2), max(5, repetitions))
    rows = [row for text in TEXTS for row in measure(llm, text, wishes, times, tokens, repetitions)]
    return DraftsReport(repr(llm), times, tuple(rows))


def _passes_table(passes: Sequence[PassTime]) -> Table:
    table = Table("rows", box=None)
    for heading in ("ms", "of one row", "CPU ms", "of one row", "by the plan", "error"):
        table.add_column(heading, justify="right")
    one = passes[0]
    for each in passes:
        table.add_row(
            str(each.rows),
            f"{1e3 * each.seconds:.2f}",
            f"{each.seconds / one.seconds:.2f}",
            f"{1e3 * each.cpu_s:.2f}",
            f"{each.cpu_s / one.cpu_s:.2f}",
            f"{1e3 * each.predicted_s:.2f}",
            f"{each.predicted_s / each.seconds - 1:+.0%}",
        )
    return table


def _rows_table(rows: Sequence[DraftsRow]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for heading in ("text", "drafts"):
        table.add_column(heading, no_wrap=True)
    for heading in ("tok/s", "gain", "CPU gain", "ceiling", "right", "planned", "error", "of gain", "same"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row.text,
            row.drafts,
            f"{row.tokens_per_s:.1f}",
            f"{row.gain:.2f}",
            f"{row.cpu_gain:.2f}",
            "-" if row.ceiling is None else f"{row.ceiling:.2f}",
            "-" if row.acceptance is None else f"{row.acceptance:.0%}",
            f"{row.predicted_tokens_per_s:.1f}",
            f"{row.prediction_error:+.0%}",
            f"{row.gain_error:+.0%}",
            "yes" if row.same_tokens else "no",
        )
    return table
