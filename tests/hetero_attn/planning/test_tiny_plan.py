"""The plan of the shipped model in a few MiB, which the README shows: programs say what its plans cost, and are small."""

from dataclasses import replace

import pytest

from hetero_attn.planning.options import LoadOptions
from hetero_attn.planning.settle import ask
from placement.solve import search
from placement.solve.formulation import Formulation
from placement.solve.make_plan import plan_requested
from placement.solve.whole_units import laid_out
from tests.support.processes.command import TINY

NOISE = 1.001


def request(gpu_memory="8MiB", chunk=None):
    """What is asked of the planner for the shipped model; chunk: the prefill chunk, None leaves it open."""
    wishes = LoadOptions(model=TINY, device="emulated", gpu_memory=gpu_memory, num_threads=2, progress=False)
    asked = ask(wishes).request
    if chunk is None:
        return asked
    choices = [each for each in asked.workload.chunk_choices if each.rows == chunk]
    return replace(asked, workload=replace(asked.workload, chunk_choices=tuple(choices)))


@pytest.fixture
def solved(monkeypatch):
    """Solutions of the programs of a search, with their candidates that keep the budget."""
    kept = []

    def noted(problem, totals):
        candidates = list(laid_out(problem, totals))
        kept.append((totals.seconds + problem.once_s, [each.seconds for each in candidates if each.fits]))
        return iter(candidates)

    monkeypatch.setattr(search, "laid_out", noted)
    return kept


@pytest.mark.parametrize("gpu_memory", ["6MiB", "8MiB", "10MiB"])
def test_a_program_is_as_fast_as_the_cost_model_says_its_placement_is(solved, gpu_memory):
    """A slot less than a page of the cache, and a share of the CPU that was streamed over a full bus because its
    hand-over takes longer, made plans of 8 MiB 6 % slower than their programs said."""
    plan_requested(request(gpu_memory))
    seconds, found = solved[0]

    assert seconds <= NOISE * min(found)
    assert min(found) <= 1.005 * seconds


def test_the_plan_of_the_readme_is_the_better_one():
    """0.0471 s in chunks of 128 rows, where there was one of 0.0447 s, and 0.0421 s in chunks of 64."""
    in_large_chunks, plan = plan_requested(request(chunk=128)), plan_requested(request())

    assert in_large_chunks.predicted.objective_s < 0.0448
    assert plan.predicted.objective_s < 0.0422
    assert plan.prefill_chunk == 64


def test_its_programs_are_small_and_none_is_solved_that_cannot_win(monkeypatch):
    """Four equal layers, each with unknowns of its own, made six programs of 194 whole numbers, solved in 9 s."""
    asked, solve = [], Formulation.solve

    def noted(program, most_s=float("inf")):
        asked.append((sum(program._unknowns.program.integer), most_s, solve(program, most_s)))
        return asked[-1][-1]

    monkeypatch.setattr(Formulation, "solve", noted)
    plan = plan_requested(request())
    searched = [each for each in asked if each[1] < float("inf")]
    best_s = plan.predicted.objective_s

    assert max(integers for integers, *_ in asked) < 60
    assert searched and all(found is None or found.seconds <= most_s * NOISE for _, most_s, found in searched)
    assert min(most_s for _, most_s, _ in searched) == pytest.approx(best_s, rel=2e-3)
