"""Predicted speed as pictures: against the GPU memory budget and against the context (needs matplotlib)."""

from collections.abc import Sequence
from pathlib import Path

from placement.plan import Plan


def plot_predictions(plan: Plan, curve: Sequence[Plan], file: Path | str) -> None:
    """Draw decode and prefill speed over GPU budgets and decode speed over the context into `file`.

    plan: the one in use, marked on the curve; curve: plans of placement.explain.budget_curve, may be empty (no GPU).
    Raises ImportError when matplotlib is missing.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4 * (2 if curve else 1), 4.2), layout="constrained")
    axes = figure.subplots(1, 2 if curve else 1, squeeze=False)[0]
    if curve:
        _budget_axis(axes[0], plan, curve)
    _context_axis(axes[-1], plan)
    figure.savefig(file, dpi=150)


def _budget_axis(axis, plan: Plan, curve: Sequence[Plan]) -> None:
    gib = [other.gpu_memory_bytes / 2**30 for other in curve]
    decode = axis.plot(gib, [other.predicted.decode.tokens_per_s for other in curve], marker="o", label="decode")
    axis.axvline(plan.gpu_memory_bytes / 2**30, linestyle=":", color="grey")
    axis.set(title=f"{plan.model} on {plan.predicted.hardware}", xlabel="GPU memory, GiB", ylabel="decode, tokens/s")
    axis.set_ylim(bottom=0)
    prefill_axis = axis.twinx()
    prefill = prefill_axis.plot(
        gib, [other.predicted.prefill.tokens_per_s for other in curve], marker="x", color="tab:orange", label="prefill"
    )
    prefill_axis.set(ylabel="prefill, tokens/s")
    prefill_axis.set_ylim(bottom=0)
    axis.legend(handles=[*decode, *prefill], loc="upper left")


def _context_axis(axis, plan: Plan) -> None:
    costs = plan.predicted.decode_by_context
    axis.plot([cost.context for cost in costs], [cost.tokens_per_s for cost in costs], marker="o")
    axis.set(title="predicted decode speed", xlabel="tokens in the cache", ylabel="tokens/s", xscale="log")
    axis.set_ylim(bottom=0)
