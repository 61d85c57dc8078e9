"""Pictures of a plan and of a hardware profile. matplotlib is an extra, imported only when a plot is asked for."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from hetero_attn.tools.whole_file import write_whole

if TYPE_CHECKING:
    from placement.machine.hardware import HardwareProfile
    from placement.plan.plan import Plan

LANES = ("gpu", "stream", "cpu")
# Dark, middle and light, so that a grey print tells them apart; hatched where they meet in one bar.
COLOURS = {"gpu": "#1b4f72", "stream": "#d99a2b", "cpu": "#b9d6ee"}
HATCHES = {"gpu": "", "stream": "//", "cpu": ".."}
DTYPES = ("fp32", "bf16", "q8", "q4")
# Of Okabe and Ito, with a marker of its own for each.
LINES = (("#000000", "o"), ("#0072B2", "s"), ("#D55E00", "^"), ("#CC79A7", "D"))
PAGE_INCHES, PAGE_HEIGHT_INCHES, AXES_INCHES = 7.2, 11.0, 2.7  # a page's text; a panel while there is room
HEADROOM = 1.12
DECODE_TIER = 0
OUTSIDE_LAYERS = -1


@contextmanager
def plotting(file: Path) -> Iterator[None]:
    """Turn a missing matplotlib and a file that cannot be drawn into usage errors."""
    try:
        yield
    except ImportError:
        raise typer.BadParameter("plots need matplotlib: pip install 'hetero-attn[plot]'") from None
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"cannot draw into {file}: {getattr(error, 'strerror', None) or error}") from None


@contextmanager
def figure_in(file: Path, num_axes: int) -> Iterator[Any]:
    """Axes one below the other, as wide as a page, written to `file` at the end; no global pyplot state."""
    with plotting(file):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(PAGE_INCHES, min(PAGE_HEIGHT_INCHES, AXES_INCHES * num_axes)), layout="constrained")
        yield figure.subplots(num_axes, 1, squeeze=False)[:, 0]
        drawn = io.BytesIO()
        figure.savefig(drawn, dpi=150, format=file.suffix[1:] or "png")
        write_whole(file, drawn.getvalue())


def lane_bytes_by_layer(plan: Plan) -> dict[int, dict[str, int]]:
    """Weight bytes that each lane reads for one decoded token, by layer; -1 is what belongs to no layer."""
    layers: dict[int, dict[str, int]] = {}
    for shard, placement in zip(plan.workload.linears, plan.linears, strict=True):
        layer = OUTSIDE_LAYERS if shard.layer is None else shard.layer
        lanes = layers.setdefault(layer, dict.fromkeys(LANES, 0))
        for lane, units in zip(LANES, placement.cut(DECODE_TIER), strict=True):
            lanes[lane] += units * shard.unit_bytes
    return layers


def plot_plan(plan: Plan, curve: Sequence[Plan], file: Path) -> None:
    """Draw the weight bytes of every layer by lane, speed over GPU memory and speed over the context.

    curve: plans for growing GPU budgets; empty without a GPU, and left out then.
    """
    from placement.plots import draw_budgets, draw_contexts

    with figure_in(file, 4 if curve else 2) as (weights, *budgets, contexts):
        _draw_weights(weights, plan)
        for axis, phase in zip(budgets, ("decode", "prefill"), strict=False):
            draw_budgets(axis, plan, curve, phase)
        draw_contexts(contexts, plan)


def _draw_weights(axis: Any, plan: Plan) -> None:
    """A bar a layer; the head's may be many times as high, so the layers set the scale and its height is written."""
    layers = lane_bytes_by_layer(plan)
    outside = layers.pop(OUTSIDE_LAYERS)
    names = [*(str(layer) for layer in sorted(layers)), "head"]
    ordered = [*(layers[layer] for layer in sorted(layers)), outside]
    below = [0.0] * len(ordered)
    for lane in LANES:
        heights = [lanes[lane] / 2**20 for lanes in ordered]
        if any(heights):
            axis.bar(
                names, heights, bottom=below, label=lane, color=COLOURS[lane], hatch=HATCHES[lane], edgecolor="black",
                linewidth=0.3,
            )  # fmt: skip
        below = [base + height for base, height in zip(below, heights, strict=True)]
    highest = HEADROOM * max(below[:-1])
    axis.set(title=f"{plan.model}: weights read for a token", xlabel="layer", ylabel="MiB", ylim=(0, highest))
    axis.set_xticks(_few(names))
    if below[-1] > highest:
        axis.annotate(f"head: {below[-1]:.0f} MiB", (len(names) - 1, highest), (-4, -12), textcoords="offset points",
                      ha="right")  # fmt: skip
    axis.legend(title="lane", loc="center left", bbox_to_anchor=(1.0, 0.5))


