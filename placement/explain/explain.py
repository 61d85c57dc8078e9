"""A plan with why it is as it is, and plans over a range of budgets."""

from collections.abc import Callable, Iterable, Sequence

from placement.explain.comparisons import alternatives, gains, losses, with_rules_of
from placement.explain.explanation import Estimate, Explanation
from placement.explain.sentences import bottleneck, notes
from placement.machine.hardware import HardwareProfile
from placement.plan.plan import Plan
from placement.plan.workload import Workload
from placement.policy.policy import Policy
from placement.solve.make_plan import Searched, make_plan, plan_with_alternatives
from placement.solve.refusals import BudgetError
from placement.solve.request import requested


def explain(
    workload: Workload,
    hardware: HardwareProfile,
    policy: Policy,
    *,
    device: str,
    gpu_memory_bytes: int | None = None,
    searched: Searched | None = None,
    gains_beside: Callable[[], tuple[Estimate, ...]] | None = None,
) -> Explanation:
    """Plan and explain: arguments and errors of make_plan, and several times its time, for it plans several times.

    searched: the plan for these very arguments, where it is known. gains_beside: gives the `gains` of that, where they
    are found beside this; asked last.
    """
    if searched is None:
        asked = requested(workload, hardware, policy, device=device, gpu_memory_bytes=gpu_memory_bytes)
        searched = plan_with_alternatives(asked)
    plan, found = searched
    less = tuple(losses(workload, hardware, policy, plan))
    others = () if device == "cpu" else tuple(alternatives(workload, hardware, policy, plan, found))
    more = gains_beside() if gains_beside else tuple(gains(workload, hardware, policy, plan))
    decides = bottleneck(plan.predicted.decode, plan.predicted.prefill)
    return Explanation(plan, decides, more, less, others, tuple(notes(plan, hardware, policy)))


def budget_curve(
    workload: Workload,
    hardware: HardwareProfile,
    policy: Policy,
    *,
    device: str,
    steps: int = 12,
    watched: Callable[[Sequence[int]], Iterable[int]] = iter,
) -> list[Plan]:
    """Plans for GPU budgets from the least that works to everything the model can use, in equal steps.

    watched: what the budgets are passed through, such as a progress bar; a large model takes seconds for each.
    """
    try:
        make_plan(workload, hardware, policy, device=device, gpu_memory_bytes=1)
        return []
    except BudgetError as error:
        least = error.needed_bytes
    most = _everything_bytes(workload, hardware, policy, device)
    budgets = [least + (most - least) * step // steps for step in range(steps + 1)]
    return [
        make_plan(workload, hardware, policy, device=device, gpu_memory_bytes=budget) for budget in watched(budgets)
    ]


def _everything_bytes(workload: Workload, hardware: HardwareProfile, policy: Policy, device: str) -> int:
    everything = with_rules_of("gpu_only", policy)
    return make_plan(workload, hardware, everything, device=device, gpu_memory_bytes=2**60).memory.gpu_bytes
