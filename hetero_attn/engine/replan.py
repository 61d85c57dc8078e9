"""When a loaded elastic model changes its plan: at the user's wish, and by itself as its context grows.

The cache takes GPU memory from the weights as a sequence grows, and gives it back when sequences end. How much is no
new rule: for each power of two of cached tokens the planner itself says where everything belongs, and the model goes
over to that plan where the cost model promises enough. A plan is made when its context is first reached.
"""

import warnings
from collections.abc import Callable
from dataclasses import replace

from hetero_attn.engine.engine import Engine
from hetero_attn.errors import MemoryBudgetError
from hetero_attn.planning.settle import PlannedModel
from placement.adapt.elastic import decode_s, plan_for_budget, plan_for_context
from placement.plan.plan import Plan
from placement.plan.units import format_bytes
from placement.solve.refusals import BudgetError

# A plan must save this share of a decode step before weights are moved for it.
LEAST_GAIN = 0.03


class Replanner:
    """Keeps the plan of one engine up to date. planned: what was loaded, with the plan in force."""

    def __init__(self, engine: Engine, planned: PlannedModel) -> None:
        self._engine = engine
        self.planned = planned
        self._loaded_bytes = planned.plan.gpu_memory_bytes or 0
        self._level_planned = planned.plan.max_context
        self._plans: dict[int, Plan] = {}

    def resize(self, gpu_memory_bytes: int) -> Plan:
        """Go over to the fastest plan within another GPU budget; returns it.

        Raises MemoryBudgetError, and leaves everything as it was, for a plan that is not elastic, for a budget too
        small (the message names the smallest that works), and on CUDA for one above that of the load: its memory is
        taken once.
        """
        plan = self.planned.plan
        if not plan.workload.elastic:
            raise MemoryBudgetError(
                f"{plan.model}: its GPU memory cannot be resized, because {_why_rigid(plan)}; load it on a GPU with "
                "elastic=True, or `elastic: true` in the policy"
            )
        if plan.device == "cuda" and gpu_memory_bytes > self._loaded_bytes:
            raise MemoryBudgetError(
                f"{plan.model}: its GPU memory was taken in one piece of {format_bytes(self._loaded_bytes)} and cannot "
                f"grow to {format_bytes(gpu_memory_bytes)}; load it with that much, and resize downwards"
            )
        self._move(self._checked(plan_for_budget, gpu_memory_bytes))
        self._plans.clear()
        return self.planned.plan

    def follow(self, tokens_of: Callable[[], int]) -> None:
        """Take the cuts that are best for so many tokens in the cache, all sequences together, if that pays.

        tokens_of: says how many, with those of the coming step; asked of an elastic model only. The context counts as
        grown when it doubles, and as ended at a quarter.
        """
        if not self.planned.plan.workload.elastic:
            return
        tokens = tokens_of()
        wanted = self._level(tokens)
        if not self._level_planned // 4 < wanted <= self._level_planned:
            self._level_planned = wanted
            try:
                self._adapt(wanted, tokens)
            except MemoryBudgetError as error:
                name = self.planned.plan.model
                warnings.warn(f"{name} keeps its cuts, GPU memory cannot be rearranged: {error}", stacklevel=3)

    def _level(self, tokens: int) -> int:
        """The context to plan for: `tokens` rounded up to a power of two, no shorter than what one step may append."""
        workload = self.planned.plan.workload
        least = max(tokens, workload.prefill_chunk + workload.page_size)
        return min(1 << (least - 1).bit_length(), workload.max_context)

    def _adapt(self, context: int, tokens: int) -> None:
        planned = self.planned
        if context not in self._plans:
            self._plans[context] = self._checked(plan_for_context, context)
        candidate = self._plans[context]
        now_s, then_s = (decode_s(plan, planned.hardware, tokens) for plan in (planned.plan, candidate))
        if then_s <= (1 - LEAST_GAIN) * now_s:
            self._move(candidate)

    def _checked(self, make: Callable[..., Plan], wish: int) -> Plan:
        try:
            return make(self._warmed(self.planned.plan), self.planned.hardware, self.planned.policy, wish)
        except BudgetError as error:
            raise MemoryBudgetError(str(error)) from error

    def _warmed(self, plan: Plan) -> Plan:
        """The plan, for another to be made from, with how warm its experts were so far."""
        heats = self._engine.expert_heats()
        if not heats:
            return plan
        linears = (replace(shard, heat=heats.get(shard.name, shard.heat)) for shard in plan.workload.linears)
        return replace(plan, workload=replace(plan.workload, linears=tuple(linears)))

    def _move(self, plan: Plan) -> None:
        self._engine.move(plan)
        self.planned = replace(self.planned, plan=plan)


def _why_rigid(plan: Plan) -> str:
    if plan.gpu_memory_bytes is None:
        return f"device {plan.device} has none"
    return f"what is in its {format_bytes(plan.gpu_memory_bytes)} has no copy in DRAM"
