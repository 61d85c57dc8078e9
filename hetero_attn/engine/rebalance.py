"""With `rebalance: true` in the policy: let measured lane times move the stream/cpu boundary of a loaded model.

Between two steps only, a few units at a time, and only after enough steps of a row tier to know. No weight moves.
"""

from dataclasses import replace

from hetero_attn.engine.engine import Engine
from hetero_attn.engine.lane_report import PhaseTimes
from hetero_attn.engine.replan import Replanner
from placement.adapt.rebalance import LaneTimes, movable, rebalanced
from placement.plan.plan import Plan
from placement.policy.bind import bind

STEPS = 16  # of a row tier, between two looks at it


class Rebalancer:
    """Watches one engine's lane times. replanner: holds the plan in force, which elastic changes may replace."""

    def __init__(self, engine: Engine, replanner: Replanner) -> None:
        self._engine = engine
        self._replanner = replanner
        self._seen: dict[int, PhaseTimes] = {}
        self._plan: Plan | None = None
        self._limits: tuple[dict[str, int], ...] = ()

    def follow(self) -> None:
        """Look at every row tier that has made enough steps, and move its boundaries if its lanes are out of
        balance."""
        planned = self._replanner.planned
        if not planned.policy.rebalance or self._engine.lanes.ring is None:
            return
        if planned.plan is not self._plan:
            self._start(planned.plan)
        for tier, times in self._engine.report.tiers.items():
            since = times.since(self._seen.get(tier, PhaseTimes()))
            if since.steps >= STEPS:
                self._seen[tier] = replace(times)
                self._look(tier, since)

    def _start(self, plan: Plan) -> None:
        """Take over a plan that was loaded or moved to: its staging ring and its page-locked linears set the limits."""
        self._plan = plan
        self._limits = movable(plan, bind(self._replanner.planned.policy, plan.workload, plan.device))
        self._seen = {tier: replace(times) for tier, times in self._engine.report.tiers.items()}

    def _look(self, tier: int, spent: PhaseTimes) -> None:
        mean = LaneTimes(*(value / spent.steps for value in (spent.wall_s, spent.cpu_lane_s, spent.waited_s)))
        planned = self._replanner.planned
        plan = rebalanced(planned.plan, self._limits[tier], tier, mean, planned.hardware)
        if plan is not None:
            self._engine.recut(plan)
            self._replanner.planned = replace(planned, plan=plan)
            self._plan = plan
