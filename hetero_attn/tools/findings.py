"""What `doctor` found: facts of a machine, each with a verdict, and their report for people and for machines."""

import io
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

GIB = 2**30
Verdict = Literal["ok", "note", "problem"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One fact about the machine; `advice` says what to do where the verdict is not ok."""

    section: str
    name: str
    value: str
    verdict: Verdict = "ok"
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """All findings, in the order of their sections."""

    findings: tuple[Finding, ...]

    @property
    def usable(self) -> bool:
        """Whether nothing was found that stops hetero_attn from running."""
        return all(finding.verdict != "problem" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, by section."""
        sections: dict[str, dict[str, Any]] = {}
        for item in self.findings:
            entry = {"value": item.value, "verdict": item.verdict, "advice": item.advice}
            sections.setdefault(item.section, {})[item.name] = entry
        return {"usable": self.usable, "sections": sections}

    def table(self, width: int = 120) -> str:
        """Plain text of at most `width` columns: the facts, then one line for each thing to do."""
        console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False)
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
        section = ""
        for item in self.findings:
            table.add_row("" if item.section == section else item.section, item.name, item.value)
            section = item.section
        console.print(table, highlight=False, markup=False)
        console.print(self._verdict(), highlight=False, markup=False)
        for item in self.findings:
            if item.verdict != "ok":
                console.print(f"{item.verdict}: {item.name}: {item.advice}", highlight=False, markup=False)
        return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()) + "\n"

    def _verdict(self) -> str:
        problems = sum(item.verdict == "problem" for item in self.findings)
        return "verdict: ready" if self.usable else f"verdict: not ready, {problems} problem(s)"


def gib(count: float) -> str:
    """Bytes in GiB for a table."""
    return f"{count / GIB:.1f} GiB"
