"""What the suite remembers of the solver is what the solver said, of the very program that is asked."""

from pathlib import Path

from placement.program.program import Program
from tests.support.planning.solved import Solved


def program(bound: float, cost: float = -1.0) -> Program:
    """One variable at most so large."""
    asked = Program()
    variable = asked.variable(cost=cost)
    asked.at_most({variable: 1.0}, bound)
    return asked


def test_answers_are_kept_for_others_and_no_other_program_is_answered_with_them(tmp_path: Path) -> None:
    asked: list[Program] = []

    def solve(each: Program, whole_numbers: bool) -> list[float] | None:
        asked.append(each)
        (_, _, bound), *_ = each.rows
        return None if bound < 0 else [bound]

    for _ in range(2):  # a process, and one after it
        known = Solved(solve, tmp_path)
        for bound in (2.0, 2.0 + 1e-15, -1.0):
            assert known.of(program(bound)) == (None if bound < 0 else [bound])
        assert known.of(program(2.0), False) == [2.0] and known.of(program(2.0, -1.5)) == [2.0]
        known.of(program(2.0)).append(7.0)
        assert known.of(program(2.0)) == [2.0]

    assert len(asked) == 5
