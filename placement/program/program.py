"""A small mixed-integer linear program: named nothing, variables by index, solved by HiGHS through scipy.

scipy is imported only when a program is solved: importing it takes over a second.
"""

from dataclasses import dataclass, field
from itertools import chain
from math import inf

from placement.program.native_output import without_native_output
from placement.program.prices import Arrays, Relaxed, UndecidedError, relaxed

# A node limit and not a time limit: the same program gives the same answer on a slow machine.
NODE_LIMIT = 300
RELATIVE_GAP = 1e-4


@dataclass(slots=True)
class Program:
    """minimise costs . x  subject to  lower <= A x <= upper  and bounds on x; some x are integers."""

    costs: list[float] = field(default_factory=list)
    lower: list[float] = field(default_factory=list)
    upper: list[float] = field(default_factory=list)
    integer: list[bool] = field(default_factory=list)
    rows: list[tuple[dict[int, float], float, float]] = field(default_factory=list)

    def variable(self, lower: float = 0.0, upper: float = inf, *, integer: bool = False, cost: float = 0.0) -> int:
        """Add a variable and return its index."""
        self.costs.append(cost)
        self.lower.append(lower)
        self.upper.append(upper)
        self.integer.append(integer)
        return len(self.costs) - 1

    def binary(self) -> int:
        """Add a variable that is 0 or 1."""
        return self.variable(0, 1, integer=True)

    def at_least(self, terms: dict[int, float], bound: float) -> None:
        """Require sum(terms) >= bound."""
        self.rows.append((terms, bound, inf))

    def at_most(self, terms: dict[int, float], bound: float) -> None:
        """Require sum(terms) <= bound."""
        self.rows.append((terms, -inf, bound))

    def equal(self, terms: dict[int, float], value: float) -> None:
        """Require sum(terms) == value."""
        self.rows.append((terms, value, value))

    def arrays(self) -> Arrays:
        """The program as it is now, as the solver takes it."""
        import numpy as np
        from scipy.sparse import csr_array

        rows = [terms for terms, _, _ in self.rows]
        starts = np.cumsum([0, *map(len, rows)])
        columns = np.fromiter(chain.from_iterable(rows), dtype=np.int64, count=starts[-1])
        values = np.fromiter(chain.from_iterable(map(dict.values, rows)), dtype=np.float64, count=starts[-1])
        return Arrays(
            np.array(self.costs),
            csr_array((values, columns, starts), shape=(len(self.rows), len(self.costs))),
            np.array([(low, high) for _, low, high in self.rows], dtype=np.float64),
            np.array(self.lower, dtype=np.float64),
            np.array(self.upper, dtype=np.float64),
        )

    def solve(self, whole_numbers: bool = True) -> list[float] | None:
        """Values of an optimal solution (within RELATIVE_GAP), or None when there is none.

        whole_numbers: False lets integers be fractions, which is faster and never worse.
        """
        import numpy as np
        from scipy.optimize import Bounds, LinearConstraint, milp

        costs, matrix, rows, lower, upper = self.arrays()
        with without_native_output():
            result = milp(
                costs,
                integrality=np.array(self.integer, dtype=np.int64) * whole_numbers,
                bounds=Bounds(lower, upper),
                constraints=LinearConstraint(matrix, rows[:, 0], rows[:, 1]),
                options={"mip_rel_gap": RELATIVE_GAP, "node_limit": NODE_LIMIT, "disp": False},
            )
        return None if result.x is None else result.x.tolist()

    def relaxed(self) -> Relaxed | None:
        """What the program costs without whole numbers, and the prices of its rows; None when there is no solution."""
        try:
            return relaxed(self.arrays())
        except UndecidedError:
            values = self.solve(whole_numbers=False)
        if values is None:
            return None
        return Relaxed(sum(cost * value for cost, value in zip(self.costs, values, strict=True)), [])


def add(terms: dict[int, float], variable: int, coefficient: float) -> None:
    """Add `coefficient * variable` to a sum."""
    terms[variable] = terms.get(variable, 0.0) + coefficient
