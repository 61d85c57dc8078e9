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
from placement.plan.columns import Column, fitting_table
from placement.plan.drafting import Guesses
from placement.plan.words import wrapped

ACCEPTANCES = (0.6, 0.8, 0.9)  # for which the ceiling is shown
TEXTS_DEPTH = 128  # tokens before the passes that are timed, about as many as before an answer
NOTE = "ceiling: with passes of the best width, drafts that cost nothing, some in every pass"


@dataclass(frozen=True, slots=True)
class DraftsReport:
    """A model, its passes by rows, and its answers with drafts and without."""

    model: str
    passes: tuple[PassTime, ...]
    rows: tuple[DraftsRow, ...]

    def table(self, width: int = 120) -> str:
        """Plain text for people; a table has the columns that have room, `to_dict` all."""
        console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False)
        console.print(_passes_table(self.passes))
        most = ", ".join(f"{share:g}: {ceiling(self.passes, share):.2f}" for share in ACCEPTANCES)
        console.print(f"ceiling of the gain by acceptance: {most}\n")
        console.print(fitting_table(_rows_columns(self.rows), width))
        return f"{wrapped(self.model, width)}\n{console.file.getvalue()}{wrapped(NOTE, width)}\n"

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


def _rows_columns(rows: Sequence[DraftsRow]) -> list[Column]:
    """What others tell, as tokens a second by the plan, is left out first."""
    ceilings = ["-" if row.ceiling is None else f"{row.ceiling:.2f}" for row in rows]
    right = ["-" if row.acceptance is None else f"{row.acceptance:.0%}" for row in rows]
    return [
        Column("text", [row.text for row in rows], is_name=True),
        Column("drafts", [row.drafts.rstrip("/").rpartition("/")[2] for row in rows], is_name=True),
        Column("tok/s", [f"{row.tokens_per_s:.1f}" for row in rows]),
        Column("gain", [f"{row.gain:.2f}" for row in rows]),
        Column("CPU gain", [f"{row.cpu_gain:.2f}" for row in rows], spared=2),
        Column("ceiling", ceilings),
        Column("right", right),
        Column("planned", [f"{row.predicted_tokens_per_s:.1f}" for row in rows], spared=1),
        Column("error", [f"{row.prediction_error:+.0%}" for row in rows], spared=3),
        Column("of gain", [f"{row.gain_error:+.0%}" for row in rows], spared=4),
        Column("same", ["yes" if row.same_tokens else "no" for row in rows]),
    ]
