"""What commands say beside their results is broken at words in a terminal of 80 columns."""

import pytest

from hetero_attn.cli import in_lines
from tests.support.command import run


def test_help_breaks_its_lines_where_the_terminal_ends_not_where_the_docstring_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows of `profile` and `serve` broke in their middle."""
    monkeypatch.setenv("COLUMNS", "80")
    shown = " ".join(run("--help").stdout.replace("│", " ").split("\n"))

    assert in_lines("One line\n    goes on.\n\n    Another.") == "One line goes on.\n\nAnother."
    assert "takes a quarter of a minute on two cores, the  " in shown, "the line ends with the terminal's"
