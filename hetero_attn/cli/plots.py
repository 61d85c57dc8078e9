"""Pictures of a plan and of a hardware profile. matplotlib is an extra, imported only when a plot is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from placement.hardware import HardwareProfile
    from placement.plan import Plan

LANES = ("gpu", "stream", "cpu")
COLOURS = {"gpu": "#3b7a57", "stream": "#d99a2b", "cpu": "#4a6fa5"}
DECODE_TIER = 0
OUTSIDE_LAYERS = -1


def new_figure(num_axes: int) -> tuple[Any, Any]:
    """A figure with axes side by side and no global pyplot state; a missing matplotlib is a usage error."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise typer.BadParameter("plots need matplotlib: pip install 'hetero-attn[plot]'") from None
    figure = Figure(figsize=(6.4 * num_axes, 4.2), layout="constrained")
    return figure, figure.subplots(1, num_axes, squeeze=False)[0]


def save(figure: Any, file: Path) -> None:
    """Write a figure in the format of the file's ending; what cannot be written is a usage error."""
    try:
        figure.savefig(file, dpi=150)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"cannot draw into {file}: {error}") from None


def lane_bytes_by_layer(plan: Plan) -> dict[int, dict[str, int]]:
    """Weight bytes that each lane reads for one decoded token, by layer; -1 is what belongs to no layer."""
    layers: dict[int, dict[str, int]] = {}
    for shard, placement in zip(plan.workload.linears, plan.linears, strict=True):
        layer = OUTSIDE_LAYERS if shard.layer is None else shard.layer
        lanes = layers.setdefault(layer, dict.fromkeys(LANES, 0))
        for lane, units in zip(LANES, placement.cut(DECODE_TIER), strict=True):
            lanes[lane] += units * shard.unit_bytes
    return layers


def plot_plan(plan: Plan, file: Path) -> None:
    """Draw weight bytes by layer and lane, and the predicted decode speed along the context."""
    curve = plan.predicted.decode_by_context if plan.predicted is not None else ()
    figure, axes = new_figure(2 if curve else 1)
    layers = lane_bytes_by_layer(plan)
    names = [str(layer) for layer in sorted(layers) if layer >= 0] + ["head"] * (OUTSIDE_LAYERS in layers)
    ordered = [layers[layer] for layer in sorted(layers) if layer >= 0]
    ordered += [layers[OUTSIDE_LAYERS]] if OUTSIDE_LAYERS in layers else []
    below = [0.0] * len(ordered)
    for lane in LANES:
        heights = [lanes[lane] / 2**20 for lanes in ordered]
        axes[0].bar(names, heights, bottom=below, label=lane, color=COLOURS[lane])
        below = [base + height for base, height in zip(below, heights, strict=True)]
    axes[0].set(title=f"{plan.model}: weights read per decoded token", xlabel="layer", ylabel="MiB")
    axes[0].set_xticks(_few(names))
    axes[0].legend(title="lane")
    if curve:
        axes[1].plot([cost.context for cost in curve], [cost.tokens_per_s for cost in curve], marker="o")
        axes[1].set(title="predicted decode speed", xlabel="tokens in the cache", ylabel="tokens/s")
        axes[1].set_ylim(bottom=0)
    save(figure, file)


def plot_profile(profile: HardwareProfile, file: Path) -> None:
    """Draw bandwidths and many-row rates, one bar each, on logarithmic axes."""
    bandwidth = {"DRAM read": profile.dram_bytes_per_s}
    rates = {}
    for dtype in ("fp32", "bf16", "q8", "q4"):
        bandwidth[f"CPU linear {dtype}"] = profile.cpu_linear_bytes_per_s.of(dtype)
        rates[f"CPU {dtype}"] = profile.cpu_ops_per_s.of(dtype)
    bandwidth["CPU attention"] = profile.cpu_attention_bytes_per_s
    if profile.has_gpu:
        bandwidth |= {"copy to GPU": profile.h2d_bytes_per_s, "copy from GPU": profile.d2h_bytes_per_s,
                      "GPU memory": profile.gpu_bytes_per_s}
        rates |= {f"GPU {dtype}": profile.gpu_flops.of(dtype) for dtype in ("fp32", "bf16", "q8", "q4")}
    figure, axes = new_figure(2)
    for axis, values, title, unit in (
        (axes[0], bandwidth, f"{profile.name}: bytes", "GB/s"), (axes[1], rates, "many rows: operations", "Gop/s")
    ):
        colours = [COLOURS["gpu" if "GPU" in name else "cpu"] for name in values]
        bars = axis.barh(list(values), [value / 1e9 for value in values.values()], color=colours)
        axis.bar_label(bars, fmt="{:,.0f}", padding=2)
        axis.set(title=title, xlabel=unit, xscale="log")
        axis.set_xlim(left=1, right=axis.get_xlim()[1] * 4)
        axis.invert_yaxis()
    save(figure, file)


def _few(names: list[str]) -> list[int]:
    """Positions of at most about 16 tick labels, the last one always among them."""
    step = max(1, len(names) // 16)
    return sorted({*range(0, len(names), step), len(names) - 1})
