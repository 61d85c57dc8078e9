"""The solver behind the planner: what it prints itself reaches nobody."""

import ctypes
import os

import pytest
import scipy.optimize

from placement.program.native_output import without_native_output
from placement.program.program import Program


def one_variable() -> Program:
    program = Program()
    program.at_least({program.variable(cost=1.0): 1.0}, 3.0)
    return program


def test_a_solver_that_prints_does_not_disturb_json(capfd, monkeypatch):
    """HiGHS wrote a line from C into `plan --json` now and then; here it does so every time, buffered and
    unbuffered."""
    solve = scipy.optimize.milp

    def noisy(*arguments, **options):
        os.write(1, b"unbuffered\n")
        ctypes.CDLL(None).puts(b"buffered")
        return solve(*arguments, **options)

    monkeypatch.setattr(scipy.optimize, "milp", noisy)
    values = one_variable().solve()
    print("json")
    out, err = capfd.readouterr()

    assert [3.0] == values
    assert "json\n" == out
    assert "" == err, "a line of its insides helps nobody"


def test_output_is_back_after_an_error(capfd):
    with pytest.raises(ValueError, match="inside"), without_native_output():
        raise ValueError("inside")
    os.write(1, b"after\n")

    assert "after\n" == capfd.readouterr().out
