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
COLOURS = {"gpu": "#3b7a57", "stream": "#d99a2b", "cpu": "#4a6fa5"}
DTYPES = ("fp32", "bf16", "q8", "q4")
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
    """Axes side by side, written to `file` at the end; no global pyplot state."""
    with plotting(file):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.4 * num_axes, 4.2), layout="constrained")
        yield figure.subplots(1, num_axes, squeeze=False)[0]
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

    with figure_in(file, 2 + bool(curve)) as (weights, *middle, contexts):
        _draw_weights(weights, plan)
        if middle:
            draw_budgets(middle[0], plan, curve)
        draw_contexts(contexts, plan)


def _draw_weights(axis: Any, plan: Plan) -> None:
    layers = lane_bytes_by_layer(plan)
    outside = layers.pop(OUTSIDE_LAYERS)
    names = [*(str(layer) for layer in sorted(layers)), "head"]
    ordered = [*(layers[layer] for layer in sorted(layers)), outside]
    below = [0.0] * len(ordered)
    for lane in LANES:
        heights = [lanes[lane] / 2**20 for lanes in ordered]
        axis.bar(names, heights, bottom=below, label=lane, color=COLOURS[lane])
        below = [base + height for base, height in zip(below, heights, strict=True)]
    axis.set(title=f"{plan.model}: weights read per decoded token", xlabel="layer", ylabel="MiB")
    axis.set_xticks(_few(names))
    axis.legend(title="lane")


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
        _bars(left, bandwidth, f"{profile.name}: bytes", "GB/s")
        _bars(right, rates, "many rows: operations", "Gop/s")
        for draw, axis in zip(drawers, others, strict=True):
            draw(axis, profile)


def _draw_threads(axis: Any, profile: HardwareProfile) -> None:
    threads = [rate.threads for rate in profile.thread_sweep]
    for name in ("linear", "sweep"):
        values = [getattr(rate, f"{name}_bytes_per_s") / 1e9 for rate in profile.thread_sweep]
        axis.plot(threads, values, marker="o", label={"linear": "q4 linear, one row", "sweep": "plain read"}[name])
    axis.axvline(profile.cores, linestyle=":", color="grey")
    axis.set(title=f"threads: {profile.cores} used", xlabel="threads", ylabel="GB/s", xticks=threads, ylim=(0, None))
    axis.legend()


def _draw_rows(axis: Any, profile: HardwareProfile) -> None:
    for side, rates, style in (("CPU", profile.cpu_rows, "-"), ("GPU", profile.gpu_rows, "--")):
        for dtype in DTYPES if rates else ():
            values = [rate.ops_per_s.of(dtype) / 1e9 for rate in rates]
            axis.plot([rate.rows for rate in rates], values, style, marker=".", label=f"{side} {dtype}")
    axis.set(title="linears by token rows", xlabel="rows", ylabel="Gop/s", xscale="log", yscale="log")
    axis.legend(fontsize="small")


def _draw_copies(axis: Any, profile: HardwareProfile) -> None:
    for name in ("h2d_pinned", "d2h_pinned", "h2d_pageable", "d2h_pageable"):
        values = [getattr(rate, name) / 1e9 for rate in profile.copies]
        axis.plot(
            [rate.size_bytes / 2**20 for rate in profile.copies], values, marker="o", label=name.replace("_", " ")
        )
    axis.set(title="copies over the bus", xlabel="MiB", ylabel="GB/s", xscale="log", ylim=(0, None))
    axis.legend()


def _bars(axis: Any, values: dict[str, float], title: str, unit: str) -> None:
    colours = [COLOURS["gpu" if "GPU" in name else "cpu"] for name in values]
    bars = axis.barh(list(values), [value / 1e9 for value in values.values()], color=colours)
    axis.bar_label(bars, fmt="{:,.0f}", padding=2)
    axis.set(title=title, xlabel=unit, xscale="log")
    axis.set_xlim(left=1, right=axis.get_xlim()[1] * 4)
    axis.invert_yaxis()


def _few(names: list[str]) -> list[int]:
    """Positions of at most about 16 tick labels, the last one always among them."""
    step = max(1, len(names) // 16)
    return sorted({*range(0, len(names), step), len(names) - 1})
