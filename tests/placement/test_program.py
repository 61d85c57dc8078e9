"""The solver behind the planner: what it prints itself reaches nobody, and what programs cost at least is no more than
they do."""

import ctypes
import os
import random
from math import inf

import pytest
import scipy.optimize

from placement.program.native_output import without_native_output
from placement.program.prices import least_cost
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


def drawn_program(rng: random.Random, like: random.Random) -> Program:
    """A few variables of every kind. like: draws what programs have in common that differ in numbers alone."""
    program = Program()
    count = like.randint(2, 6)
    for _ in range(count):
        low = like.choice([0.0, 1.0])
        high = like.choice([inf, low + 3.5])
        program.variable(low, high, integer=like.random() < 0.3, cost=rng.uniform(0.5, 2.0))
    for _ in range(like.randint(1, 6)):
        chosen = like.sample(range(count), like.randint(1, count))
        terms = {variable: rng.uniform(0.2, 2.0) for variable in chosen}
        at_low = sum(factor * program.lower[variable] for variable, factor in terms.items())
        require = like.choice([program.at_least, program.at_most, program.equal])
        require(terms, at_low + rng.uniform(0.0, 2.0))
    return program


@pytest.mark.parametrize("seed", range(40))
def test_no_prices_say_more_than_a_program_costs_and_its_own_say_all_of_it(seed):
    """Against the solver, whole numbers given up; by prices of others and by any at all."""
    own, other = (drawn_program(random.Random(f"{seed} {each}"), random.Random(seed)) for each in "ab")
    found = [each.relaxed() for each in (own, other)]
    values = own.solve(whole_numbers=False)
    assert (found[0] is None) == (values is None)
    if None in found:
        return
    costs = sum(cost * value for cost, value in zip(own.costs, values, strict=True))
    rng = random.Random(seed)
    anything = [[rng.choice([0.0, rng.gauss(0.0, 1.0)]) for _ in own.rows] for _ in range(20)]

    assert found[0].cost == pytest.approx(costs, rel=1e-6)
    assert least_cost(own.arrays(), found[0].prices) == pytest.approx(costs, rel=1e-6)
    bounds = [least_cost(own.arrays(), prices) for prices in [found[1].prices, *anything]]
    assert max(bounds) <= costs * (1 + 1e-6)


def test_a_program_that_the_solver_gives_up_on_has_no_prices_and_costs_as_much(monkeypatch):
    solve = scipy.optimize.linprog

    def gives_up(*arguments, **options):
        result = solve(*arguments, **options)
        result.status = 4
        return result

    monkeypatch.setattr(scipy.optimize, "linprog", gives_up)

    assert one_variable().relaxed() == (3.0, [])