def plot_profile(profile: HardwareProfile, file: Path) -> None:
    """Draw bandwidths and many-row rates, one bar each, and what was measured by threads, token rows and copy size."""
    bandwidth = {"DRAM read": profile.dram_bytes_per_s}
    rates = {}
    for dtype in DTYPES:
        bandwidth[f"CPU linear {dtype}"] = profile.cpu_linear_bytes_per_s.of(dtype)
        rates[f"CPU {dtype}"] = profile.cpu_ops_per_s.of(dtype)
    bandwidth["CPU attention"] = profile.cpu_attention_bytes_per_s
    if profile.has_gpu:
        bandwidth |= {
            "copy to GPU": profile.h2d_bytes_per_s,
            "copy from GPU": profile.d2h_bytes_per_s,
            "GPU memory": profile.gpu_bytes_per_s,
        }
        rates |= {f"GPU {dtype}": profile.gpu_flops.of(dtype) for dtype in DTYPES}
    drawers = [_draw_threads] * bool(profile.thread_sweep) + [_draw_rows] * bool(profile.cpu_rows)
    drawers += [_draw_copies] * bool(profile.copies)
    with figure_in(file, 2 + len(drawers)) as (left, right, *others):
        _bars(left, bandwidth, f"{profile.name}: bytes read", "GB/s")
        _bars(right, rates, "linears of many rows", "Gop/s")
        for draw, axis in zip(drawers, others, strict=True):
            draw(axis, profile)


def _draw_threads(axis: Any, profile: HardwareProfile) -> None:
    threads, highest = [rate.threads for rate in profile.thread_sweep], 0.0
    for kind, name, (colour, marker) in zip(
        ("linear", "sweep"), ("q4 linear, one row", "plain read"), LINES, strict=False
    ):
        values = [getattr(rate, f"{kind}_bytes_per_s") / 1e9 for rate in profile.thread_sweep]
        axis.plot(threads, values, marker=marker, color=colour, label=name)
        highest = max(highest, *values)
    axis.axvline(profile.cores, linestyle=":", color="grey", label=f"{profile.cores} threads in use")
    axis.set(title="CPU lane by threads", xlabel="threads", ylabel="GB/s", xticks=threads)
    axis.set_ylim(0, HEADROOM * highest)
    axis.legend()


def _draw_rows(axis: Any, profile: HardwareProfile) -> None:
    for side, rates, style in (("CPU", profile.cpu_rows, "-"), ("GPU", profile.gpu_rows, "--")):
        for dtype, (colour, marker) in zip(DTYPES, LINES, strict=True) if rates else ():
            values = [rate.ops_per_s.of(dtype) / 1e9 for rate in rates]
            rows = [rate.rows for rate in rates]
            axis.plot(rows, values, style, marker=marker, markersize=4, color=colour, label=f"{side} {dtype}")
    rows = [rate.rows for rate in profile.cpu_rows or profile.gpu_rows]
    powers = [count for count in rows if count & (count - 1) == 0]
    axis.set(title="linears by token rows", xlabel="token rows", ylabel="Gop/s", xscale="log", yscale="log")
    axis.set_xticks(powers, [str(count) for count in powers], minor=False)
    axis.set_xticks([], minor=True)
    axis.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))


def _draw_copies(axis: Any, profile: HardwareProfile) -> None:
    names = ("h2d_pinned", "d2h_pinned", "h2d_pageable", "d2h_pageable")
    labels = ("to the GPU, pinned", "from the GPU, pinned", "to the GPU, pageable", "from the GPU, pageable")
    sizes, highest = [rate.size_bytes / 2**20 for rate in profile.copies], 0.0
    for name, label, (colour, marker) in zip(names, labels, LINES, strict=True):
        values = [getattr(rate, name) / 1e9 for rate in profile.copies]
        axis.plot(sizes, values, marker=marker, color=colour, label=label)
        highest = max(highest, *values)
    axis.set(title="copies over the bus", xlabel="size, MiB", ylabel="GB/s", xscale="log", ylim=(0, HEADROOM * highest))
    axis.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))


def _bars(axis: Any, values: dict[str, float], title: str, unit: str) -> None:
    on_gpu = ["GPU" in name for name in values]
    colours, hatches = ([kinds["gpu" if on else "cpu"] for on in on_gpu] for kinds in (COLOURS, HATCHES))
    rates = [value / 1e9 for value in values.values()]
    bars = axis.barh(list(values), rates, color=colours, hatch=hatches, edgecolor="black", linewidth=0.3)
    axis.bar_label(bars, [f"{rate:,.0f}" if rate >= 1000 else f"{rate:.3g}" for rate in rates], padding=2)
    axis.set(title=title, xlabel=unit, xscale="log")
    axis.set_xlim(left=1, right=axis.get_xlim()[1] * 4)
    axis.invert_yaxis()


def _few(names: list[str]) -> list[int]:
    """Positions of some 16 tick labels at most, the last one among them, with room for it beside its neighbour."""
    last = len(names) - 1
    step = -(-len(names) // 16)
    return [*range(0, last - step // 2, step), last]
