"""Tables for a terminal of any width: a column without room is left out whole, because half a number is another one."""

import io
from collections.abc import Sequence
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

WIDE_GAP, NARROW_GAP = 2, 1  # blanks between columns
WIDEST_NAME = 24  # a longer one goes on in the next line
MOST_COLUMNS = 1000


class Column(NamedTuple):
    """A column as text. spared: in which turn it is left out where room is short, 0 for never; is_name: its cells are
    words, which may be broken."""

    heading: str
    cells: list[str]
    spared: int = 0
    is_name: bool = False


def fitting_table(columns: Sequence[Column], width: int) -> Table:
    """A table of the columns that have room: first they move together, then they are left out turn by turn, and at last
    names are broken."""
    shown, gap = list(columns), WIDE_GAP
    while not _fits(table := _table(shown, gap), width):
        spare = [column for column in shown if column.spared]
        if gap == WIDE_GAP:
            gap = NARROW_GAP
        elif spare:
            shown.remove(min(spare, key=lambda column: column.spared))
        else:
            break
    return table


def _table(columns: Sequence[Column], gap: int) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0))
    for column in columns:
        if column.is_name:
            table.add_column(column.heading, overflow="fold", max_width=WIDEST_NAME)
        else:
            table.add_column(column.heading, justify="right", no_wrap=True)
    for cells in zip(*(column.cells for column in columns), strict=True):
        table.add_row(*cells)
    return table


def _fits(table: Table, width: int) -> bool:
    return Console(file=io.StringIO(), width=MOST_COLUMNS).measure(table).maximum <= width
