"""The search for the fastest placement: an exact program for every KV size worth trying, laid out in whole units.

Every candidate is judged by the cost model itself, so the prediction that a plan prints is the number that chose it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from placement.cost.objective import judged_s, reference_batch, reference_context
from placement.plan.workload import round_up
from placement.solve.decisions import Budgets
from placement.solve.formulation import formulation
from placement.solve.problem import Candidate, Problem, fastest_first, known_placements
from placement.solve.whole_units import expert_slot_candidates, filled_up, free_tokens, laid_out, with_tokens

# Placements that are tried with every prefill chunk, the fastest first.
MOST_TRANSFERRED = 4
# A program that cannot get this much below the best placement found is not solved: its costs hold tie-breaks, and the
# solver stops at a gap.
PROGRAM_NOISE = 5e-4


def candidates(problems: Sequence[Problem]) -> list[Candidate]:
    """Placements within the budgets, fastest first; empty when there is none. Only reference tiers are settled.

    problems: the same model cut or called otherwise; the fastest placement of any of them wins. Should rounding have
    pushed every one over a budget, they are returned all the same, for their bytes to be reported.
    """
    fitting = [known for problem in problems for known in known_placements(problem) if known.fits]
    too_large: list[Candidate] = []
    best_s = min((candidate.judged_s for candidate in fitting), default=float("inf"))
    for least_s, _, problem, tokens in _programs(problems):
        # Everything in GPU memory is among those known already; whatever else a program finds is judged as such.
        if judged_s(least_s, False) * (1 - PROGRAM_NOISE) >= best_s:
            break
        solved = formulation(problem, problem.calls, tokens).solve()
        for candidate in laid_out(problem, solved) if solved else ():
            if candidate.fits:
                fitting.append(filled_up(candidate))
                best_s = min(best_s, fitting[-1].judged_s)
            else:
                too_large.append(candidate)
    fitting += _with_other_chunks(problems, fitting)
    fitting += [other for each in fastest_first(fitting)[:MOST_TRANSFERRED] for other in expert_slot_candidates(each)]
    return fastest_first(fitting or too_large)


def _with_other_chunks(problems: Sequence[Problem], fitting: Sequence[Candidate]) -> Iterator[Candidate]:
    """The fastest placements that were searched for, called with every other prefill chunk.

    Whole units lose less of one program's solution than of another's: what was found for one chunk may be better than
    what was found for the chunk that suits it.
    """
    searched = [candidate for candidate in fastest_first(fitting) if candidate.spread is not None]
    for candidate in searched[:MOST_TRANSFERRED]:
        found_for = candidate.problem
        for problem in problems:
            is_other = problem.workload.prefill_chunk != found_for.workload.prefill_chunk
            if (
                is_other
                and problem.workload.linears == found_for.workload.linears
                and _tiers(problem) == _tiers(found_for)
            ):
                other = replace(found_for, workload=problem.workload, budgets=problem.budgets)
                moved = with_tokens(candidate, other, candidate.gpu_tokens)
                moved = with_tokens(moved, other, moved.gpu_tokens + free_tokens(moved))
                if moved.fits and not any(_is_same(moved, known) for known in fitting):
                    yield moved


def _is_same(one: Candidate, other: Candidate) -> bool:
    """Whether two candidates are one placement with one prefill chunk."""
    chunks = (candidate.problem.workload.prefill_chunk for candidate in (one, other))
    return (one.linears, one.kv, next(chunks)) == (other.linears, other.kv, next(chunks))


def _tiers(problem: Problem) -> set[int]:
    """Row tiers of the reference passes."""
    return {weighted.call.tier for weighted in problem.calls}


def _programs(problems: Sequence[Problem]) -> list[tuple[float, int, Problem, int | None]]:
    """Every program worth solving: the seconds below which it cannot get, its place in the list, the problem, and the
    KV slots of GPU-owned KV heads, None where the program decides them. The most promising first."""
    found = []
    for problem in problems:
        for variant, tokens in _variants(problem):
            least_s = formulation(variant, variant.calls, tokens).least_s()
            if least_s is not None:
                found.append((least_s + variant.once_s, len(found), variant, tokens))
    return sorted(found, key=lambda entry: entry[:2])


def _variants(problem: Problem) -> Iterator[tuple[Problem, int | None]]:
    """Who owns the cache and how much of it stays in GPU memory: everything by the GPU, with as many slots as are best;
    nothing; or the KV heads that are best for a few numbers of slots."""
    every, none = problem.with_owned_heads(True), problem.with_owned_heads(False)
    owns_all = all(
        bound.gpu_kv_heads == shard.kv_heads for shard, bound in zip(problem.workload.kv, every.bounds.kv, strict=True)
    )
    if owns_all:
        yield every, None
    if none != problem:
        yield none, problem.workload.min_gpu_tokens
    if not (owns_all and every == problem):
        for tokens in _token_choices(problem):
            yield problem, tokens


def least_bytes(problem: Problem, place: str, budgets: Budgets) -> float | None:
    """Fewest bytes at a place (gpu | pinned | host), beside everything of fixed size, that any placement needs.

    Fewer KV slots on the GPU take less of its memory, but what does not fit in them takes DRAM.
    """
    choices = [problem.workload.min_gpu_tokens] if place == "gpu" else _token_choices(problem)
    found = (formulation(problem, problem.calls, tokens, budgets=budgets).solve_for_least(place) for tokens in choices)
    return min((least for least in found if least is not None), default=None)


def _token_choices(problem: Problem) -> list[int]:
    """KV slots worth trying for GPU-owned KV heads: as few as work, the reference contexts, everything."""
    workload = problem.workload
    if all(b.gpu_kv_heads == 0 or b.gpu_tokens for b in problem.bounds.kv):
        return [workload.min_gpu_tokens]
    batch = reference_batch(workload, problem.objective)
    reference = round_up(reference_context(workload, batch) + 1, workload.page_size) * batch
    choices = {
        workload.min_gpu_tokens,
        workload.full_tokens,
        min(max(reference, workload.min_gpu_tokens), workload.full_tokens),
    }
    return sorted(choices, reverse=True)
