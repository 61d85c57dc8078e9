"""What people are told: text of a given width, broken at words and never between a number and its unit; and of which
plans a speed."""

import re
import textwrap

from placement.plan.phase import Prediction

BOUND = "\u00a0"  # a blank at which no line is broken
NUMBER_AND_UNIT = re.compile(r"(?<=\d) (?=([KMGT]?i?B|tokens|tok|us|ms|s)\b)|(?<=\d:) (?=\d)")


def wrapped(line: str, width: int) -> str:
    """A line broken at words where it is longer than `width`, its own indent kept and deepened; no number is cut, nor
    parted from its unit."""
    if len(line) <= width:
        return line
    indent = " " * (len(line) - len(line.lstrip()) + 4)
    text = textwrap.fill(
        NUMBER_AND_UNIT.sub(BOUND, re.sub(r"(?<=\S) {2,}", "  ", line)),
        width,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return text.replace(BOUND, " ")


def cpu_threads(count: int) -> str:
    """A number of threads of the CPU lane, in words."""
    return f"{count} CPU thread{'' if count == 1 else 's'}"


def expected(predicted: Prediction | None, device: str) -> Prediction | None:
    """What is predicted of a plan for a device, to be told to people: nothing of an emulated GPU, whose rates are
    invented."""
    return None if device == "emulated" else predicted
