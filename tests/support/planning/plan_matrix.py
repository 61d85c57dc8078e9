"""Run what the best plan is held to over its whole matrix, hours of it, so that it can be stopped and gone on with:

    python -m tests.support.planning.plan_matrix RESULTS [--minutes 30]

RESULTS holds a line of JSON for every case that was looked at; those are left out the next time. The order is drawn
once, so that any share of the matrix is a fair sample. Ends with 1 where a line of RESULTS has a fault.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from tests.support.planning.best_plans import CHECKS, MATRIX, plan_of_case

Case = tuple[object, ...]


def in_order() -> list[Case]:
    """The matrix as it is walked, the same every time."""
    return random.Random(0).sample(MATRIX, len(MATRIX))


def faults_of(case: Case, checks: Iterable[Callable] = CHECKS) -> dict[str, str]:
    """What is wrong with the plan of a case, by the check that says so."""
    found = {}
    for check in checks:
        try:
            check(case)
        except AssertionError as error:
            found[check.__name__] = str(error).partition("\n")[0]
    plan_of_case.cache_clear()
    return found


def faults_by_case(results: Path) -> dict[Case, dict[str, str]]:
    """Faults by case, of every case that the file has."""
    lines = results.read_text().splitlines() if results.exists() else []
    entries = [json.loads(line) for line in lines]
    return {tuple(entry["case"]): entry["faults"] for entry in entries}


def walk(results: Path, seconds: float) -> Iterator[tuple[Case, dict[str, str]]]:
    """Look at the cases that the file lacks, and write each to it, for so many seconds."""
    until, known = time.monotonic() + seconds, faults_by_case(results)
    for case in in_order():
        if case in known:
            continue
        if time.monotonic() > until:
            return
        faults = faults_of(case)
        with results.open("a") as file:
            file.write(json.dumps({"case": case, "faults": faults}) + "\n")
        yield case, faults


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    asked = parser.parse_args(arguments)
    done = len(faults_by_case(asked.results))
    for case, faults in walk(asked.results, 60 * asked.minutes):
        done += 1
        if faults or done % 20 == 0:
            print(f"{done} of {len(MATRIX)}", *(["at fault:", case, faults] if faults else []), flush=True)
    at_fault = {case: faults for case, faults in faults_by_case(asked.results).items() if faults}
    print(f"{done} of {len(MATRIX)} cases looked at, {len(at_fault)} at fault")
    return 1 if at_fault else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
