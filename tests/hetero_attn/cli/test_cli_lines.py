"""What commands say beside their results is broken at words in a terminal of 80 columns, and whole in a log."""

import io
import sys

import pytest

from hetero_attn.cli import in_lines
from hetero_attn.cli.output import remark, speed_line
from hetero_attn.serving.request import Metrics
from tests.support.processes.command import run

METRICS = Metrics(prompt_tokens=512, generated_tokens=128, prefill_s=0.5, decode_s=2.0, time_to_first_token_s=0.51)


class Terminal(io.StringIO):
    """A stream that says it is one."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [Terminal, io.StringIO], ids=["terminal", "log"])
def test_a_remark_is_as_wide_as_the_terminal_at_most(
    monkeypatch: pytest.MonkeyPatch, stream: type[io.StringIO]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "stderr", stream())
    remark(speed_line(METRICS))
    said = sys.stderr.getvalue()  # type: ignore[attr-defined]

    assert " ".join(said.split()) == speed_line(METRICS), "nothing is lost"
    assert len(said.splitlines()) == (2 if stream is Terminal else 1)
    assert stream is not Terminal or max(map(len, said.splitlines())) <= 80


def test_help_breaks_its_lines_where_the_terminal_ends_not_where_the_docstring_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows of `profile` and `serve` broke in their middle."""
    monkeypatch.setenv("COLUMNS", "80")
    shown = " ".join(run("--help").stdout.replace("│", " ").split("\n"))

    assert in_lines("One line\n    goes on.\n\n    Another.") == "One line goes on.\n\nAnother."
    assert "takes a quarter of a minute on two cores, the  " in shown, "the line ends with the terminal's"
