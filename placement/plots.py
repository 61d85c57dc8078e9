"""Predicted speed as pictures: against the GPU memory budget and against the context on axes of matplotlib."""

from collections.abc import Sequence
from typing import Any

from placement.plan.plan import Plan


def draw_budgets(axis: Any, plan: Plan, curve: Sequence[Plan]) -> None:
    """Decode and prefill speed over GPU budgets; curve: of placement.explain.budget_curve, the plan's own budget
    marked."""
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


def draw_contexts(axis: Any, plan: Plan) -> None:
    """Decode speed over the tokens in the cache."""
    costs = plan.predicted.decode_by_context
    axis.plot([cost.context for cost in costs], [cost.tokens_per_s for cost in costs], marker="o")
    axis.set(title="predicted decode speed", xlabel="tokens in the cache", ylabel="tokens/s", xscale="log")
    axis.set_ylim(bottom=0)
