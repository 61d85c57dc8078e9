"""Answers of the solver, kept by the program that was asked: in this process, and in a folder for others and later runs."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import scipy

from placement.program import prices, program
from placement.program.prices import Relaxed
from placement.program.program import Program

FOLDER = Path(__file__).resolve().parents[3] / ".pytest_cache" / "solved"

Answer = list[float] | None


def answers_once(programs: type[Program]) -> dict[str, Callable]:
    """The methods of programs that ask the solver, each answered once."""
    relax = programs.relaxed

    def in_a_list(asked: Program, _: bool) -> Answer:
        found = relax(asked)
        return None if found is None else [found.cost, *found.prices]

    solved, relaxed = Solved(programs.solve), Solved(in_a_list, name="relaxed")

    def relaxed_once(asked: Program) -> Relaxed | None:
        answer = relaxed.of(asked)
        return None if answer is None else Relaxed(answer[0], answer[1:])

    return {"solve": lambda asked, whole_numbers=True: solved.of(asked, whole_numbers), "relaxed": relaxed_once}


class Solved:
    """One answer for each program, its bounds and costs to the last bit, by one version of the solver.

    The source that asks the solver is part of a name: where that changes, everything is solved anew.
    """

    def __init__(self, solve: Callable[[Program, bool], Answer], folder: Path = FOLDER, name: str = "solve") -> None:
        self._solve, self._folder = solve, folder
        self._known: dict[str, Answer] = {}
        source = [Path(module.__file__).read_text("utf-8") for module in (program, prices)]
        self._asked_by = "".join((name, scipy.__version__, *source))

    def of(self, program: Program, whole_numbers: bool = True) -> Answer:
        """The solver's answer, a list of the caller's own."""
        asked = repr((program, whole_numbers, self._asked_by))
        name = hashlib.sha256(asked.encode()).hexdigest()
        if name not in self._known:
            self._known[name] = self._kept(name, program, whole_numbers)
        answer = self._known[name]
        return None if answer is None else list(answer)

    def _kept(self, name: str, program: Program, whole_numbers: bool) -> Answer:
        path = self._folder / name
        if path.exists():
            return json.loads(path.read_text())
        answer = self._solve(program, whole_numbers)
        self._folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(answer))
        part.replace(path)  # two processes may solve one program
        return answer
