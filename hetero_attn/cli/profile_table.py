"""A hardware profile as a table a person can read: rates with units, GPU rows only where there is a GPU."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from placement.machine.hardware import HardwareProfile
    from placement.machine.rates import RowRate


def profile_table(profile: HardwareProfile, width: int) -> str:
    """Render a profile as plain text of at most `width` columns."""
    formats = tuple(profile.cpu_linear_bytes_per_s.by_format)
    tables = [_table(f"{profile.name} ({profile.source})", ("what", "rate"), host_rows(profile))]
    if profile.thread_sweep:
        tables.append(_table("CPU threads", ("threads", "q4 linear", "plain read", ""), thread_rows(profile)))
    if profile.cpu_rows:
        tables.append(
            _table("CPU linears by token rows, Gop/s", ("rows", *formats), row_rows(profile.cpu_rows, formats))
        )
    if profile.cpu_attention:
        headings = ("cache", "heads/group", "head size", "one row", "many rows")
        tables.append(_table("CPU attention", headings, attention_rows(profile)))
    if profile.has_gpu:
        tables.append(_table("GPU and bus", ("what", "rate"), gpu_rows(profile)))
    if profile.gpu_rows:
        tables.append(
            _table("GPU linears by token rows, Gop/s", ("rows", *formats), row_rows(profile.gpu_rows, formats))
        )
    if profile.copies:
        headings = ("size", "to GPU pinned", "from GPU pinned", "to GPU pageable", "from GPU pageable")
        tables.append(_table("copies over the bus", headings, copy_rows(profile)))
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False)
    for table in tables:
        console.print(table)
    for line in stand_in_lines(profile):
        console.print(line, highlight=False)
    if not profile.has_gpu:
        console.print("no GPU was found: the plan uses the CPU lane only", highlight=False)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()) + "\n"


def stand_in_lines(profile: HardwareProfile) -> Iterator[str]:
    """By whose rates the formats are planned that were not measured, a line for each that was."""
    from cpu_kernels.formats import FORMATS

    by_measured: dict[str, list[str]] = {}
    for name, measured in profile.cpu_linear_bytes_per_s.borrowed(FORMATS).items():
        by_measured.setdefault(measured, []).append(name)
    for measured, names in by_measured.items():
        yield f"planned by the rates of {measured}: {', '.join(names)}"


def _table(title: str, headings: Sequence[str], rows: Iterator[Sequence[str]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), title=title, title_justify="left")
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    return table


def host_rows(profile: HardwareProfile) -> Iterator[tuple[str, str]]:
    """Cores, DRAM, the CPU lane and Python."""
    yield "CPU lane threads", str(profile.cores)
    yield "DRAM size", f"{profile.dram_bytes / 2**30:.1f} GiB"
    yield "DRAM read", _gigabytes(profile.dram_bytes_per_s)
    for name, rate in profile.cpu_linear_bytes_per_s.by_format.items():
        yield f"CPU linear {name}, one row", _gigabytes(rate)
    if profile.cpu_cache_bytes:
        yield "last-level cache", f"{profile.cpu_cache_bytes / 2**20:.0f} MiB"
        yield "CPU linear q4 in the cache", _gigabytes(profile.cpu_cached_bytes_per_s.q4)
    for name, rate in profile.cpu_ops_per_s.by_format.items():
        yield f"CPU linear {name}, many rows", _gigaops(rate)
    yield "CPU attention, one row", _gigabytes(profile.cpu_attention_bytes_per_s)
    yield "CPU attention, many rows", _gigaops(profile.cpu_attention_ops_per_s)
    if profile.busy_share:
        yield "CPUs used by others meanwhile", f"{profile.busy_share:.0%}"
    if profile.step_overhead_s:
        yield "Python around a step", f"{profile.step_overhead_s * 1e6:.0f} us"


def thread_rows(profile: HardwareProfile) -> Iterator[tuple[str, ...]]:
    """The sweep, the count in use marked."""
    for rate in profile.thread_sweep:
        used = "used" if rate.threads == profile.cores else ""
        yield str(rate.threads), _gigabytes(rate.linear_bytes_per_s), _gigabytes(rate.sweep_bytes_per_s), used


def row_rows(rates: Sequence[RowRate], formats: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Operations a second by token rows and weight format."""
    for rate in rates:
        yield str(rate.rows), *(f"{rate.ops_per_s.of(name) / 1e9:.0f}" for name in formats)


def attention_rows(profile: HardwareProfile) -> Iterator[tuple[str, ...]]:
    """By cache dtype, head sharing and head size."""
    from placement.machine.rates import KV_BITS

    names = {bits: kv_dtype for kv_dtype, bits in KV_BITS.items()}
    for rate in profile.cpu_attention:
        name = names.get(rate.bits, f"{rate.bits:g} bits")
        rates = _gigabytes(rate.bytes_per_s), _gigaops(rate.ops_per_s)
        yield name, str(rate.heads_per_group), str(rate.head_dim), *rates


def gpu_rows(profile: HardwareProfile) -> Iterator[tuple[str, str]]:
    """GPU memory, the bus and what happens when both sides work."""
    from placement.machine.rates import ANY_ROWS
    from placement.profilers.gpu_linear import crossovers

    yield "GPU memory", f"{profile.gpu_memory_bytes / 2**30:.1f} GiB"
    yield "GPU memory read", _gigabytes(profile.gpu_bytes_per_s)
    for name, rate in profile.gpu_flops.by_format.items():
        yield f"GPU linear {name}, many rows", _gigaops(rate)
    for name in profile.gpu_flops.by_format if profile.gpu_rows else ():
        flat, gemm = crossovers(profile.gpu_rows, name)
        yield f"GPU linear {name}", f"flat up to {flat} rows, full rate from {gemm}"
    for name, rows in profile.int8_rows.items():
        yield f"GPU linear {name} in int8", "any number of rows" if rows >= ANY_ROWS else f"up to {rows} rows"
    yield "copy to the GPU", _gigabytes(profile.h2d_bytes_per_s)
    yield "copy from the GPU", _gigabytes(profile.d2h_bytes_per_s)
    yield "CPU linears while copies run", f"{profile.cpu_slowdown_while_copying:.0%}"
    yield "CPU attention while copies run", f"{profile.cpu_attention_slowdown_while_copying:.0%}"
    yield "copies while the CPU lane computes", f"{profile.copy_slowdown_while_computing:.0%}"
    yield "hand-over GPU to CPU and back", f"{profile.handover_s * 1e6:.0f} us"
    yield "one GPU kernel", f"{profile.launch_overhead_s * 1e6:.1f} us"


def copy_rows(profile: HardwareProfile) -> Iterator[tuple[str, ...]]:
    """Both ways, pinned and pageable, by size."""
    from placement.plan.units import format_bytes

    for rate in profile.copies:
        rates = (rate.h2d_pinned, rate.d2h_pinned, rate.h2d_pageable, rate.d2h_pageable)
        yield format_bytes(rate.size_bytes), *map(_gigabytes, rates)


def _gigabytes(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:.1f} GB/s"


def _gigaops(ops_per_s: float) -> str:
    return f"{ops_per_s / 1e9:.0f} Gop/s"
