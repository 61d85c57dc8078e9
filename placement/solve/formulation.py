"""Placement as a mixed-integer program: the equations of placement.cost with placements as the unknowns.

What may be chosen and what memory it takes: placement.solve.unknowns. What a pass costs then:
placement.solve.pass_time. Large models are nearly pure linear programs.
"""

from collections.abc import Sequence
from math import inf

from placement.cost.terms import WeightedCall
from placement.program.prices import Relaxed, least_cost
from placement.solve.decisions import Budgets, Homes, Totals
from placement.solve.pass_time import TIE_BREAK, PassTime
from placement.solve.problem import Problem
from placement.solve.unknowns import Unknowns


def formulation(
    problem: Problem,
    calls: Sequence[WeightedCall],
    gpu_tokens: int | None,
    homes: Homes | None = None,
    budgets: Budgets | None = None,
) -> "Formulation":
    """The program for some passes and a number of KV slots; budgets are the problem's own unless given."""
    return Formulation(Unknowns(problem, calls, gpu_tokens, budgets or problem.budgets, homes))


class Formulation:
    """The program over these unknowns: every call's time as costs, every budget as a limit."""

    def __init__(self, unknowns: Unknowns) -> None:
        self._unknowns = unknowns
        for weighted in unknowns.calls:
            PassTime(unknowns, weighted).add()
        self._prefer_affinity(unknowns.calls[0])
        self._limit_memory()

    @property
    def num_rows(self) -> int:
        """Rows of the program, alike in programs with the same unknowns."""
        return len(self._unknowns.program.rows)

    def solve(self, most_s: float = inf) -> Totals | None:
        """The best placement, or None when the budgets allow none that takes `most_s` seconds at most."""
        unknowns, program = self._unknowns, self._unknowns.program
        if most_s < inf:
            costs = {variable: cost for variable, cost in enumerate(program.costs) if cost}
            program.at_most(costs, most_s * unknowns.time_scale)
        values = program.solve()
        if values is None:
            return None

        def by_tier(name: str) -> dict[tuple[int, int, int], float]:
            return {
                (*key, tier): values[index]
                for key, variables in unknowns.linears.items()
                for tier, index in getattr(variables, name).items()
            }

        return Totals(
            {key: values[v.gpu] for key, v in unknowns.linears.items()},
            by_tier("stream"),
            by_tier("cpu_layers"),
            {c: values[index] for c, index in unknowns.kv_heads.items()},
            {c: max(values[index] for index in indices) for c, indices in unknowns.attending.items()},
            self._whole_pages(values),
            self._seconds(values),
        )

    def relaxed(self) -> Relaxed | None:
        """Seconds below which no placement gets: those of the program without whole numbers; and its prices, for
        `least_s`. None when there is no placement. Equal programs have equal seconds, whatever their rounding."""
        found = self._unknowns.program.relaxed()
        return None if found is None else Relaxed(float(f"{found.cost / self._unknowns.time_scale:.9e}"), found.prices)

    def least_s(self, prices: Sequence[float]) -> float:
        """Seconds below which no placement gets, by the prices of a program with the same unknowns that differs in
        numbers alone; -inf where they say nothing."""
        return least_cost(self._unknowns.program.arrays(), prices) / self._unknowns.time_scale

    def _seconds(self, values: list[float]) -> float:
        program = self._unknowns.program
        cost = sum(cost * value for cost, value in zip(program.costs, values, strict=True) if cost)
        return cost / self._unknowns.time_scale

    def _whole_pages(self, values: list[float]) -> int:
        unknowns = self._unknowns
        if unknowns.tokens is None:
            return unknowns.gpu_tokens
        page = unknowns.workload.page_size
        return max(unknowns.workload.min_gpu_tokens, int(values[unknowns.tokens] / page + 1e-6) * page)

    def solve_for_least(self, place: str) -> float | None:
        """Fewest bytes at a place (gpu | pinned | host) that this program needs, with the other budgets kept."""
        unknowns, program = self._unknowns, self._unknowns.program
        needed = unknowns.memory[place]
        program.costs = [0.0] * len(program.costs)
        for variable, coefficient in needed.items():
            program.costs[variable] = coefficient
        program.rows = [row for row in program.rows if row[0] is not needed]
        values = program.solve()
        if values is None:
            return None
        return unknowns.bytes_scale * (unknowns.memory_constant[place] + sum(values[v] * k for v, k in needed.items()))

    def _prefer_affinity(self, weighted: WeightedCall) -> None:
        """Prefer that the GPU owns the cache of no more KV heads than it computes q, k and v for."""
        unknowns, tier = self._unknowns, weighted.call.tier
        for c, kv_heads in unknowns.kv_heads.items():
            for i, linear in enumerate(unknowns.classes[c].linears):
                if linear.shard.per_kv_head:
                    variables = unknowns.linears[c, i]
                    copy = unknowns.time_scale * linear.shard.unit_bytes / unknowns.hardware.h2d_bytes_per_s
                    stray = unknowns.program.variable(cost=2 * TIE_BREAK * weighted.weight * copy)
                    unknowns.program.at_least({stray: 1, variables.gpu: 1, variables.stream[tier]: 1, kv_heads: -1}, 0)

    def _limit_memory(self) -> None:
        unknowns = self._unknowns
        for place, used in unknowns.memory.items():
            budget = getattr(unknowns.budgets, place)
            if budget is not None:
                unknowns.program.at_most(used, budget / unknowns.bytes_scale - unknowns.memory_constant[place])
