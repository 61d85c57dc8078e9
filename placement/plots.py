"""Predicted speed as pictures: against the GPU memory budget and against the context on axes of matplotlib.

Colours are those of Okabe and Ito, which colour-blind people tell apart; markers and dashes do so in grey.
"""

from collections.abc import Sequence
from typing import Any

from placement.plan.plan import Plan

DECODE = {"color": "#0072B2", "marker": "o"}
PREFILL = {"color": "#D55E00", "marker": "s"}
HEADROOM = 1.12  # above the highest point, so that no line touches the frame


def draw_budgets(axis: Any, plan: Plan, curve: Sequence[Plan], phase: str) -> None:
    """Speed of a phase, decode | prefill, over GPU budgets; curve: what `budget_curve` gives, the
    plan's own budget marked."""
    gib = [other.gpu_memory_bytes / 2**30 for other in curve]
    speeds = [getattr(other.predicted, phase).tokens_per_s for other in curve]
    axis.plot(gib, speeds, **(DECODE if phase == "decode" else PREFILL))
    axis.axvline(plan.gpu_memory_bytes / 2**30, linestyle=":", color="black", label="the budget of this plan")
    axis.set(title=f"{_where(plan)}: {phase} by GPU memory", xlabel="GPU memory, GiB")
    axis.set(ylabel="tokens/s", ylim=(0, HEADROOM * max(speeds)))
    axis.legend(loc="lower right")


def draw_contexts(axis: Any, plan: Plan) -> None:
    """Decode speed over the tokens in the cache."""
    costs = plan.predicted.decode_by_context
    contexts, speeds = [cost.context for cost in costs], [cost.tokens_per_s for cost in costs]
    axis.plot(contexts, speeds, **DECODE)
    axis.set(title=f"{_where(plan)}: decode by context", xlabel="tokens in the cache")
    axis.set(ylabel="tokens/s", xscale="log", ylim=(0, HEADROOM * max(speeds)))
    axis.set_xticks(contexts, [short_count(context) for context in contexts])
    axis.minorticks_off()


def _where(plan: Plan) -> str:
    return f"{plan.model} on {plan.predicted.hardware}, predicted"


def short_count(tokens: int) -> str:
    """A number of tokens as people say it: 512, 2k, 128k."""
    return f"{tokens // 1024}k" if tokens >= 1024 and tokens % 1024 == 0 else str(tokens)
