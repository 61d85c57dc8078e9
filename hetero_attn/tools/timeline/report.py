"""A simulated plan as text: speed, how busy each lane was, and the critical path lane by lane."""

import io

from rich.console import Console
from rich.table import Table

from hetero_attn.tools.timeline.recording import LANES
from hetero_attn.tools.timeline.simulate import Timeline
from placement.machine.hardware import HardwareProfile
from placement.plan.plan import Plan

LEAST_SHARE = 0.01  # of a critical path, to have a row of its own


def simulated_table(plan: Plan, hardware: HardwareProfile, timelines: list[Timeline], width: int = 80) -> str:
    """Plain text, at most `width` columns."""
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False, highlight=False)
    console.print(f"simulated, nothing was measured: {plan.model} on {hardware.name}")
    console.print(_speeds(timelines))
    for timeline in timelines:
        console.print(_path(timeline))
    return console.file.getvalue()


def _speeds(timelines: list[Timeline]) -> Table:
    table = Table("test", box=None)
    for heading in ("ms", "tokens/s", *LANES):
        table.add_column(heading, justify="right")
    for timeline in timelines:
        busy = (f"{timeline.busy_s[lane] / timeline.seconds:.0%}" for lane in LANES)
        speed = f"{timeline.tokens / timeline.seconds:.1f}"
        table.add_row(timeline.name, f"{1e3 * timeline.seconds:.2f}", speed, *busy)
    return table


def _path(timeline: Timeline) -> Table:
    table = Table("critical path", "", title=timeline.name, title_justify="left", box=None)
    for heading in ("times", "ms", "share"):
        table.add_column(heading, justify="right")
    rest = timeline.seconds
    for (lane, what), (times, seconds) in timeline.path_s.items():
        if seconds >= LEAST_SHARE * timeline.seconds:
            rest -= seconds
            share = f"{seconds / timeline.seconds:.0%}"
            table.add_row(lane, what, str(times), f"{1e3 * seconds:.2f}", share)
    table.add_row("", "all else, Python around", "", f"{1e3 * rest:.2f}", f"{rest / timeline.seconds:.0%}")
    return table
