"""A hardware profile as a table a person can read: rates with units, GPU rows only where there is a GPU."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from placement.hardware import HardwareProfile

DTYPES = ("fp32", "bf16", "q8", "q4")


def profile_table(profile: HardwareProfile, width: int) -> str:
    """Render a profile as plain text of at most `width` columns."""
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), title=f"{profile.name} ({profile.source})",
                  title_justify="left")
    table.add_column("what")
    table.add_column("rate", justify="right")
    for what, rate in (*host_rows(profile), *(gpu_rows(profile) if profile.has_gpu else ())):
        table.add_row(what, rate)
    console.print(table)
    if not profile.has_gpu:
        console.print("no GPU was found: the plan uses the CPU lane only", highlight=False)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()) + "\n"


def host_rows(profile: HardwareProfile) -> Iterator[tuple[str, str]]:
    """Cores, DRAM and the CPU lane."""
    yield "CPU lane threads", str(profile.cores)
    yield "DRAM size", f"{profile.dram_bytes / 2**30:.1f} GiB"
    yield "DRAM read", _gigabytes(profile.dram_bytes_per_s)
    for dtype in DTYPES:
        yield f"CPU linear {dtype}, few rows", _gigabytes(profile.cpu_linear_bytes_per_s.of(dtype))
    for dtype in DTYPES:
        yield f"CPU linear {dtype}, many rows", _gigaops(profile.cpu_ops_per_s.of(dtype))
    yield "CPU attention, one row", _gigabytes(profile.cpu_attention_bytes_per_s)
    yield "CPU attention, many rows", _gigaops(profile.cpu_attention_ops_per_s)


def gpu_rows(profile: HardwareProfile) -> Iterator[tuple[str, str]]:
    """GPU memory, the bus and what happens when both sides work."""
    yield "GPU memory", f"{profile.gpu_memory_bytes / 2**30:.1f} GiB"
    yield "GPU memory read", _gigabytes(profile.gpu_bytes_per_s)
    for dtype in DTYPES:
        yield f"GPU linear {dtype}, many rows", _gigaops(profile.gpu_flops.of(dtype))
    yield "copy to the GPU", _gigabytes(profile.h2d_bytes_per_s)
    yield "copy from the GPU", _gigabytes(profile.d2h_bytes_per_s)
    yield "CPU rate while copies run", f"{profile.cpu_slowdown_while_copying:.0%}"
    yield "hand-over GPU to CPU and back", f"{profile.handover_s * 1e6:.0f} us"
    yield "one GPU kernel", f"{profile.launch_overhead_s * 1e6:.1f} us"


def _gigabytes(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:.1f} GB/s"


def _gigaops(ops_per_s: float) -> str:
    return f"{ops_per_s / 1e9:.0f} Gop/s"
